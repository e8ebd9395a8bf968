"""Scores of boxes, and how boxes are drawn.

What is right is said by others: COCOeval's own matches and precision, trying out every assignment, and counting by hand."""
import html, io, itertools, math, random, re
from contextlib import redirect_stdout
from urllib.parse import unquote
from xml.dom.minidom import parseString

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from qwen2vl_nb.data.boxes import Box, format_boxes
from qwen2vl_nb.model import box_frame
from qwen2vl_nb.data.describe import describe_samples, show_samples
from qwen2vl_nb.prediction.boxes import (average_precision, box_ious, box_measures, box_table, measure_boxes, measure_points, pair_boxes, point_closeness,
                                         point_measures, stated_boxes, stated_points)
from qwen2vl_nb.prediction.scores import compare, score
from qwen2vl_nb.prediction.show import show_predictions

NAMES = 'car', 'bus', 'truck'
FORMS = 'qwen2_vl', 'qwen2_5_vl', 'qwen3_vl'

@st.composite
def boxes(draw, most=6):
    "Boxes that often overlap."
    corner, side = st.integers(0, 30), st.integers(1, 20)
    found = draw(st.lists(st.tuples(st.sampled_from(NAMES[:2]), corner, corner, side, side), max_size=most))
    return [Box(name, x, y, x + w, y + h) for name,x,y,w,h in found]

def _iou(a, b):
    "The IoU of two boxes with whole coordinates, by counting unit squares."
    squares = lambda box: {(x, y) for x in range(int(box.x1), int(box.x2)) for y in range(int(box.y1), int(box.y2))}
    a, b = squares(a), squares(b)
    return len(a & b)/len(a | b)

def _assignments(n, m):
    "Every way to pair some of n things with some of m."
    for k in range(min(n, m) + 1):
        for some in itertools.combinations(range(n), k):
            for others in itertools.permutations(range(m), k): yield list(zip(some, others))

@settings(max_examples=150, deadline=None)
@given(boxes(4), boxes(4))
def test_the_iou_is_that_of_counted_squares(labels, answers):
    found = box_ious(labels, answers)
    assert found.shape == (len(labels), len(answers))
    for (i, a), (j, b) in itertools.product(enumerate(labels), enumerate(answers)):
        assert found[i, j] == pytest.approx(_iou(a, b) if a.label == b.label else 0)

@settings(max_examples=150, deadline=None)
@given(boxes(4), boxes(4), st.sampled_from([0, .5, .75]))
def test_no_other_assignment_is_better(labels, answers, at):
    ious = box_ious(labels, answers)
    found = pair_boxes(ious, at)
    assert len({i for i,*_ in found}) == len({j for _,j,_ in found}) == len(found), 'each box is used once'
    assert all(iou == ious[i, j] and iou >= at and labels[i].label == answers[j].label for i,j,iou in found)
    worth = lambda values: (len(values) if at else 0, round(sum(values), 9))
    best = max(worth([ious[i, j] for i,j in pairs if ious[i, j] >= at and ious[i, j] > 0]) for pairs in _assignments(*ious.shape))
    assert worth([iou for *_,iou in found]) == best

@settings(max_examples=100, deadline=None)
@given(boxes(), boxes(), st.floats(.01, 1000), st.floats(.01, 1000), st.randoms())
def test_neither_units_nor_order_matter(labels, answers, x, y, chance):
    scaled = lambda found: [Box(b.label, b.x1*x, b.y1*y, b.x2*x, b.y2*y) for b in chance.sample(found, len(found))]
    assert measure_boxes(scaled(labels), scaled(answers)) == pytest.approx(measure_boxes(labels, answers))

@settings(max_examples=100, deadline=None)
@given(boxes(), boxes())
def test_measures_are_shares_and_perfect_only_for_the_label(labels, answers):
    found = measure_boxes(labels, answers)
    assert all(0 <= value <= 100 + 1e-9 for value in found) and found[3] <= found[2]
    assert measure_boxes(labels, labels) == pytest.approx((100,)*4)
    key = lambda box: (box.label, *box.coordinates)
    is_same = sorted(map(key, labels)) == sorted(map(key, answers))
    assert (found[1] > 100 - 1e-9 and len(labels) == len(answers)) == is_same

