"Files of a prediction that somebody has edited, cut or exchanged: what is damaged is named, its rows are asked again, and nothing is lost without a word."
import json, os, re, shutil, subprocess, sys, warnings

import pytest

from qwen2vl_nb.prediction.rows import missing, parse_row, put_in_order, set_damaged_aside
from qwen2vl_nb.boot import script
from qwen2vl_nb.files import Damaged
from qwen2vl_nb.prediction.engines import predict
from qwen2vl_nb.prediction.predictions import Predictions
from qwen2vl_nb.prediction.question import OtherQuestion
from qwen2vl_nb.recipe import predict_recipe
from qwen2vl_nb.prediction.scores import compare, score
from qwen2vl_nb.prediction.show import show_predictions
from test_served import loopback # noqa: F401, a fixture

N = 6
SAMPLES = [{'id': f'n{i}', 'instruction': f'Row {i}?', 'output': 'x', 'images': [], 'camera': 'left'} for i in range(N)]

def _changed(**changes):
    "A change of the third line."
    def damage(path, lines): path.write_text(''.join([*lines[:2], json.dumps(json.loads(lines[2]) | changes) + '\n', *lines[3:]]))
    return damage

def _text(make): return lambda path, lines: path.write_bytes(make(''.join(lines).encode()))

def _instead(make):
    def damage(path, lines):
        path.unlink()
        make(path)
    return damage

def _a_line(line): return lambda path, lines: path.write_bytes(b''.join([*map(str.encode, lines[:2]), line + b'\n', *map(str.encode, lines[3:])]))

