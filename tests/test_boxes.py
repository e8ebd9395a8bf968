"Boxes: from one family's form to another's and back, out of the files that annotation tools write, and what is wrong with either."
import base64, json

import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from qwen2vl_nb.data.box_check import box_faults
from qwen2vl_nb.data.boxes import Box, count_boxes, format_boxes, parse_boxes, sample_boxes, to_boxes
from qwen2vl_nb.data.check import check_samples, mend_samples
from qwen2vl_nb.data.registry import Registry, dataset_samples
from qwen2vl_nb.data.sources import read_samples
from qwen2vl_nb.model import box_frame, families

# --- one family's form and another's

sides = st.integers(1, 4000)
sizes = st.tuples(sides, sides).filter(lambda size: max(size) < 180*min(size))
labels = st.text(st.characters(exclude_categories=['Cs'], exclude_characters='<|'), max_size=12)
part = st.floats(0, 1)
limits = st.fixed_dictionaries({}, optional={'image_max_pixels': st.integers(10_000, 2_000_000), 'image_min_pixels': st.integers(100, 9_000)})

@st.composite
def boxes_in(draw, size):
    "Boxes and points anywhere in a picture."
    width, height = size
    def one():
        (x1, x2), (y1, y2) = (sorted([draw(part), draw(part)]) for _ in 'xy')
        point = draw(st.booleans())
        return Box(draw(labels), x1*width, y1*height, *(() if point else (x2*width, y2*height)))
    return [one() for _ in range(draw(st.integers(0, 4)))]

def _near(some, others, half):
    "Whether boxes have the same names, and places that are at most `half` of (width, height) apart."
    assert [b.label for b in some] == [b.label for b in others]
    return all(abs(a - b) <= half[i%2] + 1e-6 for one, two in zip(some, others) for i, (a, b) in enumerate(zip(one.coordinates, two.coordinates, strict=True)))

@settings(deadline=None)
@given(sizes, st.sampled_from([*families]), limits, st.data())
def test_boxes_come_back_exact_to_rounding(size, family, limits, data):
    boxes = data.draw(boxes_in(size))
    text, frame = format_boxes(boxes, size, family, **limits), box_frame(*size, family, **limits)
    again = parse_boxes(text, size, family, **limits)
    assert count_boxes(text) == (len(boxes), 0)
    assert _near(boxes, again, [.5*side/unit for side, unit in zip(size, frame)])
    assert format_boxes(again, size, family, **limits) == text  # and nothing drifts

@settings(deadline=None)
@given(st.sampled_from([*families]), st.sampled_from([*families]), limits, st.data())
def test_samples_go_to_another_family_and_back(tmp_path_factory, source, family, limits, data):
    size = data.draw(st.sampled_from([(640, 428), (84, 112), (1500, 30), (2000, 2000)]))
    path = tmp_path_factory.getbasetemp()/f'{size[0]}.png'
    if not path.exists(): Image.new('1', size).save(path)
    boxes = data.draw(boxes_in(size))
    words = data.draw(st.sampled_from(['', 'Here: ', '见下']))
    sample = {'images': [str(path)], 'instruction': '<image>Where?', 'input': '', 'output': words*bool(boxes) + format_boxes(boxes, size, source, **limits)}
    there = to_boxes(sample, family, source, **limits)
    back = to_boxes(there, source, **limits)
    frames = [box_frame(*size, f, **limits) for f in (source, family)]
    coarse = [.5*side/a + .5*side/b for side, a, b in zip(size, *frames)]
    assert there['box_frame'] == [*frames[1]] and back['box_frame'] == [*frames[0]]
    assert _near(boxes, parse_boxes(there['output'], size, family, **limits), coarse)
    assert to_boxes(there, family, **limits) == there
    if all(b <= a for a, b in zip(*frames[::-1])): assert back['output'] == sample['output']

@settings(deadline=None)
@given(st.lists(st.sampled_from(['{', '}', '[', ']', '"bbox_2d": ', '[1, 2, 3, 4]', '"label": "a"', ',', '<|box_start|>', '<|box_end|>', '(1,2)', '```', 'x', '\\"']), max_size=40).map(''.join) | st.text())
def test_any_text_is_read_without_an_exception(text):
    read, malformed = count_boxes(text)
    found = parse_boxes(text, (100, 50), 'qwen2_vl')
    assert len(found or []) == read
    assert (found is None) <= (read + malformed == 0)

def test_a_long_hostile_answer_is_read_in_no_time():
    for text in ('{"bbox_2d":'*20_000, '[{"bbox_2d": [1, 2, 3, 4]}, '*20_000, '<|box_start|>'*50_000, '<|object_ref_start|>'*50_000, '{"a": '*900 + '{"bbox_2d": [1]}'):
        assert count_boxes(text)

