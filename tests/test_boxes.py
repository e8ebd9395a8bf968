"Boxes: from one family's form to another's and back, out of the files that annotation tools write, and what is wrong with either."
from hypothesis import given, strategies as st
from PIL import Image

from qwen2vl_nb.data.boxes import Box, count_boxes, format_boxes, parse_boxes, to_boxes
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

@given(sizes, st.sampled_from([*families]), limits, st.data())
def test_boxes_come_back_exact_to_rounding(size, family, limits, data):
    boxes = data.draw(boxes_in(size))
    text, frame = format_boxes(boxes, size, family, **limits), box_frame(*size, family, **limits)
    again = parse_boxes(text, size, family, **limits)
    assert count_boxes(text) == (len(boxes), 0)
    assert _near(boxes, again, [.5*side/unit for side, unit in zip(size, frame)])
    assert format_boxes(again, size, family, **limits) == text  # and nothing drifts

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