def _coco(rows, names, at=None):
    "COCOeval on all classes at once, as its users call it."
    listed = lambda k: [{'image_id': i, 'category_id': names.index(b.label) + 1, 'bbox': [b.x1, b.y1, b.x2 - b.x1, b.y2 - b.y1],
                         'area': (b.x2 - b.x1)*(b.y2 - b.y1), 'iscrowd': 0, 'score': 1.} for i,row in enumerate(rows) for b in row[k]]
    coco = COCO()
    coco.dataset = {'images': [{'id': i} for i in range(len(rows))], 'categories': [{'id': k + 1} for k in range(len(names))],
                    'annotations': [a | {'id': k + 1} for k,a in enumerate(listed(0))]}
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
        found = COCOeval(coco, coco.loadRes(listed(1)), 'bbox')
        found.evaluate()
        found.accumulate()
        found.summarize()
    return found

def _random_rows(n, chance, jitter=4):
    def one():
        labels = [Box(chance.choice(NAMES), x := chance.randint(0, 200), y := chance.randint(0, 200), x + chance.randint(20, 90), y + chance.randint(20, 90))
                  for _ in range(chance.randint(1, 6))]
        moved = lambda b: Box(b.label, *(v + chance.gauss(0, jitter) for v in b.coordinates))
        answers = [moved(b) for b in labels if chance.random() < .9]
        if chance.random() < .3: answers.append(Box(chance.choice(NAMES), 5, 5, 60, 60))
        return labels, answers
    return [one() for _ in range(n)]

@pytest.mark.parametrize('seed', range(3))
def test_average_precision_is_cocoevals(seed):
    rows = _random_rows(60, random.Random(seed))
    theirs, ours = _coco(rows, list(NAMES)), average_precision(rows, list(NAMES))
    assert ours.mean(0) == pytest.approx(100*theirs.stats[:3])
    by_class = theirs.eval['precision'][:, :, :, 0, 2].mean((0, 1))
    assert ours[:, 0] == pytest.approx(100*by_class)
    table = box_table(rows)
    assert table.loc['(all)', ['ap', 'ap_50', 'ap_75']].tolist() == pytest.approx(100*theirs.stats[:3])

@pytest.mark.parametrize('seed', range(3))
def test_as_many_boxes_are_right_as_cocoeval_matches(seed):
    "COCOeval takes one box after the other and can miss a pair, but never finds more than the best assignment."
    rows = _random_rows(80, random.Random(seed))
    theirs, table = _coco(rows, list(NAMES)), box_table(rows)
    found = [e for e in theirs.evalImgs if e and e['aRng'] == [0, 1e10]]
    for k,column in ((0, 'f1'), (5, 'f1_75')):
        right = sum((e['dtMatches'][k] > 0).sum() for e in found)
        line = table.loc['(all)']
        ours = line[column]*(line.support + line.predicted)/200
        assert right <= ours + 1e-9 and ours <= 1.02*right
    apart = _random_rows(80, random.Random(seed), jitter=0)
    assert box_table([(a, [*dict.fromkeys(map(repr, a))] and a) for a,_ in apart]).f1.tolist() == [100]*4

@pytest.mark.parametrize('seed', range(3))
def test_without_confidences_ap_lies_between_precision_times_recall_and_recall(seed):
    rows = _random_rows(60, random.Random(seed), jitter=9)
    for _ in range(5):
        random.Random(seed).shuffle(rows)
        table = box_table(rows).drop('(all)')
        recall, low = table.recall, table.precision*table.recall/100
        assert (table.ap_50 >= low - 3).all() and (table.ap_50 <= recall + 1).all(), 'COCOeval looks at a hundred and one recalls'
        assert (table.ap <= table.ap_50 + 1e-9).all()

