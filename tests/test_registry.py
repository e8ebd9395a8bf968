"The registry under many hands: processes, kills, editors; and what LLaMA-Factory's own loader says to its entries."
import json, os, random, signal, subprocess, sys, time

import pytest
from filelock import FileLock
from PIL import Image

from qwen2vl_nb.data import registry
from qwen2vl_nb.checks import data_findings
from qwen2vl_nb.data.registry import Registry, entry_faults, sample_entry

QUESTION = {'images': [], 'instruction': 'What has four wheels?', 'input': '', 'output': 'A car.'}
TURNS = [{'role': 'user', 'content': 'What is this?'}, {'role': 'assistant', 'content': 'A car.'}]

def test_all_entries_of_the_registry_are_there(data):
    stored = Registry(data)
    assert len(stored) >= 94 and list(stored)[:6] == ['identity', 'alpaca_en_demo', 'alpaca_zh_demo', 'glaive_toolcall_en_demo', 'glaive_toolcall_zh_demo', 'car_item']
    assert stored['car_item'] == {'file_name': 'car_item/train.json', 'columns': {'images': 'images', 'prompt': 'instruction', 'query': 'input', 'response': 'output'}}
    assert stored['mllm_video_demo']['columns'] == {'messages': 'messages', 'videos': 'videos'}
    assert len(stored.find()) == len(stored)

def test_the_registry_s_own_faults_are_the_two_that_it_has(data):
    "Two rankings of LLaMA-Factory's own registry name no columns, and for chosen and rejected there are no usual ones."
    stored = Registry(data)
    assert {n for n, e in stored.items() if any(f.level == 'error' for f in entry_faults(n, e))} == {'nectar_rm', 'orca_dpo_de'}

# Many writers

WRITER = '''
import sys
from qwen2vl_nb.data.registry import Registry
folder, number, entries = sys.argv[1:]
for i in range(int(entries)): Registry(folder)[f"{number}-{i}"] = {"file_name": "x.json"}
'''

@pytest.mark.parametrize('processes, entries', [(6, 10), pytest.param(32, 50, marks=pytest.mark.soak)])
def test_processes_adding_at_once_lose_nothing(processes, entries, tmp_path):
    writers = [subprocess.Popen([sys.executable, '-c', WRITER, tmp_path, str(n), str(entries)]) for n in range(processes)]
    assert [w.wait() for w in writers] == [0]*processes
    assert set(Registry(tmp_path)) == {f'{n}-{i}' for n in range(processes) for i in range(entries)}

ADDER = '''
import random, sys
from qwen2vl_nb.data.registry import Registry
folder, rows = sys.argv[1], int(sys.argv[2])
sample = {"image": [], "instruction": "What has four wheels?", "input": "", "output": "A car."}
def add():
    name = f"set{random.randrange(20)}"
    Registry(folder).add(name, [sample]*rows, file_name=f"sets/{name}.json")
add()
print("at work", flush=True)
while True: add()
'''

@pytest.mark.parametrize('kills', [12, pytest.param(200, marks=pytest.mark.soak)])
def test_a_kill_during_writes_leaves_whole_files(kills, tmp_path):
    reg, rows, torn, rng = Registry(tmp_path), 400, 0, random.Random(0)
    reg['all'] = {'file_name': 'sets'}  # a folder: LLaMA-Factory would take whatever lies in it
    for _ in range(kills):
        with subprocess.Popen([sys.executable, '-c', ADDER, tmp_path, str(rows)], stdout=subprocess.PIPE) as adder:
            assert adder.stdout.readline() == b'at work\n'
            time.sleep(rng.uniform(0, .1))
            os.kill(adder.pid, signal.SIGKILL)
        with FileLock(tmp_path/'.dataset_info.lock', timeout=0): pass  # nobody holds it any more
        entries = json.loads((tmp_path/'dataset_info.json').read_text())
        for name in entries.keys() - {'all'}: assert len(json.loads((tmp_path/'sets'/f'{name}.json').read_text())) == rows
        torn += len(list(tmp_path.rglob('.*.tmp')))
        reg.add('last', [QUESTION], file_name='sets/last.json')
        assert not list(tmp_path.rglob('.*.tmp')) and {p.suffix for p in (tmp_path/'sets').iterdir()} == {'.json'}
        del reg['last']
        (tmp_path/'sets'/'last.json').unlink()
    assert torn or kills < 100  # some did come in the middle of a write
    assert len(reg) > 3

# Files that people have edited

