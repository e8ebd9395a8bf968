"Boxes: from one family's form to another's and back, out of the files that annotation tools write, and what is wrong with either."
import base64, json, os

import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from qwen2vl_nb.data.annotations import turn_numbers
from qwen2vl_nb.data.box_check import box_faults
from qwen2vl_nb.data.boxes import Box, count_boxes, format_boxes, parse_boxes, sample_boxes, to_boxes
from qwen2vl_nb.data.check import check_samples, drop_samples, mend_samples
from qwen2vl_nb.data.registry import Registry, dataset_samples
from qwen2vl_nb.data.sources import read_samples
from qwen2vl_nb.checks import data_findings
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

def _yolo_by(tool):
    "As other tools write it: the names of the classes in a text file, and the pictures in folders of their own or beside the labels."
    names, pictures = {'Label Studio': ('classes.txt', 'images'), 'labelImg': ('classes.txt', '.'), 'CVAT': ('obj.names', 'obj_train_data')}[tool]
    def make(folder):
        _yolo(folder)
        (folder/'data.yaml').unlink()
        (folder/names).write_text('cat\ndog\n')
        if pictures == 'images': return folder, {}
        for file in [*folder.glob('*s/*.*')]: file.rename(_made(folder/pictures)/file.name)
        for left in ('images', 'labels'): (folder/left).rmdir()
        if tool == 'CVAT': (folder/'obj.data').write_text('classes = 2\ntrain = data/train.txt\nnames = data/obj.names\n')
        return folder, {}
    return make

def _made(folder):
    folder.mkdir(exist_ok=True)
    return folder

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

def _voc_lower(folder):
    "As many sets on the web have it."
    _voc(folder)
    (folder/'Annotations').rename(folder/'annotations')
    (folder/'JPEGImages').rename(folder/'images')
    return folder, {}

def _labelme(folder, change=lambda shape: shape, **changes):
    "As LabelMe 5 writes it, beside the pictures."
    _drawn(folder)
    for name, boxes in PICTURES.items():
        shapes = [change({'label': label, 'points': [[x1, y1], [x2, y2]], 'group_id': None, 'description': '', 'shape_type': 'rectangle', 'flags': {}, 'mask': None})
                  for label, (x1, y1, x2, y2) in boxes]
        _json((folder/name).with_suffix('.json'), {'version': '5.5.0', 'flags': {}, 'shapes': shapes, 'imagePath': name, 'imageData': None, 'imageHeight': 90, 'imageWidth': 120} | changes)
    return folder, {}

def _labelme_apart(folder):
    "With the four corners of each rectangle, as X-AnyLabeling has them, in a folder beside the pictures, and under Windows."
    def four(shape):
        (x1, y1), (x2, y2) = shape['points']
        return shape | {'points': [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]}
    _labelme(folder, four)
    for file in folder.glob('*.json'):
        _json(_made(folder/'labels')/file.name, json.loads(file.read_text()) | {'imagePath': f'..\\images\\{file.stem}.png'})
        file.unlink()
    for file in folder.glob('*.png'): file.rename(_made(folder/'images')/file.name)
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

def _two_pictures(folder):
    "The first task shows two pictures side by side, and both have a box."
    tasks = _tasks()
    for name, result in zip('lr', tasks[0]['annotations'][0]['result']): result['to_name'] = name
    _drawn(folder)
    return _json(folder/'a.json', [tasks[0] | {'data': {'left': 'a.png', 'right': 'b.png'}}, *tasks[1:]]), {}

def _studio_min(folder):
    _drawn(folder/'images')
    rows = [{'image': f'/data/local-files/?d=images/{name}', 'id': i, 'label': [result['value'] | {'original_width': 120, 'original_height': 90} for result in (_result(*box) for box in boxes)],
             'annotator': 1, 'annotation_id': i} for i, (name, boxes) in enumerate(PICTURES.items())]
    return _json(folder/'min.json', rows), {}

def _studio_parts(folder):
    "The template for OCR: the place of a box, its name and its text are results of their own."
    def parts(result):
        value, label = {k: v for k, v in result['value'].items() if k != 'rectanglelabels'}, result['value']['rectanglelabels']
        kinds = {'rectangle': {}, 'labels': {'labels': label}, 'textarea': {'text': ['abc']}}
        return [result | {'type': kind, 'value': value | more, 'id': f'{label}'} for kind, more in kinds.items()]
    tasks = _tasks(parts)
    for task in tasks: task['annotations'][0]['result'] = sum(task['annotations'][0]['result'], [])
    _drawn(folder/'images')
    return _json(folder/'project-1.json', tasks), {'media_dir': folder/'images'}

def _studio_min_parts(folder):
    source, how = _studio_min(folder)
    rows = json.loads(source.read_text())
    for row in rows:
        row['label'] = [{k: v for k, v in one.items() if k != 'rectanglelabels'} | {'labels': one['rectanglelabels']} for one in row['label']]
        row |= {'bbox': [{k: v for k, v in one.items() if k != 'labels'} for one in row['label']], 'transcription': ['abc']*len(row['label'])}
    return _json(source, rows), how