# Through score

def _row(i, labels, answers, family='qwen3_vl', **more):
    text = lambda found: format_boxes(found, (1000, 1000), family)
    return {'id': i, 'row': i, 'images': [], 'prompt': '<image>?', 'label': text(labels), 'predict': text(answers)} | more

CAR, BUS = Box('car', 100, 100, 300, 200), Box('bus', 500, 100, 900, 300)

def _moved(box, x): return Box(box.label, box.x1 + x, box.y1, box.x2 + x, box.y2)

@pytest.mark.parametrize('family', FORMS)
def test_by_hand(family):
    rows = [_row(0, [CAR, BUS], [CAR, _moved(BUS, 100)], family),       # IoU 1 and 300/500
            _row(1, [CAR], [_moved(CAR, 100)], family),                 # 100/300
            _row(2, [BUS], [], family),
            _row(3, [CAR], [CAR], family) | {'predict': 'A car, on the left.'},
            _row(4, [CAR], [CAR], family) | {'predict': None, 'error': 'broken'},
            _row(5, [], [], family), _row(6, [], [CAR], family)]
    found = score(rows)
    assert found.rows['boxes.parsed'].tolist() == [100, 100, 100, 0, 0, 100, 100]
    assert found.rows['boxes.iou'].tolist() == pytest.approx([80, 100/3, 0, 0, 0, 100, 0], abs=.3)
    assert found.rows['boxes.f1'].tolist() == pytest.approx([100, 0, 0, 0, 0, 100, 0])
    assert found.rows['boxes.f1_75'].tolist() == pytest.approx([50, 0, 0, 0, 0, 100, 0])
    table = found.boxes
    assert table.index.tolist() == ['car', 'bus', '(all)']
    assert table[['support', 'predicted']].values.tolist() == [[4, 3], [2, 1], [6, 4]]
    assert table.precision.tolist() == pytest.approx([100/3, 100, 50])
    assert table.recall.tolist() == pytest.approx([25, 50, 100/3])
    assert table.f1.tolist() == pytest.approx([200/7, 200/3, 40])
    assert table.f1_75.tolist() == pytest.approx([200/7, 0, 20])
    assert table.iou.tolist() == pytest.approx([100*(4/3)/4, 30, 100*(4/3 + .6)/6], abs=.3)
    pd.testing.assert_frame_equal(found.fields, table)

@pytest.mark.parametrize('begun', ['<|box_start|>(44,2,44444(50,55)<|box_end|>', '<|box_start|>(100,100),(300', '[{"bbox_2d": [100, 100, 300', '[{"bbox_2d": [1, 2, 3], "label": "car"}]'])
def test_an_answer_that_begins_a_box_and_states_none_is_not_parsed(begun):
    rows = [_row(0, [CAR], [CAR]), *(_row(i, labels, []) | {'predict': begun} for i, labels in ((1, [CAR]), (2, [])))]
    found = score(rows)
    assert found.rows[[*box_measures]].values.tolist() == [[100]*4, [0]*4, [0]*4]
    assert found.boxes.predicted.tolist() == [1, 1] and show_predictions(rows)._repr_html_().count('✗ wrong') == 2
    rows[1] |= {'predict': f"{rows[0]['label']} {begun}"}
    assert score(rows).rows['boxes.f1'].tolist() == [100, 100, 0], 'a malformed box after another is left out'
    rows[1] |= {'label': begun, 'predict': '[]'}
    assert score(rows).rows['boxes.parsed'].tolist() == [100, 100, 0], 'a label without a box that can be read has no boxes'

def test_a_wrong_name_is_a_missing_and_an_unwanted_box():
    found = score([_row(0, [CAR, CAR], [Box('truck', *CAR.coordinates), CAR])]*2)
    assert found['boxes.f1'] == found['boxes.iou'] == 50
    assert found.boxes.loc['car', ['precision', 'recall']].tolist() == [100, 50]
    assert found.boxes.loc['(all)', ['precision', 'recall']].tolist() == [50, 50]