DAMAGES = {
    'empty': _text(lambda text: b''), 'cut in the middle': _text(lambda text: text[:len(text)//2]), 'cut at the end of a line': lambda path, lines: path.write_text(''.join(lines[:2])),
    'without its last byte': _text(lambda text: text[:-1]), 'binary': _text(lambda text: bytes(range(256))*40), 'NUL': _text(lambda text: bytes(len(text))), 'NUL at the end': _text(lambda text: text[:-50] + bytes(50)),
    'UTF-16': _text(lambda text: text.decode().encode('utf-16')), 'Windows line ends': _text(lambda text: text.replace(b'\n', b'\r\n')), 'a mark before': _text(lambda text: b'\xef\xbb\xbf' + text),
    'a list': _text(lambda text: b'[]\n'), 'null': _text(lambda text: b'null\n'), 'numbers': _text(lambda text: b'1\n2\n3\n'), 'all in a list': _text(lambda text: b'[' + text.replace(b'\n', b',')[:-1] + b']\n'),
    'an empty line': _a_line(b''), 'an empty dict': _a_line(b'{}'), 'nested': _a_line(b'['*100_000), 'nested dicts': _a_line(b'{"row":'*100_000), 'half a line': _a_line(b'{"row": 2, "pred'), 'not UTF-8': _a_line(b'{"row": 2, "predict": "\xff"}'),
    'half a surrogate': _a_line(b'{"row": 2, "id": "n2", "predict": "\\ud800", "label": "x", "prompt": "Row 2?", "images": []}'), 'a long number': _a_line(b'{"row": ' + b'9'*9999 + b', "predict": ""}'), 'NaN': _a_line(b'{"row": NaN, "predict": "a"}'),
    'a huge row': _changed(row=10**15), 'a row beyond': _changed(row=N), 'a row below 0': _changed(row=-1), 'a row as text': _changed(row='2'), 'a row as a list': _changed(row=[2]), 'a row that is true': _changed(row=True),
    'no answer of a type': _changed(predict=7), 'an answer as a list': _changed(predict=['a']), 'a label of a type': _changed(label={'a': 1}), 'pictures of a type': _changed(images=5), 'pictures as numbers': _changed(images=[5]), 'a prompt of a type': _changed(prompt=[]),
    'an error of a type': _changed(predict=None, error=[1]), 'another question': _changed(prompt='What else?', id='m2'), 'an id as a dict': _changed(id={'a': 1}), 'a video as a dict': _changed(videos=[{'a': 1}]),
    'rows twice': lambda path, lines: path.write_text(''.join(lines[::-1] + lines)), 'in another order': lambda path, lines: path.write_text(''.join(lines[::-1])),
    'deleted': _instead(lambda path: None), 'a folder': _instead(os.mkdir), 'a FIFO': _instead(os.mkfifo), 'a link to /dev/zero': _instead(lambda path: path.symlink_to('/dev/zero')), 'a link to nowhere': _instead(lambda path: path.symlink_to('nowhere')),
    'a link to itself': _instead(lambda path: path.symlink_to(path.name)),
}

OF_ANY_FILE = [name for name, damage in DAMAGES.items() if '_changed' not in damage.__qualname__]

LOOKS = {
    'Predictions': Predictions, 'len and items': lambda folder: [(p := Predictions(folder)), len(p), list(p), p[0:2], p.rows], 'repr': lambda folder: repr(Predictions(folder)), 'score': lambda folder: repr(score(Predictions(folder))),
    'by': lambda folder: score(Predictions(folder)).by('camera'), 'compare': lambda folder: compare(Predictions(folder), Predictions(folder)), 'show_predictions': lambda folder: show_predictions(Predictions(folder))._repr_html_(),
    'text': lambda folder: repr(show_predictions(Predictions(folder))), 'to_html': lambda folder: show_predictions(Predictions(folder)).to_html(folder.parent/'p.html'), 'to_csv': lambda folder: show_predictions(Predictions(folder)).to_csv(folder.parent/'p.csv'),
    'to_excel': lambda folder: show_predictions(Predictions(folder)).to_excel(folder.parent/'p.xlsx'), 'to_pandas': lambda folder: Predictions(folder).to_pandas(), 'failed': lambda folder: Predictions(folder).failed,
    'missing': lambda folder: missing(folder/'predictions.jsonl', N), 'put_in_order': lambda folder: put_in_order(folder/'predictions.jsonl'),
    'set_damaged_aside': lambda folder: set_damaged_aside(folder/'predictions.jsonl', lambda i, line: parse_row(line)),
}

def _said(call):
    "(what a call gives, the words of its warnings, its error in words); no error may be one out of a library's depth."
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        try: found, error = call(), ''
        except Exception as raised:
            assert type(raised) in (ValueError, OtherQuestion, Damaged, FileNotFoundError) or type(raised) is OSError and raised.filename, repr(raised)
            found, error = None, str(raised)
    return found, '\n'.join(str(w.message) for w in seen if w.category is UserWarning), error

@pytest.fixture(scope='module')
def answered(tiny, tmp_path_factory):
    "A folder with all answers, its server, and how to ask again."
    from test_served import Loopback
    server, home = Loopback(), tmp_path_factory.mktemp('answered')
    def ask(folder): return predict(predict_recipe(tiny, output_dir=folder), SAMPLES, engine='openai', base_url=server.url)
    yield server, home/'out', list(ask(home/'out')), ask
    server.shutdown()
    server.server_close()

def _damaged(answered, tmp_path, name, damage):
    folder = shutil.copytree(answered[1], tmp_path/'out')
    path = folder/name
    if name == 'generated_predictions.jsonl':
        (folder/'predictions.jsonl').unlink()
        path.write_text(''.join(json.dumps({'prompt': f'Row {i}?', 'predict': 'x', 'label': 'x\n'}) + '\n' for i in range(N)))
    DAMAGES[damage](path, path.read_text().splitlines(keepends=True))
    return folder, path

@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize('name', ['predictions.jsonl', 'asked.jsonl', 'generated_predictions.jsonl'])
def test_looking_at_damaged_files(answered, tmp_path, name, damage):
    "Each call works, or says in words what is wrong; a line that is left out is named, and no look changes the files."
    folder, path = _damaged(answered, tmp_path, name, damage)
    before = path.read_bytes() if path.is_file() and not path.is_symlink() else None
    looks = LOOKS if name == 'predictions.jsonl' else {look: LOOKS[look] for look in ('Predictions', 'len and items', 'repr')}
    for look, call in looks.items():
        if look == 'put_in_order': assert before is None or path.read_bytes() == before
        found, warned, error = _said(lambda: call(folder))
        assert not error or name.partition('.')[0] in error or re.search('no predictions|same rows|label', error), (look, error)
        if look == 'Predictions' and found and name == 'predictions.jsonl' and len(found) < N: assert re.search(r'line 3: |line \d|of 6 rows', warned), damage

# What is left of the answers, and what is said, where predict is called again
LOST = {'cut in the middle', 'cut at the end of a line', 'an empty line', 'nested', 'not UTF-8', 'a row beyond', 'a row below 0', 'pictures of a type', 'another question'}
WHOLE = {'without its last byte', 'Windows line ends', 'rows twice', 'in another order'}
IN_WORDS = {'a folder', 'a FIFO', 'a link to /dev/zero'}

@pytest.mark.parametrize('damage', sorted(LOST | WHOLE | IN_WORDS))
def test_damaged_answers_are_asked_again(answered, tmp_path, damage):
    server, _, rows, ask = answered
    folder, path = _damaged(answered, tmp_path, 'predictions.jsonl', damage)
    lines, asked = path.read_bytes().splitlines() if path.is_file() else [], len(server.asked)
    found, warned, error = _said(lambda: ask(folder))
    if damage in IN_WORDS: assert 'predictions.jsonl is not a regular file' in error and os.path.lexists(path)
    else: assert list(found) == rows and (len(server.asked) == asked) == (damage in WHOLE), warned
    if damage in LOST and not damage.startswith('cut'):
        assert 'line 3: ' in warned and 'predictions.jsonl.damaged' in warned
        assert path.with_name('predictions.jsonl.damaged').read_bytes() == lines[2] + b'\n'
    if damage in WHOLE: assert not warned

@pytest.mark.parametrize('damage', OF_ANY_FILE)
def test_rows_that_were_asked_are_written_anew(answered, tmp_path, damage):
    "Where nothing is missing, no worker need be started to see it."
    server, source, rows, ask = answered
    folder, path = _damaged(answered, tmp_path, 'asked.jsonl', damage)
    found, warned, error = _said(lambda: ask(folder))
    if 'a folder' == damage or damage in ('a FIFO', 'a link to /dev/zero', 'a link to itself'): assert 'asked.jsonl' in error
    else: assert list(found) == rows and path.read_bytes() == (source/'asked.jsonl').read_bytes() and ('was changed or truncated' in warned) == ('asked.jsonl' in warned)

def test_a_shortened_list_of_rows_gives_all_rows(answered, tmp_path):
    folder, path = _damaged(answered, tmp_path, 'asked.jsonl', 'cut at the end of a line')
    own = folder/'predictions.jsonl'
    own.write_text(''.join(own.read_text().splitlines(keepends=True)[:1]))
    found, warned, _ = _said(lambda: answered[3](folder))
    assert list(found) == answered[2] and 'asked.jsonl was changed or truncated: it is rewritten' in warned

def test_who_looks_after_the_workers_starts_none_on_rows_that_were_changed(answered, tmp_path):
    folder, _ = _damaged(answered, tmp_path, 'asked.jsonl', 'in another order')
    assert subprocess.run([sys.executable, *script('prediction.coordinator')], cwd=folder, stdout=subprocess.DEVNULL).returncode == 1
    assert 'asked.jsonl was changed' in json.loads((folder/'failure-files.json').read_text())['message']

@pytest.mark.parametrize('damage', OF_ANY_FILE)
def test_without_its_question_a_folder_is_left_alone(answered, tmp_path, damage):
    folder, path = _damaged(answered, tmp_path, 'question.json', damage)
    before = (folder/'predictions.jsonl').read_bytes()
    found, warned, error = _said(lambda: answered[3](folder))
    assert (folder/'predictions.jsonl').read_bytes() == before
    assert found is not None and list(found) == answered[2] or re.search(r'question\.json|which question', error), (found, error)