def test_an_answer_that_is_cut_off_keeps_its_complete_boxes():
    whole = format_boxes([Box('a', 1, 2, 30, 40), Box('b', 5, 6, 70, 80)], (100, 100), 'qwen3_vl')
    for end in range(1, len(whole) - 1):
        read, malformed = count_boxes(whole[:end])
        assert read == (whole[:end].count('}')) and read + malformed <= 2
    assert count_boxes(whole[:60]) == (1, 1)

# --- files as the tools write them

PICTURE, BOXES = (120, 90), [('dog', (40, 30, 90, 80)), ('cat', (12, 9, 24, 18))]
PICTURES = {'a.png': BOXES, 'b.png': BOXES[:1], 'c.png': []}

def _drawn(folder, size=PICTURE, **options):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(PICTURES): Image.new('RGB', size, (i*40, 90, 0)).save(folder/name, **options)
    return folder

def _json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2), encoding='utf-8')
    return path

def _sized(x1, y1, x2, y2): return [x1, y1, x2 - x1, y2 - y1]

def _coco(**changes):
    "As pycocotools and the exports of CVAT and Roboflow have it, with the outlines beside the boxes."
    kinds = [{'id': 1, 'name': 'dog', 'supercategory': 'animal'}, {'id': 18, 'name': 'cat', 'supercategory': 'animal'}]
    images = [{'id': 10 + i, 'width': 120, 'height': 90, 'file_name': name, 'license': 1, 'date_captured': ''} for i, name in enumerate(PICTURES)]
    notes = [{'id': 100 + 10*i + j, 'image_id': 10 + i, 'category_id': {'dog': 1, 'cat': 18}[label], 'bbox': _sized(*box), 'area': 9.5, 'iscrowd': 0,
              'segmentation': [[40, 30, 90, 30, 90, 80]]} for i, boxes in enumerate(PICTURES.values()) for j, (label, box) in enumerate(boxes)]
    return {'info': {'year': 2024}, 'licenses': [], 'categories': kinds, 'images': images, 'annotations': notes} | changes

def _coco_file(folder, **changes):
    _drawn(folder/'images')
    return _json(folder/'annotations'/'instances.json', _coco(**changes)), {'media_dir': folder/'images'}

def _yolo(folder, lines=None, yaml='names:\n  0: cat\n  1: dog\ntrain: images\nval: images\n'):
    "As Ultralytics' tools write it."
    _drawn(folder/'images')
    (folder/'labels').mkdir()
    for name, boxes in PICTURES.items():
        text = ''.join(f"{('cat', 'dog').index(label)} {(x1 + x2)/240:.6f} {(y1 + y2)/180:.6f} {(x2 - x1)/120:.6f} {(y2 - y1)/90:.6f}\n" for label, (x1, y1, x2, y2) in boxes)
        (folder/'labels'/name).with_suffix('.txt').write_text(text if lines is None else lines)
    (folder/'data.yaml').write_text(yaml)
    return folder, {}

VOC = '''<annotation verified="yes">
\t<folder>JPEGImages</folder>
\t<filename>{name}</filename>
\t<path>C:\\\\data\\\\{name}</path>
\t<source><database>Unknown</database></source>
\t<size><width>{width}</width><height>{height}</height><depth>3</depth></size>
\t<segmented>0</segmented>
{objects}</annotation>'''
THING = '''\t<object>
\t\t<name>{}</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>
\t\t<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>
\t</object>
'''

def _voc(folder, change=lambda text: text, size=PICTURE):
    "As labelImg writes it, in the folders of VOC."
    _drawn(folder/'JPEGImages')
    (folder/'Annotations').mkdir()
    for name, boxes in PICTURES.items():
        text = VOC.format(name=name, width=size[0], height=size[1], objects=''.join(THING.format(label, *box) for label, box in boxes))
        (folder/'Annotations'/name).with_suffix('.xml').write_text(change(text))
    return folder, {}

def _labelme(folder, change=lambda shape: shape, **changes):
    "As LabelMe 5 writes it, beside the pictures."
    _drawn(folder)
    for name, boxes in PICTURES.items():
        shapes = [change({'label': label, 'points': [[x1, y1], [x2, y2]], 'group_id': None, 'description': '', 'shape_type': 'rectangle', 'flags': {}, 'mask': None})
                  for label, (x1, y1, x2, y2) in boxes]
        _json((folder/name).with_suffix('.json'), {'version': '5.5.0', 'flags': {}, 'shapes': shapes, 'imagePath': name, 'imageData': None, 'imageHeight': 90, 'imageWidth': 120} | changes)
    return folder, {}