def test_intervals_shrink_with_the_root_of_the_number_of_pictures():
    chance = random.Random(0)
    def rows(n): return [_row(i, [CAR, BUS], [CAR, BUS] if chance.random() < .6 else []) for i in range(n)]
    widths = {}
    for n in (100, 1600):
        found = score(rows(n))
        line, table = found.overall.loc['boxes.f1'], found.boxes.loc['(all)']
        assert line.low < line.value < line.high and table.f1_low < table.f1 < table.f1_high
        widths[n] = np.array([line.high - line.low, table.f1_high - table.f1_low])
    assert widths[100]/widths[1600] == pytest.approx([4, 4], rel=.35)

def test_the_interval_draws_pictures_not_boxes():
    "Twenty boxes in one picture, all right or all missed together, tell no more than one."
    chance = random.Random(1)
    right = [chance.random() < .5 for _ in range(200)]
    few = score([_row(i, [CAR], [CAR] if ok else []) for i,ok in enumerate(right)]).boxes.loc['(all)']
    crowd = [Box('car', 10*k, 0, 10*k + 9, 9) for k in range(20)]
    many = score([_row(i, crowd, crowd if ok else []) for i,ok in enumerate(right)]).boxes.loc['(all)']
    assert many.support == 20*few.support and [many.f1_low, many.f1_high] == pytest.approx([few.f1_low, few.f1_high])

def test_all_right_does_not_mean_certain():
    table = score([_row(i, [CAR], [CAR]) for i in range(50)]).boxes
    assert table.f1.tolist() == [100, 100] and table.f1_high.tolist() == [100, 100] and (table.f1_low < 94).all()

def test_by_and_compare():
    rows = [_row(i, [CAR, BUS], [CAR] if i % 2 else [CAR, BUS], camera='ab'[i % 2]) for i in range(40)]
    by = score(rows).by('camera')
    assert by.index.tolist() == ['b', 'a'] and by['boxes.f1', 'value'].tolist() == pytest.approx([200/3, 100])
    better = compare(rows, [row | {'predict': row['label']} for row in rows[::-1]], 'boxes.iou')
    assert (better.before, better.after, len(better.worse)) == (75, 100, 0) and better.p < .01
    assert better.test == 'exact McNemar' or better.difference['low'] > 0

def test_labels_that_are_not_all_boxes_get_no_measures_of_boxes():
    rows = [_row(0, [CAR], [CAR]), _row(1, [CAR], [CAR]) | {'label': 'A red car.'}]
    for some in (rows, [_row(0, [], [])]*2, [dict(id=0, label='{"point_2d": [1, 2], "label": "a"}', predict='')]*2):
        found = score(some)
        assert not {*box_measures} & found.keys()
        with pytest.raises(ValueError, match='The labels are not boxes'): found.boxes