def _table(folder, header='filename,width,height,class,xmin,ymin,xmax,ymax', rows=None):
    "As the exports for TensorFlow have it; a picture without boxes has empty cells."
    _drawn(folder)
    rows = rows or [f'{name},120,90,{label},{",".join(map(str, box))}' for name, boxes in PICTURES.items() for label, box in boxes or [('', ['']*4)]]
    (folder/'boxes.csv').write_text('\n'.join([header, *rows]))
    return folder/'boxes.csv', {}

def _shares(folder): return _table(folder, 'image,label,x,y,w,h', [f'{name},{label},{",".join(str(n/s) for n, s in zip(_sized(*box), (120, 90, 120, 90)))}' for name, boxes in PICTURES.items() for label, box in boxes] + ['c.png,,,,,'])

def _sides(folder): return _table(folder, 'image,label,left,top,width,height', [f'{name},{label},{",".join(map(str, _sized(*box)))}' for name, boxes in PICTURES.items() for label, box in boxes] + ['c.png,,,,,'])

FORMS = {'COCO': _coco_file, 'YOLO': _yolo, 'YOLO of Label Studio': _yolo_by('Label Studio'), 'YOLO of labelImg': _yolo_by('labelImg'), 'YOLO of CVAT': _yolo_by('CVAT'),
         'Pascal VOC': _voc, 'Pascal VOC in lower case': _voc_lower, 'LabelMe, four corners': _labelme_apart, 'Label Studio for OCR': _studio_parts,
         'Label Studio for OCR, JSON-MIN': _studio_min_parts, 'LabelMe': _labelme, 'Label Studio': _studio, 'Label Studio, JSON-MIN': _studio_min, 'a table with corners': _table,
         'a table with fractions': _shares, 'a table with corners and sizes': _sides, 'YOLO with names by text': lambda folder: _yolo(folder, yaml='names: {"0": cat, "1": dog}\n')}

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

@pytest.mark.parametrize('how', [{}, {'prompt': 'question'}])
def test_a_table_may_ask_several_questions_about_a_picture(how, tmp_path):
    "Each has the boxes of its rows; a table whose column is called prompt is not asked something else."
    rows = [f'{name},{label},{",".join(map(str, box))},Where is the {label}?' for name, boxes in PICTURES.items() for label, box in boxes]
    source, _ = _table(tmp_path, 'image,label,x1,y1,x2,y2,question', rows)
    samples = read_samples(source, family='qwen3_vl', **how)
    assert [(s['instruction'], *(box.label for box in sample_boxes(s, PICTURE))) for s in samples] == [(f'<image>Where is the {row.split(",")[1]}?', row.split(',')[1]) for row in rows]

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

@pytest.mark.parametrize('train,val', [('train.txt', 'val.txt'), ('train.txt', 'images/val'), (['images/train'], 'images/val')])
def test_splits_of_yolo_may_be_lists(train, val, tmp_path, capsys):
    "A list of pictures, or of folders, is no reason to read the other split alone, or both as one."
    for split in ('train', 'val'):
        _yolo(tmp_path/'set'/split)
        for kind in ('images', 'labels'): (tmp_path/'set'/split/kind).rename(_made(tmp_path/'set'/kind)/split)
        (tmp_path/'set'/f'{split}.txt').write_text(''.join(f'data/images/{split}/{name}\n' for name in PICTURES))
    _json(tmp_path/'set'/'data.yaml', {'path': '.', 'names': {0: 'cat', 1: 'dog'}, 'train': train, 'val': val})  # JSON is YAML, but for keys
    (tmp_path/'set'/'data.yaml').write_text((tmp_path/'set'/'data.yaml').read_text().replace('"0"', '0').replace('"1"', '1'))
    with pytest.raises(ValueError, match=r"contains the splits train, val: read each, as in read_samples\('.*/images/(train|val)'"): read_samples(tmp_path/'set', family='qwen3_vl')
    assert len(read_samples(tmp_path/'set'/'images'/'val', family='qwen3_vl')) == 3

def test_a_split_that_is_alone_is_named(tmp_path, capsys):
    _yolo(tmp_path/'set', yaml='names: [cat, dog]\npath: /content/set\ntrain: images\nval: ../valid/images\ntest:\n')
    assert len(read_samples(tmp_path/'set', family='qwen3_vl')) == 3 and 'YOLO labels in images;' in capsys.readouterr().out

def test_a_folder_of_pictures_is_no_class(tmp_path):
    "The labels of COCO are in another folder beside it."
    _coco_file(tmp_path/'set')
    with pytest.raises(ValueError, match=r'one for each class \(its images is none\). Its labels may be in annotations/instances.json: give that file'):
        read_samples(tmp_path/'set', family='qwen3_vl')

def test_pictures_without_objects_are_read_from_coco(tmp_path):
    source, how = _coco_file(tmp_path, annotations=[])
    assert [s['output'] for s in read_samples(source, family='qwen3_vl', **how)] == ['[]']*3