def _result(label, box, **changes):
    x, y, width, height = (100*n/side for n, side in zip(_sized(*box), (120, 90, 120, 90)))
    value = {'x': x, 'y': y, 'width': width, 'height': height, 'rotation': 0, 'rectanglelabels': [label]}
    return {'original_width': 120, 'original_height': 90, 'image_rotation': 0, 'value': value, 'id': 'a1', 'from_name': 'label', 'to_name': 'image', 'type': 'rectanglelabels', 'origin': 'manual'} | changes

def _tasks(change=lambda result: result):
    return [{'id': i, 'annotations': [{'id': i, 'completed_by': 1, 'was_cancelled': False, 'ground_truth': False, 'result': [change(_result(*box)) for box in boxes]}],
             'predictions': [], 'data': {'image': f'/data/upload/1/0a1b2c3d-{name}'}, 'meta': {}, 'project': 1} for i, (name, boxes) in enumerate(PICTURES.items())]

def _studio(folder, change=lambda result: result):
    _drawn(folder/'images')
    return _json(folder/'project-1.json', _tasks(change)), {'media_dir': folder/'images'}

def _studio_min(folder):
    _drawn(folder/'images')
    rows = [{'image': f'/data/local-files/?d=images/{name}', 'id': i, 'label': [result['value'] | {'original_width': 120, 'original_height': 90} for result in (_result(*box) for box in boxes)],
             'annotator': 1, 'annotation_id': i} for i, (name, boxes) in enumerate(PICTURES.items())]
    return _json(folder/'min.json', rows), {}

def _table(folder, header='filename,width,height,class,xmin,ymin,xmax,ymax', rows=None):
    "As the exports for TensorFlow have it; a picture without boxes has empty cells."
    _drawn(folder)
    rows = rows or [f'{name},120,90,{label},{",".join(map(str, box))}' for name, boxes in PICTURES.items() for label, box in boxes or [('', ['']*4)]]
    (folder/'boxes.csv').write_text('\n'.join([header, *rows]))
    return folder/'boxes.csv', {}

def _shares(folder): return _table(folder, 'image,label,x,y,w,h', [f'{name},{label},{",".join(str(n/s) for n, s in zip(_sized(*box), (120, 90, 120, 90)))}' for name, boxes in PICTURES.items() for label, box in boxes] + ['c.png,,,,,'])

FORMS = {'COCO': _coco_file, 'YOLO': _yolo, 'Pascal VOC': _voc, 'LabelMe': _labelme, 'Label Studio': _studio, 'Label Studio, JSON-MIN': _studio_min, 'a table with corners': _table,
         'a table with fractions': _shares}

@pytest.mark.parametrize('family', families)
@pytest.mark.parametrize('make', FORMS.values(), ids=FORMS.keys())
def test_the_files_of_annotation_tools_are_read(make, family, tmp_path, capsys):
    "With a prompt and limits; the check has nothing to say, and the boxes are those that were drawn."
    source, how = make(tmp_path/'set')
    samples = read_samples(source, prompt='Find the animals.', family=family, image_max_pixels=90*90, **how)
    assert [s['instruction'] for s in samples] == ['<image>Find the animals.']*3
    assert '3 box(es) of 2 class(es)' in capsys.readouterr().out
    for sample, boxes in zip(samples, PICTURES.values(), strict=True):
        found = sample_boxes(sample, PICTURE)
        assert _near([Box(label, *box) for label, box in boxes], found, [.8, .8]), (sample, boxes)
        assert parse_boxes(sample['output'], PICTURE, family, image_max_pixels=90*90) == found
    found = check_samples(samples, image_max_pixels=90*90)
    assert not (found.level != 'note').any(), list(found.what)
    assert all(fault.level == 'note' for s in samples for _, fault in box_faults(s, {p: PICTURE for p in s['images']}, family, 90*90))
    again = [to_boxes(to_boxes(s, 'qwen3_vl'), family, image_max_pixels=90*90) for s in samples]
    assert [s['box_frame'] for s in again] == [s['box_frame'] for s in samples]

@pytest.mark.parametrize('make', FORMS.values(), ids=FORMS.keys())
def test_without_a_family_the_reader_asks_for_one(make, tmp_path):
    source, how = make(tmp_path/'set')
    with pytest.raises(ValueError, match="say for which, as in family='Qwen2.5-VL"): read_samples(source, **how)