MARKED = '<|object_ref_start|>car<|object_ref_end|><|box_start|>{}<|box_end|>'
ODD = [None, '', ' \n', 'no', '[]', '{}', '[[]]', 'null', 'NaN', '[null]', '[1, 2, 3, 4]', '{"bbox_2d": [100, 100, 300, 200]}',
       '[{"bbox_2d": [100, 100, 300, 200], "label": "car"}', '```json\n[{"bbox_2d": [100, 100, 300, 200], "label": "car"}]\n```',
       '[{"bbox_2d": [300, 200, 100, 100], "label": "car"}]', '[{"bbox_2d": [1, 1, 1, 1], "label": "car"}]',
       '[{"bbox_2d": [1e308, 1e308, -1e308, 5], "label": "car"}]', '[{"bbox_2d": [1e999, 0, 1, 1]}]', '[{"bbox_2d": [NaN, 0, 1, 1]}]',
       '[{"bbox_2d": [-5, -5, 5, 5], "label": "car"}]', '[{"bbox_2d": [100.5, 100.25, 300.125, 200], "label": "car"}]',
       '[{"bbox_2d": ["100", 100, 300, 200], "label": "car"}]', '[{"bbox_2d": [true, false, true, true]}]', '[{"bbox_2d": null}]',
       '[{"bbox_2d": {}}]', '[{"bbox_2d": [[1, 2], [3, 4]]}]', '[{"bbox_2d": [1, 2, 3]}]', '[{"bbox_2d": [1, 2, 3, 4, 5]}]',
       '[{"bbox_2d": [], "label": []}]', '[{"bbox_2d": [1, 2, 3, 4], "label": null}]', '[{"bbox_2d": [1, 2, 3, 4], "label": ["car"]}]',
       '[{"bbox_2d": [1, 2, 3, 4], "label": {"a": 1}}]', '[{"bbox_2d": [1, 2, 3, 4], "label": 7}]', '[{"bbox_2d": [1, 2, 3, 4], "label": ""}]',
       '[{"bbox_2d": [1, 2, 3, 4], "label": "\\ud83d"}]', '[{"bbox_2d": [1, 2, 3, 4], "label": "\\u0000"}]',
       '[{"bbox_2d": [1, 2, 3, 4], "label": "(all)"}]', '[{"bbox_2d": [1, 2, 3, 4], "label": "</svg><script>alert(1)</script>"}]',
       '[{"bbox_2d": [1, 2, 3, 4], "label": "' + 'car'*900 + '"}]', '[{"point_2d": [5, 5], "label": "car"}]',
       '[{"point_2d": [5], "label": "car"}]', '[{"bbox_2d": [1, 2, 3, 4], "point_2d": [1, 2]}]', "[{'bbox_2d': [1, 2, 3, 4]}]",
       '{"bbox_2d":'*1500, '['*2000, '{"a":'*2000, '[{"bbox_2d": [' + '9'*400 + ', 1, 2, 3]}]', '[{"bbox_2d": [1, 2, 3, 4]}]'*500,
       '[' + ', '.join(['{"bbox_2d": [100, 100, 300, 200], "label": "car"}']*400) + ']',
       MARKED.format('(100,100),(300,200)'), MARKED.format('(100,100)'), MARKED.format(''), MARKED.format('(a,b),(c,d)'),
       MARKED.format('(100,100),(300,200),(5,5)'), MARKED.format('(-100,100),(300,200)'), MARKED.format('(1e5,1),(2,3)'),
       MARKED.format('(99999999999999999999,1),(2,3)'), MARKED.format('(１,２),(３,４)'), MARKED.format('(1.5,2),(3,4.25)'),
       MARKED.format('(100,100),(300,200)')[:-4], MARKED.format('(100,100),(300,200)')*60, '<|box_start|>'*900, '<|box_end|><|box_start|>',
       '<|object_ref_start|>'*500 + MARKED.format('(1,2),(3,4)'), '<|object_ref_start|>一辆车\u202e<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>',
       'A car at (100,100),(300,200).', '<box>100 100 300 200</box>', '\u0000', '\ud800 [{"bbox_2d": [1, 2, 3, 4]}]'.replace('\ud800', '\ufffd')]

@pytest.mark.parametrize('family', FORMS)
def test_odd_answers_never_raise(family, tmp_path):
    assert len(ODD) >= 60
    Image.new('RGB', (100, 80)).save(picture := tmp_path/'a.png')
    rows = [_row(i, [CAR, BUS], [], family, images=[str(picture)], box_frame=[1000, 1000]) | {'predict': text} for i,text in enumerate(ODD)]
    found = score(rows)
    assert np.isfinite(found.rows[[*box_measures]].to_numpy()).all() and found.rows[[*box_measures]].to_numpy().max() <= 100 + 1e-9
    numbers = found.boxes.to_numpy(float)
    assert np.isfinite(numbers[:, 3:]).all() and np.nanmax(numbers[:, 2:]) <= 100 + 1e-9, 'only precision can be unknown'
    page = show_predictions(rows, n=len(rows))._repr_html_()
    assert '<script' not in page and page.count('data:image/svg+xml') == len(rows)
    for uri in re.findall(r'"data:image/svg\+xml,([^"]*)"', page): parseString(unquote(html.unescape(uri)))