def test_where_label_studio_keeps_its_pictures(tmp_path):
    _drawn(tmp_path)
    data = base64.b64encode((tmp_path/'a.png').read_bytes()).decode()
    (tmp_path/'17').write_bytes((tmp_path/'a.png').read_bytes())
    for i, address in enumerate(('https://bucket.example.com/set/a.png?X-Amz-Date=1', '/data/local-files/?d=Users%5Cme%5Ca.png', 's3://bucket/a.png', f'data:image/png;base64,{data}', 'https://example.com/pictures/17')):
        source = _json(tmp_path/f'{i}.json', [_tasks()[0] | {'data': {'scan': address} if i in (0, 4) else {'image': address}}])
        sample, = read_samples(source, family='qwen2_5_vl')
        assert Image.open(sample['images'][0]).size == PICTURE and len(sample_boxes(sample, PICTURE)) == 2

@pytest.mark.parametrize('as_turns', [False, True])
@pytest.mark.parametrize('family', ['qwen2_5_vl', 'qwen3_vl'])
def test_both_answers_of_a_ranking_are_converted_and_turned(family, as_turns, tmp_path):
    _turned(tmp_path/'photos', 6)
    answer = lambda *box: format_boxes([Box('dog', *box)], PICTURE, 'qwen2_vl')
    asked = {'images': [str(tmp_path/'photos'/'a.png')], 'instruction': '<image>Where?', 'input': ''}
    pair = asked | {'chosen': answer(10, 20, 40, 70), 'rejected': answer(50, 20, 80, 70)}
    if as_turns: pair = {'images': asked['images'], 'messages': [{'role': 'user', 'content': '<image>Where?'}]} | {k: {'role': 'assistant', 'content': pair[k]} for k in ('chosen', 'rejected')}
    text = lambda sample, key: sample[key]['content'] if as_turns else sample[key]
    there = to_boxes(pair, family)
    for key in ('chosen', 'rejected'):
        assert parse_boxes(text(there, key), PICTURE, family)[0].coordinates == pytest.approx(parse_boxes(text(pair, key), PICTURE, 'qwen2_vl')[0].coordinates, abs=.7)
    [mended], _ = mend_samples([there])
    assert Image.open(mended['images'][0]).size == PICTURE[::-1]
    wanted = [turn_numbers(box.coordinates, PICTURE, 6) for box in sample_boxes(there, PICTURE)]
    assert [box.coordinates for box in sample_boxes(mended, PICTURE[::-1])] == [pytest.approx(box, abs=.7) for box in wanted]
    assert text(mended, 'chosen') != text(there, 'chosen') and text(mended, 'rejected') != text(there, 'rejected')

# --- bad input, each kind in the files of a tool

def _changed(i, **changes):
    "COCO with a changed annotation."
    return lambda folder: _coco_file(folder, annotations=[note | changes if j == i else note for j, note in enumerate(_coco()['annotations'])])

def _replaced(old, new, files=_voc): return lambda folder: files(folder, lambda text: text.replace(old, new))

def _bytes(make, name, data):
    "A file of the set with other content."
    def spoil(folder):
        source, how = make(folder)
        (folder/name).write_bytes(data.encode() if isinstance(data, str) else data)
        return source, how
    return spoil

def _without(make, *names):
    "The set without some of its files."
    def spoil(folder):
        source, how = make(folder)
        for name in names: (folder/name).unlink()
        return source, how
    return spoil

def _pipe(folder):
    source, how = _yolo(folder)
    (folder/'labels'/'a.txt').unlink()
    os.mkfifo(folder/'labels'/'a.txt')
    return source, how

ENTITIES = '<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;&b;">]><annotation><filename>&c;</filename></annotation>'
OUTSIDE = '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/hostname">]><annotation><filename>&b;</filename></annotation>'
ROW = 'a.png,120,90,dog'