BROKEN = {
    'empty': (b'', 1, 1),
    'torn': (b'{\n  "a": {},\n  "b": {"file_n', 3, 9),
    'a name without quotes': (b'{\n  "a": {},\n  b: {}\n}\n', 3, 3),
    'a name twice': (b'{\n  "a": {"x": 1},\n  "b": {},\n  "a": {"x": 2}\n}\n', 4, 3),
    'an array': (b'\n[{"a": {}}]\n', 2, 1),
    'a text': (b'"a"', 1, 1),
    'UTF-16': ('{"a": {}}'.encode('utf-16'), 1, 1),
    'UTF-16 without a mark': ('{"a": {}}'.encode('utf-16-le'), 1, 2),
    'Latin-1': ('{\n "a": {"what": "ä"}}'.encode('latin-1'), 2, 17),
    'NUL': (b'{"a": {}}\n\0', 2, 1),
    'NUL in a name': (b'{"a": {}, "\0": {}}', 1, 12),
    'null': (b'null', 1, 1),
    'nested too deeply': (b'{"a": ' + b'['*200_000, 1, 1),
    'a picture': (b'\x89PNG\r\n\x1a\n\0\0', 1, 1),
}

@pytest.mark.parametrize('kind', BROKEN)
def test_a_broken_file_is_named_with_its_place_and_left_alone(kind, tmp_path):
    raw, line, column = BROKEN[kind]
    reg = Registry(tmp_path)
    reg.path.write_bytes(raw)
    def put(): reg['c'] = {'file_name': 'c.json'}
    def take(): del reg['a']
    for what in (put, take, reg.find, reg.check, lambda: list(reg), lambda: reg['a'], lambda: 'a' in reg, lambda: reg.add('c', [QUESTION])):
        with pytest.raises(ValueError, match=rf'dataset_info.json, line {line}, column {column}: .*Nothing was changed'): what()
    assert reg.path.read_bytes() == raw and not (tmp_path/'c.json').exists()

HOSTILE = {
    'a pipe': os.mkfifo,
    'a link to a device without end': lambda path: path.symlink_to('/dev/zero'),
    'a link to the terminal': lambda path: path.symlink_to('/dev/tty'),
    'a folder': os.mkdir,
    'larger than any registry': lambda path: path.touch() or os.truncate(path, 2**27),
}

@pytest.mark.parametrize('kind', HOSTILE)
def test_what_is_no_registry_file_is_not_opened_nor_replaced(kind, tmp_path):
    reg = Registry(tmp_path)
    HOSTILE[kind](reg.path)
    before = os.lstat(reg.path)
    def put(): reg['c'] = {'file_name': 'c.json'}
    for what in (put, reg.find, reg.check, lambda: list(reg), lambda: dict(reg), lambda: reg['a'], lambda: 'a' in reg, lambda: len(reg), lambda: reg.add('c', [QUESTION])):
        with pytest.raises(ValueError, match='dataset_info.json is (not a regular file|larger than)'): what()
    found = data_findings({'dataset': 'a', 'dataset_dir': str(tmp_path)})
    assert [f.where for f in found] == ['dataset_dir'] and 'dataset_info.json is' in found[0].what
    assert os.lstat(reg.path)[:7] == before[:7] and not (tmp_path/'c.json').exists()

# Scale

def test_a_registry_of_20_000_entries_is_read_once_however_often_it_is_asked(tmp_path, monkeypatch):
    reg, reads, read = Registry(tmp_path), [], registry._read_registry
    reg.path.write_text(json.dumps({f'set{i}': {'file_name': f'{i}.json', 'columns': {'prompt': 'q', 'response': 'a'}} for i in range(20_000)}))
    time.sleep(.1)  # until the time of the file tells it from one that is written now
    monkeypatch.setattr(registry, '_read_registry', lambda path: reads.append(path) or read(path))
    assert len(dict(reg)) == len(reg.items()) == len(reg.values()) == len(reg) == 20_000 and all(name in reg for name in reg)
    assert reg['set7'] == {'file_name': '7.json', 'columns': {'prompt': 'q', 'response': 'a'}} and len(reads) == 1