@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from('[]{}<|>box_2d":,(1234567890) \nstartendlabel'), max_size=60), st.sampled_from(ODD[3:12]))
def test_texts_of_the_same_signs_never_raise(text, more):
    for answer in (text, f'{more}{text}', MARKED.format(text), f'[{{"bbox_2d": [{text}], "label": "car"}}]'):
        values = measure_boxes([CAR], stated_boxes(answer))
        assert all(0 <= value <= 100 for value in values)

def test_thousands_of_names_are_phrases_not_classes():
    rows = [_row(i, [Box(f'the car number {i}', 1, 2, 30, 40)], [Box(f'the car number {i}', 1, 2, 30, 40)]) for i in range(2100)]
    table = box_table((stated_boxes(row['label']), stated_boxes(row['predict'])) for row in rows)
    assert len(table) == 2101 and table.ap.isna().all() and table.f1['(all)'] == 100

# Points

@st.composite
def points(draw, most=5):
    place = st.integers(0, 100)
    return [Box(name, x, y) for name,x,y in draw(st.lists(st.tuples(st.sampled_from(NAMES[:2]), place, place), max_size=most))]

@settings(max_examples=150, deadline=None)
@given(points(4), points(4))
def test_points_are_as_far_apart_as_measured_and_no_other_assignment_is_better(labels, answers):
    close = point_closeness(labels, answers, 100)
    for (i, a), (j, b) in itertools.product(enumerate(labels), enumerate(answers)):
        assert close[i, j] == pytest.approx(max(0, 1 - math.dist(a.coordinates, b.coordinates)/100)*(a.label == b.label))
    near = lambda pairs, bound: sum(math.dist(labels[i].coordinates, answers[j].coordinates) <= bound and labels[i].label == answers[j].label for i,j in pairs)
    parsed, _, f1, f1_2 = measure_points(labels, answers, 100)
    for value, bound in ((f1, 5), (f1_2, 2)):
        most, n = max(near(pairs, bound) for pairs in _assignments(len(labels), len(answers))), len(labels) + len(answers)
        assert value == pytest.approx(200*most/n if n else 100)

@settings(max_examples=100, deadline=None)
@given(points(), points(), st.floats(.01, 1000), st.randoms())
def test_points_are_scored_alike_in_all_units_and_orders(labels, answers, unit, chance):
    scaled = lambda found: [Box(p.label, p.x1*unit, p.y1*unit) for p in chance.sample(found, len(found))]
    found = measure_points(labels, answers, 100)
    assert measure_points(scaled(labels), scaled(answers), 100*unit) == pytest.approx(found)
    assert all(0 <= value <= 100 + 1e-9 for value in found) and found[3] <= found[2] and measure_points(labels, labels, 100) == pytest.approx((100,)*4)

DOOR, LAMP = Box('door', 200, 500), Box('lamp', 800, 500)

