"Whatever rows people bring: what passes the check, passes LLaMA-Factory; what is written, is read again."
import os, tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, event, given, settings, strategies as st
from PIL import Image

from qwen2vl_nb.data.check import check_samples
from qwen2vl_nb.data.sources import read_samples
from qwen2vl_nb.data.write import write_samples
from qwen2vl_nb.data.registry import Registry

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "Sound and unsound pictures, by name."
    folder = tmp_path_factory.mktemp('pictures')
    for name, mode, size in [('rgb.png', 'RGB', (60, 40)), ('clear.png', 'RGBA', (50, 50)), ('print.jpg', 'CMYK', (64, 30)), ('grey.png', 'I;16', (40, 40)),
                             ('dot.png', 'L', (1, 1)), ('long.png', 'RGB', (900, 3)), ('thread.bmp', '1', (700_000, 1)), ('palette.gif', 'P', (33, 90))]:
        Image.new(mode, size).save(folder/name)
    whole = (folder/'rgb.png').read_bytes()
    (folder/'cut.png').write_bytes(whole[:60])
    (folder/'page.jpg').write_text('<html>')
    (folder/'empty.png').touch()
    return sorted(map(str, folder.iterdir())) + [str(folder/'gone.png'), str(folder)]

IMAGE_PAD = 384  # in the tiny model's vocabulary, see its config.json
CALLS = ['{"name": "look", "arguments": {}}', '[{"name": "look", "arguments": {"at": 1}}]', '{"name": "look"}', '{"a": 1}', '5', 'null', '"a"', '[1]', '[]', 'look()']
PIECES = ['<image>', '<video>', '<|im_end|>', '<|image_pad|>', '<|vision_start|>', '\ufeff', '\0', '\n', '{{content}}', '007', '2024-01-02', '[]', '红色', '😀', '\ud83d']
text = st.lists(st.sampled_from(PIECES) | st.text(max_size=12), max_size=3).map(''.join)
good_text = st.text(st.characters(exclude_categories=['Cs', 'Cc']), min_size=1, max_size=12).map(lambda t: 'a' + t.replace('<', ''))
spiced = st.builds(str.__add__, good_text, st.sampled_from(PIECES))
odd = st.one_of(st.none(), st.integers(-5, 5), st.lists(st.integers(), max_size=2), text)
values = st.one_of(text, st.integers(-9, 9), st.booleans(), st.none(), st.lists(text, max_size=2), st.floats(), st.dictionaries(text, text, max_size=2))

@st.composite
def media(draw, pictures): return draw(st.lists(st.sampled_from(pictures), max_size=2))

@st.composite
def rows_of(draw, pictures, sound, extras=values):
    "A few rows of one form; sound ones have tags for their pictures and text for text."
    words, paths = (good_text if sound else st.one_of(good_text, spiced, spiced, odd)), [p for p in pictures if not sound or Path(p).name in ('rgb.png', 'clear.png', 'print.jpg')]
    def row():
        image = draw(media(paths))
        ask = lambda tags: draw(words) if not sound and draw(st.integers(0, 4)) == 0 else '<image>'*tags + str(draw(words))
        rest = draw(st.fixed_dictionaries({}, optional={'id': st.integers(0, 3), 'extra': extras, 'system': words} | (
            {} if sound else {'tools': st.sampled_from(['[]', '[{"name": "look"}]', '[{"type": "function", "function": {"name": "look"}}]', *CALLS, 7, None]), 'history': st.lists(st.lists(words, min_size=1, max_size=3), max_size=2) | odd}
        )))
        if dialogues:
            roles = ['user', 'assistant']*draw(st.integers(1, 2)) if sound else ['user', 'function_call', 'observation', 'assistant'] if draw(st.booleans()) else draw(st.lists(st.sampled_from(['user', 'assistant', 'user', 'assistant', 'system', 'tool', 'observation', 'function_call']), max_size=4))
            return rest | {'images': image, 'messages': [{'role': r, 'content': draw(st.sampled_from(CALLS)) if r == 'function_call' else ask(len(image) if i == 0 else 0)} for i, r in enumerate(roles)]}
        return rest | {'images': image, 'instruction': ask(len(image)), 'input': draw(st.just('') | words), 'output': draw(words)}
    dialogues = draw(st.booleans())
    return [row() for _ in range(draw(st.integers(1, 5)))]

def _sound_rows(rows, tiny):
    "The rows that are left when those with errors are dropped."
    while rows:
        found = check_samples(rows, model=tiny)
        wrong = set(found[found.level == 'error'].row)
        if not wrong: return rows
        rows = [r for i, r in enumerate(rows) if i not in wrong]
    return rows

def _pads(batch): return int((batch['input_ids'] == IMAGE_PAD).sum())

few = settings(max_examples=int(os.environ.get('EXAMPLES', 100)), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

@few
@given(data=st.data())
def test_what_passes_the_check_passes_llamafactory(data, pictures, tiny, factory):
    rows = _sound_rows(data.draw(rows_of(pictures, data.draw(st.booleans()))), tiny)
    event(f'{len(rows)} rows')
    assume(rows)
    with tempfile.TemporaryDirectory() as folder:
        Registry(folder).add('rows', rows)
        ids, batches = factory.prepare(folder, 'rows')
        assert len(ids) == len(rows) and sum(len(b['input_ids']) for b in batches) == len(rows)
        assert all(_pads(b) == int(b['image_grid_thw'].prod(1).sum())//4 for b in batches), 'as many image tokens as the model makes features'

@few
@given(data=st.data())
def test_read_write_read_is_the_identity(data, pictures):
    rows = data.draw(rows_of(pictures, True, good_text))
    with tempfile.TemporaryDirectory() as folder:
        write_samples(rows, Path(folder)/'rows.json', media_dir=folder)
        assert read_samples(Path(folder)/'rows.json') == rows