def test_what_was_read_goes_through_llamafactorys_loader(tmp_path, factory):
    "The column with the coordinates' size is no hindrance, and marks and JSON arrive as they are."
    for family in ('qwen2_vl', 'qwen2_5_vl'):
        source, how = _coco_file(tmp_path/family)
        samples = read_samples(source, family=family, **how)
        registry = Registry(tmp_path/f'{family} data')
        registry.add('boxes', samples)
        assert dataset_samples(registry, 'boxes') == samples
        rows = factory.load(registry.dataset_dir, 'boxes')
        assert [row['_response'][0]['content'] for row in rows] == [s['output'] for s in samples]

# --- pictures that are turned, or were scaled

def _turned(folder, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return _drawn(folder, PICTURE, exif=exif)

@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('family', ['qwen2_5_vl', 'qwen3_vl'])
def test_boxes_of_upright_pictures_are_turned_to_fit_the_file_and_back_when_it_is_mended(family, orientation, tmp_path):
    upright = PICTURE if orientation < 5 else PICTURE[::-1]
    box = (10, 20, 40, 70)
    _turned(tmp_path/'photos', orientation)
    images = [{'id': 1, 'file_name': 'a.png', 'width': upright[0], 'height': upright[1]}]
    note = {'image_id': 1, 'category_id': 1, 'bbox': _sized(*box)}
    source = _json(tmp_path/'boxes.json', {'images': images, 'categories': [{'id': 1, 'name': 'dog'}], 'annotations': [note]})
    sample, = read_samples(source, family=family, media_dir=tmp_path/'photos')
    assert orientation < 5 or sample_boxes(sample, PICTURE)[0].coordinates[0] > 15  # it lies
    [mended], found = mend_samples([sample])
    assert Image.open(mended['images'][0]).size == upright and list(found.level) == ['mended']*(orientation > 1)
    assert _near([Box('dog', *box)], sample_boxes(mended, upright), [.6, .6])
    assert _near(sample_boxes(mended, upright), parse_boxes(mended['output'], upright, family), [0, 0])

def test_boxes_that_were_drawn_in_the_picture_as_it_lies_stay(tmp_path):
    _turned(tmp_path/'images', 6)
    source = _json(tmp_path/'annotations'/'instances.json', _coco())
    samples = read_samples(source, family='qwen3_vl', media_dir=tmp_path/'images')
    assert _near([Box(label, *box) for label, box in BOXES], sample_boxes(samples[0], PICTURE), [.1, .1])

def test_boxes_follow_pictures_that_were_scaled(tmp_path):
    source, how = _voc(tmp_path)
    _drawn(tmp_path/'JPEGImages', (240, 180))
    sample = read_samples(source, family='qwen2_5_vl')[0]
    assert _near([Box(label, *(2*n for n in box)) for label, box in BOXES], sample_boxes(sample, (240, 180)), [.6, .6])

def test_labelmes_own_picture_is_written_out(tmp_path):
    source, _ = _labelme(tmp_path/'set')
    data = json.loads((source/'a.json').read_text())
    _json(source/'a.json', data | {'imageData': base64.b64encode((source/'a.png').read_bytes()).decode()})
    (source/'a.png').unlink()
    sample = read_samples(source, family='qwen3_vl')[0]
    assert Image.open(sample['images'][0]).size == PICTURE and len(sample_boxes(sample, PICTURE)) == 2

def test_points_are_read(tmp_path):
    source, _ = _labelme(tmp_path/'labelme', lambda shape: shape | {'shape_type': 'point', 'points': shape['points'][:1]})
    point = lambda result: result | {'type': 'keypointlabels', 'value': {'x': result['value']['x'], 'y': result['value']['y'], 'width': .2, 'keypointlabels': result['value']['rectanglelabels']}}
    other, how = _studio(tmp_path/'studio', point)
    for samples in (read_samples(source, family='qwen2_vl'), read_samples(other, family='qwen2_vl', **how)):
        assert samples[0]['output'] == '<|object_ref_start|>dog<|object_ref_end|><|box_start|>(333,333)<|box_end|><|object_ref_start|>cat<|object_ref_end|><|box_start|>(100,100)<|box_end|>'

def test_splits_of_yolo_are_read_one_at_a_time(tmp_path):
    for split in ('train', 'valid'):
        _yolo(tmp_path/split)
        (tmp_path/split/'data.yaml').unlink()
    (tmp_path/'data.yaml').write_text("train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['cat', 'dog']\n")
    with pytest.raises(ValueError, match='contains the splits train, val: read each'): read_samples(tmp_path, family='qwen3_vl')
    for source in (tmp_path/'train', tmp_path/'train'/'images'): assert len(read_samples(source, family='qwen3_vl')) == 3
    with pytest.raises(ValueError, match='contains the splits'): read_samples(tmp_path/'data.yaml', family='qwen3_vl')