@pytest.mark.parametrize('family', FORMS)
def test_points_by_hand(family, tmp_path):
    "In a picture of 1000 times 1000, which Qwen2.5-VL sees at another size."
    Image.new('RGB', (1000, 1000)).save(picture := tmp_path/'a.png')
    moved = lambda point, x: Box(point.label, point.x1 + x, point.y1)
    rows = [_row(0, [DOOR, LAMP], [LAMP, moved(DOOR, 30)], family), _row(1, [DOOR], [moved(DOOR, 80)], family), _row(2, [LAMP], [], family),
            _row(3, [LAMP], [Box('door', 800, 500)], family), _row(4, [DOOR], [DOOR, LAMP], family), _row(5, [DOOR], [DOOR], family) | {'predict': None, 'error': 'broken'}]
    rows = [row | {'images': [str(picture)], 'box_frame': [*box_frame(1000, 1000, family)]} for row in rows]
    found = score(rows)
    assert found.rows['points.parsed'].tolist() == [100, 100, 100, 100, 100, 0]
    assert found.rows['points.near'].tolist() == pytest.approx([98.5, 92, 0, 0, 100, 0], abs=.2)
    assert found.rows['points.f1'].tolist() == pytest.approx([100, 0, 0, 0, 200/3, 0])
    assert found.rows['points.f1_2'].tolist() == pytest.approx([50, 0, 0, 0, 200/3, 0])
    assert not {*box_measures} & found.keys() and found.by('id').index[0] in (1, 2, 3, 5)
    better = compare(rows, [row | {'predict': row['label']} for row in rows], 'points.f1')
    assert better.after == 100 and not better.worse
    page = show_predictions(rows, n=6)._repr_html_()
    assert page.count('✓ right') == 1 and page.count('✗ wrong') == 4, 'a point near enough is right'
    assert 'IoU' not in page and 'IoU' in show_predictions([_row(0, [CAR], [BUS], images=[str(picture)], box_frame=[1000, 1000])])._repr_html_()

def test_points_in_unknown_coordinates_are_not_scored():
    rows = [_row(0, [DOOR], [DOOR]), _row(1, [DOOR], [LAMP])]
    found = score(rows)
    assert not {*point_measures} & found.keys() and 'give the rows a column box_frame' in repr(found) and 'exact' in found
    assert score([row | {'box_frame': [1000, 1000]} for row in rows])['points.f1'] == 50
    assert score([_row(0, [DOOR], [DOOR], 'qwen2_vl')])['points.f1'] == 100, 'special tokens always mean 0 to 1000'
    both = _row(2, [CAR, DOOR], [CAR, DOOR])
    assert score([both])['boxes.f1'] == 100 and 'points.f1' not in score([both]) and '✓' in show_predictions([both])._repr_html_()
    assert score([both | {'box_frame': [1000, 1000]}])['points.f1'] == 100

@pytest.mark.parametrize('frame', [[0, 5], [-1, 5], [1000], '1000', {'a': 1}, [None, 5], ['a', 'b'], [float('nan'), 5], [10**400, 5], [[1], [2]], True])
def test_odd_frames_and_odd_answers_never_raise(frame):
    assert 'points.f1' not in score([_row(0, [DOOR], [DOOR], box_frame=frame)])
    found = score([_row(i, [DOOR, LAMP], [], box_frame=[1000, 1000]) | {'predict': text} for i,text in enumerate(ODD)])
    numbers = found.rows[[*point_measures]].to_numpy()
    assert np.isfinite(numbers).all() and numbers.min() >= 0 and numbers.max() <= 100 and all(stated_points(text) is None or stated_boxes(text) is not None for text in ODD)

# Seen

def _drawn(page):
    "The SVG pictures of a page."
    return [parseString(unquote(html.unescape(uri))) for uri in re.findall(r'"data:image/svg\+xml,([^"]*)"', page)]

def _rects(svg): return [r for r in svg.getElementsByTagName('rect') if r.getAttribute('stroke') != '#fff']

@pytest.mark.parametrize('family', FORMS)
def test_boxes_are_drawn_where_they_are(family, tmp_path):
    size = 480, 320
    Image.new('RGB', size, 'gray').save(picture := tmp_path/'a.png')
    box = Box('a <b>bus</b> & car', 120, 80, 360, 240)
    sample = {'images': [str(picture)], 'instruction': '<image>?', 'output': format_boxes([box], size, family)}
    page = show_samples([sample], family=family)._repr_html_()
    svg, = _drawn(page)
    rect, = _rects(svg)
    width, height = (float(svg.documentElement.getAttribute(name)) for name in ('width', 'height'))
    assert (width, height) == (240, 160)
    place = [float(rect.getAttribute(name)) for name in ('x', 'y', 'width', 'height')]
    assert place == pytest.approx([60, 40, 120, 80], abs=1) and rect.getAttribute('stroke-dasharray')
    assert svg.getElementsByTagName('text')[0].firstChild.data == 'a <b>bus</b> & car' and '<b>bus' not in page
    described = describe_samples([sample | {'box_frame': [*box_frame(*size, family)]}])._repr_svg_()
    assert 'centers of the boxes' in described and '1.0 boxes per row' in described and ' answers' not in described