BAD = { # name → what makes the files, and the words with which they are refused: the file, the place and the fault
    'COCO: an annotation without a box': (_changed(1, bbox=[]), ['instances.json', 'annotations[1] has no bbox, only an outline or a mask']),
    'COCO: a box of three numbers': (_changed(0, bbox=[1, 2, 3]), ['annotations[0] has bbox [1, 2, 3], not [x, y, width, height]']),
    'COCO: a box of text': (_changed(0, bbox=['1', '2', '3', '4']), ["annotations[0] has bbox ['1', '2', '3', '4']"]),
    'COCO: a box of NaN': (_changed(2, bbox=[1, 2, float('nan'), 4]), ['annotations[2] has bbox [1, 2, nan, 4]']),
    'COCO: a box of huge numbers': (_changed(2, bbox=[1, 2, 10**400, 4]), ['annotations[2] has bbox']),
    'COCO: a picture that is not among the images': (_changed(0, image_id=99), ['annotations[0] has image_id 99, which is not among the images']),
    'COCO: a category that is not among them': (_changed(0, category_id=2), ['annotations[0] has category_id 2, which is not among the categories']),
    'COCO: an id that is a list': (_changed(0, image_id=[1]), ['annotations[0] has image_id [1]']),
    'COCO: no categories': (lambda f: _coco_file(f, categories=None), ['annotations[0] has category_id 1']),
    'COCO: an annotation that is no object': (lambda f: _coco_file(f, annotations=[7, *_coco()['annotations']]), ['annotations[0] is 7, not an object']),
    'COCO: a picture without a file name': (lambda f: _coco_file(f, images=[{'id': 10}, *_coco()['images'][1:]]), ['images[0] lacks id or file_name']),
    'COCO: two pictures with one id': (lambda f: _coco_file(f, images=_coco()['images'] + _coco()['images'][:1]), ['images[3] has the id 10 of another picture']),
    'COCO: images that are no list': (lambda f: _coco_file(f, images={}), ['instances.json has no list of images']),
    'COCO: panoptic masks': (lambda f: _coco_file(f, annotations=[{'image_id': 10, 'file_name': 'a.png', 'segments_info': [{'id': 1}]}]), ['only an outline or a mask']),
    'COCO: annotations that are null': (lambda f: _coco_file(f, annotations=None), ['instances.json has no list of annotations']),
    'COCO: an id of two classes': (lambda f: _coco_file(f, categories=_coco()['categories'] + [_coco()['categories'][0] | {'name': 'cow'}]), ['categories[2] has the id', 'of another class']),
    'COCO: the file is cut off': (lambda f: (_bytes(_coco_file, 'annotations/instances.json', json.dumps(_coco())[:-40])(f)), ['instances.json is not JSON', 'line 1']),
    'COCO: boxes for another picture': (lambda f: _coco_file(f, images=[image | {'width': 300} for image in _coco()['images']]), ['- images[0] (', 'for 300×90 pixels, and the picture has 120×90']),
    'COCO: a rotated box of CVAT': (_changed(1, attributes={'occluded': False, 'rotation': 30.0}), ['annotations[1] is rotated; only upright boxes']),
    'YOLO: an outline': (lambda f: _yolo(f, '0 .1 .1 .2 .1 .2 .2\n'), ['a.txt: line 1 has 7 numbers instead of five; only upright boxes and points are read']),
    'YOLO: a rotated box': (lambda f: _yolo(f, '0 .1 .1 .2 .1 .2 .2 .1 .2\n'), ['a.txt: line 1 has 9 numbers instead of five']),
    'YOLO: a confidence': (lambda f: _yolo(f, '0 .5 .5 .2 .2 .93\n'), ['a.txt: line 1 has six numbers: a confidence?']),
    'YOLO: pixels': (lambda f: _yolo(f, '\n0 60 45 50 50\n'), ['a.txt: line 2 has numbers over 1']),
    'YOLO: a class without a name': (lambda f: _yolo(f, '2 .5 .5 .2 .2\n'), ['a.txt: line 1 has class 2, and the data set names 2 classes']),
    'YOLO: names instead of numbers': (lambda f: _yolo(f, 'dog .5 .5 .2 .2\n'), ['a.txt: line 1 has something that is not a number']),
    'YOLO: a line that is cut off': (lambda f: _yolo(f, '0 .5 .5\n'), ['a.txt: line 1 has fewer than five numbers']),
    'YOLO: infinity': (lambda f: _yolo(f, '0 inf .5 .2 .2\n'), ['a.txt: line 1 has something that is not a number']),
    'YOLO: names that are text': (lambda f: _yolo(f, yaml='nc: 2\nnames: cat, dog\n'), ['data.yaml should list its classes under names']),
    'YOLO: YAML that is none': (lambda f: _yolo(f, yaml='names: [cat, dog\n'), ['data.yaml is not YAML']),
    'YOLO: YAML that would run code': (lambda f: _yolo(f, yaml='names: !!python/object/apply:os.system ["touch ran"]\n'), ['data.yaml is not YAML', 'python/object']),
    'YOLO: YAML that is nested too deeply': (lambda f: _yolo(f, yaml='names: ' + '['*5000), ['data.yaml is not YAML']),
    'YOLO: no label files': (_without(_yolo, 'labels/a.txt', 'labels/b.txt', 'labels/c.txt'), ['but 3 picture(s) and 0 label file(s)']),
    'YOLO: no pictures': (_without(_yolo, 'images/a.png', 'images/b.png', 'images/c.png'), ['but 0 picture(s)']),
    'YOLO: a label file that is a pipe': (_pipe, ['a.txt is not a regular file']),
    'YOLO: labels that are no text': (_bytes(_yolo, 'labels/a.txt', b'\xff\xfe\0'), ['a.txt is not UTF-8 text']),
    'VOC: a polygon': (_replaced('bndbox', 'polygon'), ['a.xml: object 1 has a polygon instead of a bndbox; only upright boxes']),
    'VOC: a rotated box': (_replaced('bndbox', 'robndbox'), ['a.xml: object 1 has a robndbox instead']),
    'VOC: an object without a box': (_replaced('bndbox', 'part'), ['a.xml: object 1 has no bndbox']),
    'VOC: a corner that is missing': (_replaced('<xmax>90</xmax>', ''), ["a.xml: object 1 has a bndbox of '40', '30', '', '80', not four numbers"]),
    'VOC: a corner of words': (_replaced('<xmin>40<', '<xmin>left<'), ["object 1 has a bndbox of 'left'"]),
    'VOC: entities that grow': (_bytes(_voc, 'Annotations/a.xml', ENTITIES), ['a.xml: it defines entities or a DTD']),
    'VOC: an entity of another file': (_bytes(_voc, 'Annotations/a.xml', OUTSIDE), ['a.xml: it defines entities or a DTD']),
    'VOC: a file that is cut off': (_bytes(_voc, 'Annotations/b.xml', VOC[:200]), ['b.xml: it is not XML: ']),
    'VOC: a file that is empty': (_bytes(_voc, 'Annotations/b.xml', ''), ['b.xml: it is not XML: ']),
    'VOC: other XML': (_bytes(_voc, 'Annotations/b.xml', '<html/>'), ['b.xml: its root element is html']),
    'VOC: an encoding that nobody knows': (_bytes(_voc, 'Annotations/b.xml', '<?xml version="1.0" encoding="klingon"?><annotation/>'), ['b.xml: it is not XML']),
    'VOC: boxes for another picture': (lambda f: _voc(f, size=(500, 90)), ['a.xml (', 'for 500×90 pixels, and the picture has 120×90']),
    'VOC: a rotated box of CVAT': (_replaced('</object>', '<attributes><attribute><name>rotation</name><value>30.0</value></attribute></attributes></object>'), ['a.xml: object 1 is rotated; only']),
    "VOC: CVAT's own format": (_bytes(_voc, 'Annotations/a.xml', '<annotations><version>1.1</version></annotations>'), ["a.xml: it is in CVAT's own format: export the task as COCO 1.0"]),
    'LabelMe: a polygon': (lambda f: _labelme(f, lambda s: s | {'shape_type': 'polygon'}), ["a.json: shapes[0] is a 'polygon'; only upright boxes and points"]),
    'LabelMe: a circle': (lambda f: _labelme(f, lambda s: s | {'shape_type': 'circle'}), ["shapes[0] is a 'circle'"]),
    'LabelMe: a rectangle of four points': (lambda f: _labelme(f, lambda s: s | {'points': s['points']*2}), ['shapes[0] is a rectangle with points']),
    'LabelMe: four points askew': (lambda f: _labelme(f, lambda s: s | {'points': [[1, 2], [9, 3], [9, 8], [1, 7]]}), ['shapes[0] is a rectangle with points']),
    'LabelMe: points of text': (lambda f: _labelme(f, lambda s: s | {'points': [['1', '2'], ['3', '4']]}), ['shapes[0] is a rectangle with points']),
    'LabelMe: a shape that is no object': (lambda f: _labelme(f, lambda s: 7), ['a.json: shapes[0] is 7, not an object']),
    'LabelMe: a file of another kind among them': (_bytes(_labelme, 'b.json', '[]'), ['b.json: it is not of LabelMe']),
    'LabelMe: a file that is cut off': (_bytes(_labelme, 'b.json', '{"shapes": ['), ['b.json is not JSON']),
    'Label Studio: a polygon': (lambda f: _studio(f, lambda r: r | {'type': 'polygonlabels', 'value': {'points': [[1, 2]], 'polygonlabels': ['dog']}}), ['task 0, result 0 is of type polygonlabels; only']),
    'Label Studio: a brush': (lambda f: _studio(f, lambda r: r | {'type': 'brushlabels', 'value': {'format': 'rle', 'rle': [1], 'brushlabels': ['dog']}}), ['task 0, result 0 is of type brushlabels']),
    'Label Studio: a rotated box': (lambda f: _studio(f, lambda r: r | {'value': r['value'] | {'rotation': 12}}), ['task 0, result 0 is rotated; only upright boxes']),
    'Label Studio: a turned picture': (lambda f: _studio(f, lambda r: r | {'image_rotation': 90}), ['task 0, result 0 is rotated']),
    'Label Studio: a box without numbers': (lambda f: _studio(f, lambda r: r | {'value': r['value'] | {'x': None}}), ['task 0, result 0 has no numbers for its place']),
    'Label Studio: predictions only': (lambda f: (_json(f/'a.json', [task | {'annotations': [], 'predictions': task['annotations']} for task in _tasks()]), {}), ['none of its 3 task(s) has an annotation; predictions are not read']),
    'Label Studio, JSON-MIN: an outline': (lambda f: (_json(f/'a.json', [{'id': 1, 'image': 'a.png', 'label': [{'points': [[1, 2]], 'labels': ['dog'], 'original_width': 120}]}]), {}), ['task 0, result 0 is of type points; only']),
    'Label Studio: boxes in two pictures of a task': (lambda f: _two_pictures(f), ['task 0 has several pictures (left, right), and it is not known which of them its boxes are in']),
    'Label Studio: tasks without a picture': (lambda f: (_json(f/'a.json', [task | {'data': {'text': 'x'}} for task in _tasks()]), {}), ['task 0 names no picture']),
    'a table with words for numbers': (lambda f: _table(f, rows=[f'{ROW},1,2,3,wide']), ['boxes.csv', 'row 2 of boxes.csv has something that is not a number in xmin, ymin, xmax, ymax']),
    'a table with a corner missing': (lambda f: _table(f, rows=[f'{ROW},1,2,3,']), ['row 2 of boxes.csv has something that is not a number']),
    'a table without a picture in a row': (lambda f: _table(f, rows=[f'{ROW},1,2,3,4', ',120,90,dog,1,2,3,4']), ["row 3 of boxes.csv has '' as filename"]),
    'a table without a column for the picture': (lambda f: _table(f, 'foto,width,height,class,xmin,ymin,xmax,ymax'), ['boxes.csv has boxes and no column for the picture: image=']),
    'a table whose column is misspelt': (lambda f: (_table(f)[0], {'image': 'foto'}), ["has no column 'foto'", 'filename, width']),
    'a table for another picture': (lambda f: _table(f, rows=['a.png,500,90,dog,1,2,3,4']), ["- row 2 of boxes.csv ('a.png'): its boxes are for 500×90 pixels, and the picture has 120×90"]),
    'a label between marks that is a mark': (lambda f: _table(f, rows=['a.png,120,90,<|box_end|>,1,2,3,4']), ["The label '<|box_end|>' contains a mark"]),
}