def test_what_others_write_is_seen_at_once_and_what_is_handed_out_is_a_copy(tmp_path):
    reg, names = Registry(tmp_path), []
    for i in range(300):  # by turns replaced, and written in place with as many bytes
        if i % 2: Registry(tmp_path)[f'{i:03}'] = {'file_name': f'{i:03}.json'}
        else: reg.path.write_text(json.dumps({f'{i:03}': {'file_name': f'{i:03}.json'}}))
        assert f'{i:03}' in reg and reg[f'{i:03}'] == {'file_name': f'{i:03}.json'}
        names.append(len(reg))
    assert set(names) == {1, 2}
    time.sleep(.1)
    for entry in (reg['299'], dict(reg)['299'], dict(reg.items())['299'], list(reg.values())[-1]): entry['file_name'] = 'changed'
    assert reg['299'] == {'file_name': '299.json'}

def test_entries_that_are_taken_out_meanwhile_disturb_no_reading_of_all(tmp_path):
    reg = Registry(tmp_path)
    for i in range(3): reg[f'{i}'] = {'file_name': f'{i}.json'}
    for read in (reg.items, reg.values):
        found = iter(read())
        next(found)
        del Registry(tmp_path)['2']
        assert len(list(found)) == 2
        reg['2'] = {'file_name': '2.json'}

# Files that nobody here has written

def test_a_writer_that_is_killed_leaves_its_files_replaceable(tmp_path):
    "At any moment of the write: the file is still ours, and one by hand never is."
    for end in ('before', 'after'):
        code = f'''
import os, sys
from qwen2vl_nb.data import registry
from qwen2vl_nb.checks import data_findings
write = registry.write_samples
def killed(*args, **kwargs):
    if "{end}" == "after": write(*args, **kwargs)
    os._exit(9)
registry.write_samples = killed
registry.Registry(sys.argv[1]).add("a", {[QUESTION]*2})
'''
        reg = Registry(tmp_path/end)
        reg.add('a', [QUESTION])
        assert subprocess.run([sys.executable, '-c', code, str(reg.dataset_dir)]).returncode == 9
        assert len(json.loads((reg.dataset_dir/'a.json').read_text())) == (2 if end == 'after' else 1)
        reg.add('a', [QUESTION]*3)
        assert len(json.loads((reg.dataset_dir/'a.json').read_text())) == 3
        subprocess.run([sys.executable, '-c', code, str(reg.dataset_dir)])
        (reg.dataset_dir/'a.json').write_text(json.dumps([{'label': 'by hand'}], indent=4))
        with pytest.raises(FileExistsError, match='overwrite=True'): reg.add('a', [QUESTION])
        assert json.loads((reg.dataset_dir/'a.json').read_text()) == [{'label': 'by hand'}]

def test_no_name_leads_to_a_file_of_somebody_else(tmp_path):
    "Not a link of ours, not another spelling, and not the registry's own files."
    reg, theirs = Registry(tmp_path/'data'), tmp_path/'theirs.json'
    theirs.write_text('[{"label": "hours of work"}]')
    reg.dataset_dir.mkdir()
    (reg.dataset_dir/'linked.json').symlink_to(theirs)
    (reg.dataset_dir/'sub').mkdir()
    reg['theirs'] = {'file_name': './sub/../spelt.json'}
    for name, file in (('linked', None), ('up', '../theirs.json'), ('absolute', str(theirs)), ('spelt', None), ('y', 'sub/../dataset_info.json')):
        with pytest.raises((FileExistsError, ValueError)): reg.add(name, [QUESTION], file_name=file)
    reg.add('mine', [QUESTION])
    (reg.dataset_dir/'mine.json').unlink()
    (reg.dataset_dir/'mine.json').symlink_to(theirs)
    with pytest.raises(FileExistsError): reg.add('mine', [QUESTION])
    assert theirs.read_text() == '[{"label": "hours of work"}]'

def test_an_entry_that_is_no_object_is_named_and_hinders_no_other(tmp_path):
    reg = Registry(tmp_path)
    reg.path.write_bytes(b'{\n  "a": {"file_name": "a.json"},\n  "b": [1]\n}\n')
    with pytest.raises(ValueError, match="line 3, column 3: 'b' is a list"): reg['b']
    assert reg['a'] and list(reg.find().name) == ['a', 'b'] and list(reg.check('b').loads) == ['no']
    reg.add('c', [QUESTION])
    assert json.loads(reg.path.read_text())['b'] == [1]
    del reg['b']
    assert list(reg) == ['a', 'c']

@pytest.mark.parametrize('raw', [b'{\n\t"b": {\n\t\t"z": 1\n\t},\n\t"a": {}\n}', b'{\r\n    "b": {},\r\n    "a": {}\r\n}\r\n', '{\n   "é": {\n      "字": "ü"\n   }\n}\n'.encode()])
def test_what_is_not_touched_is_written_as_it_was(raw, tmp_path):
    reg = Registry(tmp_path)
    reg.path.write_bytes(raw)
    reg['new'] = {}
    del reg['new']
    assert reg.path.read_bytes() == raw