def test_answers_are_drawn_with_their_iou_and_can_be_told_from_labels(tmp_path):
    Image.new('RGB', (100, 100)).save(picture := tmp_path/'a.png')
    row = _row(0, [CAR, BUS], [_moved(CAR, 100), Box('truck', *BUS.coordinates)], 'qwen2_vl', images=[str(picture)])
    svg, = _drawn(show_predictions([row])._repr_html_())
    assert [t.firstChild.data for t in svg.getElementsByTagName('text')] == ['car', 'bus', 'car 0.33', 'truck 0.00']
    rects = _rects(svg)
    assert [bool(r.getAttribute('stroke-dasharray')) for r in rects] == [True, True, False, False]
    assert len({r.getAttribute('stroke') for r in rects}) == 2

def test_nothing_is_drawn_that_is_not_understood(tmp_path):
    Image.new('RGB', (100, 100)).save(picture := tmp_path/'a.png')
    row = _row(0, [CAR], [CAR], images=[str(picture)])
    for unclear in (row, row | {'box_frame': 5}, row | {'box_frame': [1000, 1000], 'images': [str(picture)]*2}):
        assert not _drawn(show_predictions([unclear])._repr_html_())
    assert _drawn(show_predictions([row | {'box_frame': [1000, 1000]}])._repr_html_())
    assert math.isclose(score([row])['boxes.iou'], 100), 'what is not drawn is scored all the same'
    gone = show_predictions([row | {'box_frame': [1000, 1000], 'images': [str(tmp_path/'gone.png')]}])._repr_html_()
    assert 'FileNotFoundError' in gone and not _drawn(gone)

def test_a_colour_blind_reader_sees_two_colours():
    from qwen2vl_nb.display import ANSWER, LABEL
    channels = lambda colour: np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)])/255
    linear = lambda c: np.where(c <= .04045, c/12.92, ((c + .055)/1.055)**2.4)
    luminance = [linear(channels(c)) @ [.2126, .7152, .0722] for c in (LABEL, ANSWER)]
    assert (max(luminance) + .05)/(min(luminance) + .05) > 2, 'they differ in lightness, too'
    # dichromats without red or green cones see differences between blue and yellow
    yellowness = [channels(c)[:2].mean() - channels(c)[2] for c in (LABEL, ANSWER)]
    assert yellowness[0] < -.2 and yellowness[1] > .4

def test_the_recipe_of_a_prediction_says_whose_boxes_they_are(tmp_path):
    Image.new('RGB', (100, 100)).save(picture := tmp_path/'a.png')
    class Given(list): output_dir = tmp_path
    def drawn(recipe):
        (tmp_path/'recipe.yaml').write_text(recipe)
        return len(_drawn(show_predictions(Given([_row(0, [CAR], [CAR], images=[str(picture)])]))._repr_html_()))
    assert drawn('model_name_or_path: Qwen/Qwen3-VL-8B-Instruct') == 1
    assert drawn('model_name_or_path: Qwen/Qwen2.5-VL-3B-Instruct\nimage_max_pixels: 9000') == 1
    for odd in ('model_name_or_path: /dev/zero', 'model_name_or_path: 5', '[1]', '', 'model_name_or_path: ' + 'x'*5000, 'model_name_or_path: "a\\0b"',
                'model_name_or_path: Qwen/Qwen2.5-VL-3B-Instruct\nimage_max_pixels: -1\nimage_min_pixels: 0'):
        assert drawn(odd) in (0, 1), 'it raises nothing'