@pytest.mark.timeout(60)
@pytest.mark.parametrize('make,words', BAD.values(), ids=BAD.keys())
def test_bad_files_are_refused_in_words(make, words, tmp_path):
    source, how = make(tmp_path/'set')
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(ValueError) as refused: read_samples(source, family='qwen2_vl', **how)
    for word in words: assert word in str(refused.value), str(refused.value)
    assert len(str(refused.value)) < 3000 and sorted(tmp_path.rglob('*')) == before

def test_all_faults_come_at_once(tmp_path):
    notes = [note | {'bbox': None} for note in _coco()['annotations']]
    source, how = _coco_file(tmp_path, annotations=notes*1000)
    with pytest.raises(ValueError, match=r'has 3000 box\(es\) or picture\(s\) that cannot be read') as refused: read_samples(source, family='qwen2_vl', **how)
    assert 'annotations[19]' in str(refused.value) and len(str(refused.value)) < 3000

def test_a_picture_that_cannot_be_read_is_a_row_without_boxes_that_can_be_dropped(tmp_path, capsys):
    "As where answers are texts. If none can be read, the folder is wrong, and nothing is read."
    _drawn(tmp_path)
    (tmp_path/'cut.png').write_bytes((tmp_path/'a.png').read_bytes()[:20])
    rows = ['a.png,dog,1,2,3,4', 'gone.png,dog,1,2,3,4', 'cut.png,dog,1,2,3,4']
    (tmp_path/'boxes.csv').write_text('\n'.join(['image,label,xmin,ymin,xmax,ymax', *rows]))
    samples = read_samples(tmp_path/'boxes.csv', family='qwen2_vl')
    said = capsys.readouterr().out
    assert '3 pictures of a table' in said and '2 picture(s) cannot be read' in said and '1 of 3 paths leads nowhere; the first is gone.png' in said
    assert [s.get('output') for s in samples][1:] == ['', ''] and [s.number for s in samples] == [2, 3, 4]
    findings = check_samples(samples)
    assert [*findings[findings.level == 'error'].row] == [1, 2] and drop_samples(samples, findings) == samples[:1]
    (tmp_path/'boxes.csv').write_text('\n'.join(['image,label,xmin,ymin,xmax,ymax', *rows[1:]]))
    with pytest.raises(ValueError, match='has 2 box(.|\n)*media_dir=… names the folder'): read_samples(tmp_path/'boxes.csv', family='qwen2_vl')