def test_a_byte_order_mark_is_told_and_goes_with_the_next_write(tmp_path):
    "LLaMA-Factory's json.load stops on it."
    reg = Registry(tmp_path)
    reg.path.write_bytes(b'\xef\xbb\xbf{"a": {"hf_hub_url": "x/y"}}')
    with pytest.raises(ValueError): json.load(open(reg.path))
    found = reg.check()
    assert list(found.loads) == ['no'] and 'byte order mark' in found.why[0]
    reg['b'] = {'hf_hub_url': 'x/z'}
    assert list(json.load(open(reg.path))) == ['a', 'b'] and list(reg.check().loads) == ['not tried']*2

def test_a_link_stays_a_link_and_the_mode_stays(tmp_path):
    "Two folders with one registry: both see it, and both take the same lock."
    shared, real = tmp_path/'shared', tmp_path/'shared'/'all.json'
    shared.mkdir()
    real.write_text('{}')
    real.chmod(0o640)
    for name in ('one', 'two'):
        (tmp_path/name).mkdir()
        (tmp_path/name/'dataset_info.json').symlink_to(real)
        Registry(tmp_path/name).add(name, [QUESTION])
    assert list(json.loads(real.read_text())) == ['one', 'two'] and real.stat().st_mode & 0o777 == 0o640
    assert all((tmp_path/name/'dataset_info.json').is_symlink() for name in ('one', 'two'))
    assert [p.name for p in tmp_path.rglob('*.lock')] == ['.dataset_info.lock']

def test_an_edit_by_hand_while_samples_are_written_is_kept(tmp_path, monkeypatch):
    reg, write = Registry(tmp_path), registry.write_samples
    def edited_meanwhile(*args, **kwargs):
        write(*args, **kwargs)
        reg.path.write_text('{"by hand": {"file_name": "hand.json"}}')
    monkeypatch.setattr(registry, 'write_samples', edited_meanwhile)
    reg.add('new', [QUESTION])
    assert list(reg) == ['by hand', 'new']

# LLaMA-Factory's own loader