def test_faults_of_boxes_and_of_pictures_come_together_each_with_its_place_and_its_cure(tmp_path):
    _drawn(tmp_path)
    (tmp_path/'cut.png').write_bytes((tmp_path/'a.png').read_bytes()[:20])
    rows = ['a.png,dog,1,2,3,4', 'gone.png,dog,1,2,3,4', 'a.png,dog,1,2,3,wide', 'cut.png,dog,1,2,3,4', ',dog,,2,3,4', 'lost.png,dog,1,2,3,wide']
    (tmp_path/'boxes.csv').write_text('\n'.join(['image,label,xmin,ymin,xmax,ymax', *rows]))
    with pytest.raises(ValueError) as refused: read_samples(tmp_path/'boxes.csv', family='qwen2_vl')
    title, *lines, folder = str(refused.value).splitlines()
    assert folder == 'media_dir=… names the folder of the pictures.'
    assert title == f'{tmp_path/"boxes.csv"} has 7 box(es) or picture(s) that cannot be read:'
    nowhere, no_number = 'There is no file {0}. Correct the path, or drop the row.', 'has something that is not a number in xmin, ymin, xmax, ymax.'
    wanted = [(3, f"('gone.png'): {nowhere.format('gone.png')}"), (4, no_number), (5, "('cut.png'): cut.png cannot be read: "), (6, "has '' as image."), (6, no_number),
              (7, f"('lost.png'): {nowhere.format('lost.png')}"), (7, no_number)]
    for line, (row, words) in zip(sorted(lines), wanted, strict=True): assert line.startswith(f'- row {row} of boxes.csv {words}'), line
    assert 'media_dir' not in lines[2] and lines[2].endswith('Save the picture again, or drop the row.')

@pytest.mark.parametrize('make', [_coco_file, _voc, _labelme, _studio])
def test_the_pictures_of_all_tools_are_found_in_media_dir(make, tmp_path):
    source, how = make(tmp_path/'set')
    moved = _made(tmp_path/'moved')
    for picture in [*(tmp_path/'set').rglob('*.png')]: picture.rename(moved/picture.name)
    samples = read_samples(source, family='qwen2_vl', **how | {'media_dir': moved})
    assert sorted(s['images'][0] for s in samples) == sorted(map(str, moved.iterdir()))

def test_a_family_that_is_none_is_refused(tmp_path):
    source, how = _coco_file(tmp_path)
    for family in ('my 7B', '/nowhere/model'):
        with pytest.raises(ValueError, match='neither a model folder nor has it a family'): read_samples(source, family=family, **how)

# --- what is wrong with boxes that can be read

def _boxed(output, **columns): return {'images': ['a.png'], 'instruction': '<image>Where?', 'input': '', 'output': output} | columns

def _as(family, *boxes): return format_boxes([Box('dog', *box) for box in boxes], (640, 428), family)

WRONG = { # name → a sample of a picture of 640×428 pixels, the model, the words, changes of the limits
    'pixels for Qwen3-VL': (_boxed(_as('qwen2_5_vl', (0, 0, 640, 428)).replace('644', '1280')), 'qwen3_vl', 'counts from 0 to 1000: are they pixels?', {}),
    'pixels for Qwen2-VL': (_boxed('<|box_start|>(10,10),(1800,900)<|box_end|>'), 'qwen2_vl', 'counts from 0 to 1000: are they pixels?', {}),
    'fractions': (_boxed('[{"bbox_2d": [0.1, 0.2, 0.3, 1.0], "label": "dog"}]'), 'qwen3_vl', 'fractions of the picture', {}),
    'decimals': (_boxed('[{"bbox_2d": [100.5, 200, 300, 400], "label": "dog"}]'), 'qwen3_vl', 'have decimals', {}),
    'pixels of the picture before it is resized': (_boxed('[{"bbox_2d": [100, 20, 620, 400], "label": "dog"}]'), 'qwen2_5_vl', 'pixels of the resized picture', {'image_max_pixels': 300*200}),
    'thousandths, as the sample says': (_boxed(_as('qwen3_vl', (1, 2, 300, 400)), box_frame=[1000, 1000]), 'qwen2_5_vl', 'are in thousandths, and Qwen2.5-VL writes them in pixels of a picture of 644×420', {}),
    'other pixel limits, as the sample says': (_boxed(_as('qwen2_5_vl', (1, 2, 300, 400)), box_frame=[644, 420]), 'qwen2_5_vl', 'a picture of 308×196, which is what it sees', {'image_max_pixels': 256*256}),
    'marks for a family with JSON': (_boxed(_as('qwen2_vl', (1, 2, 300, 400))), 'qwen3_vl', 'boxes between marks, and Qwen3-VL was trained to write them in JSON', {}),
    'JSON for a family with marks': (_boxed(_as('qwen3_vl', (1, 2, 300, 400))), 'qwen2_vl', 'boxes in JSON, and Qwen2-VL was trained to write them between marks', {}),
    'a size taken for a corner': (_boxed('[{"bbox_2d": [500, 600, 100, 200], "label": "dog"}]'), 'qwen3_vl', 'Taken as x, y, width and height, all', {}),
    'corners in the wrong order': (_boxed('[{"bbox_2d": [900, 600, 800, 700], "label": "dog"}]'), 'qwen3_vl', 'x1 ≥ x2', {}),
    'a box without width': (_boxed('[{"bbox_2d": [900, 600, 900, 700], "label": "dog"}]'), 'qwen3_vl', 'no width', {}),
    'beyond the picture': (_boxed('[{"bbox_2d": [100, 100, 700, 430], "label": "dog"}]', box_frame=[644, 420]), 'qwen2_5_vl', 'reach beyond the picture, whose corner is at (644,420)', {}),
    'before the picture': (_boxed('[{"bbox_2d": [-50, 100, 300, 400], "label": "dog"}]'), 'qwen3_vl', 'reach beyond the picture', {}),
    'a point beyond the picture': (_boxed('[{"point_2d": [100, 1900], "label": "dog"}]', box_frame=[1000, 1000]), 'qwen3_vl', 'reach beyond the picture', {}),
    'the same box twice': (_boxed(_as('qwen3_vl', (1, 2, 300, 400), (1, 2, 300, 400))), 'qwen3_vl', 'in it more than once', {}),
    'malformed boxes': (_boxed('[{"bbox_2d": [1, 2, 3], "label": "dog"}, {"bbox_2d": [1, 2, 300, 400], "label": "dog"}]'), 'qwen3_vl', '1 of its 2 box(es) are malformed', {}),
    'a mark that is not closed': (_boxed('<|box_start|>(1,2),(300,400)'), 'qwen2_vl', '1 of its 1 box(es) are malformed', {}),
    'boxes below a patch': (_boxed(_as('qwen3_vl', (1, 2, 8, 9), (1, 2, 300, 400))), 'qwen3_vl', '1 of its 2 box(es) are smaller than a patch of 16 pixels', {}),
    'boxes that are gone when the picture is scaled': (_boxed(_as('qwen2_vl', (100, 100, 130, 125))), 'qwen2_vl', 'in which all 1 box(es) are smaller than a patch of 14 pixels', {'image_max_pixels': 100*100}),
    'a column box_frame that is none': (_boxed(_as('qwen3_vl', (1, 2, 300, 400)), box_frame=['a', 'b']), 'qwen3_vl', "The box_frame is ['a', 'b'], not [width, height]", {}),
}