def test_check_says_what_the_loader_says(tmp_path, monkeypatch):
    "Good data sets of both forms with pictures, and one of each fault; one child for all, and nothing of it stays."
    folder = tmp_path/'数据 data'
    reg, picture = Registry(folder), folder/'a.png'
    folder.mkdir()
    Image.new('RGB', (40, 30)).save(picture)
    question = QUESTION | {'images': [str(picture)], 'instruction': '<image>What is this?'}
    dialogue = {'images': [str(picture)], 'messages': [TURNS[0] | {'content': '<image>What is this?'}, TURNS[1]]*2}
    def put(name, content, **entry):
        (folder/f'{name}.json').write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        reg[name] = {'file_name': f'{name}.json'} | entry
        return name
    pair = {'instruction': 'a', 'input': '', 'chosen': 'b', 'rejected': 'c'}
    pairs = {'prompt': 'instruction', 'query': 'input', 'chosen': 'chosen', 'rejected': 'rejected'}
    expected = {  # name → what, loads, a part of why
        reg.add('questions', [question]*3) and 'questions': ('local file, alpaca, 3 rows', 'yes', ''),
        reg.add('dialogues', [dialogue]*2) and 'dialogues': ('local file, sharegpt, 2 rows', 'yes', ''),
        put('ranking', [pair], ranking=True, columns=pairs): ('local file, alpaca, ranking, 1 row', 'yes', ''),
        put('text', [{'text': 'a'}], columns={'prompt': 'text'}): ('local file, alpaca, text for stage pt, 1 row', 'yes', ''),
        put('torn', b'[{"instruction": "a",\n "input": }]'): ('local file, alpaca', 'no', 'line 2 column 11'),
        put('marked', b'\xef\xbb\xbf[]'): ('local file, alpaca', 'no', 'BOM'),
        put('no rows', []): ('local file, alpaca', 'no', 'has no rows'),
        put('mixed', [QUESTION, QUESTION | {'output': 5}]): ('local file, alpaca', 'no', 'output'),
        put('renamed', [{'instruction': 'a', 'input': '', 'outputs': 'b'}]): ('local file, alpaca', 'no', "no column 'output', which the entry uses for its response; did you mean 'outputs'?"),
        put('no tags', [{'messages': TURNS}], formatting='sharegpt', columns={'messages': 'messages'}): ('local file, sharegpt', 'no', "has no key 'from'"),
        put('odd', [dialogue, dialogue | {'messages': TURNS[:1]}], **{k: v for k, v in reg['dialogues'].items() if k != 'file_name'}):
            ('local file, sharegpt, 2 rows', 'in part', 'drops 1 of 2 rows; the first is row 1'),
        put('no answers', [QUESTION | {'output': None}]): ('local file, alpaca, 1 row', 'no', 'drops 1 of 1 rows'),
        put('lost', [QUESTION | {'images': ['a.png', 'b.png']}], columns=reg['questions']['columns']): ('local file, alpaca, 1 row', 'no', '1 of its pictures or videos do not exist; the first is b.png'),
        put('split', [QUESTION], split='test'): ('local file, alpaca', 'no', 'split "test"'),
        put('misspelt', [QUESTION], columns={'prompt': 'instruction', 'response': 'output', 'image': 'image'}): ('local file, alpaca, 1 row', 'yes', "did you mean 'images'?"),
    }
    for name, entry, what, loads, why in [
        ('list', [], 'no data set', 'no', 'is a list'), ('nothing', {}, 'no data set', 'no', 'where its rows are'),
        ('number', {'file_name': 5}, 'local file, alpaca', 'no', 'file_name is 5'), ('gone', {'file_name': 'gone.json'}, 'local file, alpaca', 'no', 'no file'),
        ('hub', {'hf_hub_url': 'x/y', 'ms_hub_url': 'z/y'}, 'on the hub: hf: x/y, ms: z/y', 'not tried', ''),
        ('script', {'script_url': 'x/y'}, 'script x/y: needs external code', 'not tried', 'script'),
        ('cloud', {'cloud_file_name': 's3://x/y.json'}, 'file in cloud storage: s3://x/y.json', 'not tried', ''),
    ]:
        reg.path.write_text(json.dumps(json.loads(reg.path.read_text()) | {name: entry}))
        expected[name] = (what, loads, why)
    children, run, before = [], subprocess.run, sorted(p for p in tmp_path.rglob('*'))
    monkeypatch.setattr(subprocess, 'run', lambda *args, **kwargs: children.append(args) or run(*args, **kwargs))
    monkeypatch.setenv('HF_HOME', str(tmp_path/'hf'))
    found = reg.check()
    assert list(found.columns) == ['name', 'what', 'loads', 'why', 'cure'] and list(found.name) == list(expected)
    for row in found.to_dict('records'):
        what, loads, why = expected[row['name']]
        assert (row['what'], row['loads']) == (what, loads) and why in row['why'], row
        assert bool(row['why']) == bool(row['cure']) and (row['why'] or loads != 'no'), row
    assert len(children) == 1 and sorted(p for p in tmp_path.rglob('*')) == before

def test_what_is_called_an_error_stops_the_loader_too(tmp_path):
    "Entries that `entry_faults` condemns without their rows, given to LLaMA-Factory with rows that are sound."
    (tmp_path/'q.json').write_text(json.dumps([QUESTION | {'conversations': [{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}]}]))
    here, talk = {'file_name': 'q.json'}, {'file_name': 'q.json', 'formatting': 'sharegpt'}
    tags = {'role_tag': 'from', 'content_tag': 'value', 'user_tag': 'human', 'assistant_tag': 'gpt'}
    bad = [here | {'formatting': 'sharegtp'}, here | {'columns': []}, here | {'columns': None}, here | {'columns': {'prompt': 5, 'response': 'output'}}, here | {'ranking': True},
           here | {'columns': {}}, talk | {'columns': {}}, talk | {'columns': {'prompt': 'instruction'}}, {'hf_hub_url': None}, *(talk | {'tags': {k: v for k, v in tags.items() if k != left_out}} for left_out in tags)]
    good = [here, talk, talk | {'tags': tags}, here | {'columns': {'prompt': 'instruction', 'response': 'output'}}, sample_entry([QUESTION], 'q.json')]
    entries = {str(i): entry for i, entry in enumerate(bad + good)}
    says = [any(f.level == 'error' for f in entry_faults(n, e)) for n, e in entries.items()]
    assert says == [True]*len(bad) + [False]*len(good)
    answers = registry._load_all({n: e for n, e in entries.items() if 'file_name' in e}, tmp_path)
    for name, answer in answers.items():
        stops = 'error' in answer or len(answer['dropped']) == answer['rows']
        assert stops == (int(name) < len(bad)), (entries[name], answer)