@pytest.fixture(scope='module')
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp('picture')/'a.png'
    Image.effect_noise((640, 428), 90).convert('RGB').save(path)
    return str(path)

@pytest.mark.parametrize('sample,model,words,limits', WRONG.values(), ids=WRONG.keys())
def test_wrong_boxes_are_found(sample, model, words, limits, picture):
    found = [fault for _, fault in box_faults(sample, {'a.png': (640, 428)}, model, **limits)]
    assert any(words in fault.what for fault in found), found
    assert all(fault.level in ('warning', 'note') and fault.cure for fault in found) and len({fault.what for fault in found}) == len(found)

@pytest.mark.parametrize('model', families)
def test_sound_boxes_have_no_finding(model, picture):
    right = _boxed(_as(model, (1, 2, 300, 400), (300, 20, 640, 428)), images=[picture])
    assert not box_faults(right, {picture: (640, 428)}, model)
    assert not box_faults(to_boxes(right, model, source=model), {picture: (640, 428)}, model)

def test_the_check_and_the_recipe_name_the_row(picture, tiny, tmp_path):
    right = _boxed(_as('qwen2_vl', (1, 2, 300, 400)), images=[picture])
    wrong = _boxed(_as('qwen3_vl', (1, 2, 300, 400)), images=[picture], instruction='<image>And where is it here?')
    found = check_samples([right, wrong], model=tiny)
    assert list(zip(found.row, found.field, found.level)) == [(1, 'output', 'warning')]
    Registry(tmp_path).add('boxes', [right, wrong])
    found = data_findings({'model_name_or_path': str(tiny), 'dataset': 'boxes', 'dataset_dir': str(tmp_path), 'do_train': True, 'template': 'qwen2_vl'})
    assert [(f.where, f.level) for f in found] == [('boxes', 'warning')] and 'the first is row 1' in found[0].what

def test_llamafactory_trains_on_wrong_boxes_without_a_word(picture, tiny, tmp_path, factory):
    "So no finding about boxes may be an error."
    samples = [sample | {'images': [picture]} for sample, *_ in WRONG.values() if not isinstance((sample.get('box_frame') or [0])[0], str)]
    Registry(tmp_path).add('boxes', [{k: v for k, v in sample.items() if k != 'box_frame'} for sample in samples])
    ids, batches = factory.prepare(tmp_path, 'boxes')
    assert len(ids) == len(samples) and all((batch['labels'] != -100).any() for batch in batches)

def test_a_class_that_occurs_once_is_noted(picture):
    samples = [_boxed(f'[{{"bbox_2d": [1, 2, 300, 400], "label": "{label}"}}]', images=[picture], id=i) for i, label in enumerate(['dog', 'cat', 'cow', 'pig', 'hen']*5 + ['dgo'])]
    found = check_samples(samples, media=False)
    assert [(row, level) for row, level, what in zip(found.row, found.level, found.what) if 'only here' in what] == [(25, 'note')]
    assert not check_samples(samples[:-1], media=False).what.str.contains('only here').any()

def test_pictures_whose_boxes_cannot_be_turned_stay_as_they_are(tmp_path):
    _turned(tmp_path/'photos', 6)
    two = _boxed(_as('qwen3_vl', (1, 2, 30, 40)), images=[str(tmp_path/'photos'/'a.png')])
    many = two | {'images': two['images'] + [str(tmp_path/'photos'/'b.png')], 'instruction': '<image><image>Where?', 'box_frame': [1000, 1000]}
    bad = two | {'output': '[{"bbox_2d": [1], "label": "dog"}]', 'box_frame': [1000, 1000]}
    mended, found = mend_samples([two, many, bad, {k: v for k, v in two.items() if k != 'output'} | {'output': 'A dog.', 'images': [str(tmp_path/'photos'/'c.png')]}])
    assert mended[:3] == [two, many, bad] and mended[3]['images'] != [str(tmp_path/'photos'/'c.png')]
    assert found.row[found.what.str.contains('was not turned')].tolist() == [0, 1, 2]
    assert [p.name for p in (tmp_path/'photos_mended').iterdir()] == ['c.png']
