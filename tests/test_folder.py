"""Folders of runs that are damaged, foreign or in use: looking at them never fails, and nothing that isn't a run's own is touched.

The product of every file of state, every kind of damage and every call is walked in one process: no call may end in an exception that
doesn't say in words what is wrong, and none may block."""
import json, os, shutil, signal, socket, sys, time
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

import psutil
import pytest

from conftest import until
from qwen2vl_nb.run import life, waiter
from qwen2vl_nb.run.folder import state_or_empty
from qwen2vl_nb.run.failure import find_failure
from qwen2vl_nb.recipe import save_recipe
from qwen2vl_nb.processes import marked
from qwen2vl_nb.run.start import Run, _clear, attach, launch, runs, start
from qwen2vl_nb.run.watch import watch_loss
from qwen2vl_nb.zero import zero_config

ABOUT = dict(id='0'*32, python='/no/python', nproc=2, nnodes=1, node_rank=0, master=None, given={}, force=False, host=socket.gethostname(), versions={'torch': '2.8.0'},
             gpus=[{'total': 80*2**30, 'device': '0'}], cwd='/no/folder', command=['python', 'agent.py', '--log-dir', 'ranks'], env={'A': 'b'}, inherited={}, tells=True)
STATE = {
    'run.json': ABOUT,
    'waiter.json': dict(pid=2**22 + 1, created=1, started=1e9, child=2**22 + 2, child_created=1),
    'ended.json': dict(returncode=1, asked=False, time=1e9, killed_by_kernel=False),
    'progress.json': dict(step=3, steps=9, epoch=.5, time=1e9 + 10, began=1e9, from_step=0),
    'doing.json': dict(doing='tokenizing', done=3, of=9, unit='rows', time=1e9),
    'failure-0.json': dict(rank=0, type='ValueError', message='No such thing.', file='a.py', line=1, function='f', traceback='…', time=1e9),
    'refused.json': [dict(where='data', what='Row 7 has no picture.', cure='Mend it.')],
}
LOG = '\n'.join(json.dumps(dict(current_steps=i, total_steps=9, loss=.5, eval_loss=.4, epoch=.1, lr=1e-4)) for i in range(1, 4)) + '\n'
OTHERS = {'run.log': 'ValueError: no\n', 'trainer_log.jsonl': LOG, 'ranks/x/attempt_0/0/stderr.log': 'no\n', 'stop': '120\n'}

def make(folder, **changes):
    "A folder as a failed run leaves it."
    for name, value in STATE.items():
        if name != 'refused.json': write(folder/name, json.dumps(value | changes.get(name.partition('.')[0], {})))
    for name, text in OTHERS.items():
        if name != 'stop': write(folder/name, text)
    save_recipe(dict(model_name_or_path='Qwen/Qwen2-VL-7B-Instruct', output_dir=str(folder), do_train=True), folder/'recipe.yaml')
    return folder

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    os.utime(path, (2e9 if path.name == 'trainer_log.jsonl' else 1e9,)*2)  # a run.json of now would be that of a run being started

def wipe(path):
    if path.is_dir() and not path.is_symlink(): shutil.rmtree(path)
    elif os.path.lexists(path): path.unlink()

def huge(path):
    with open(path, 'wb') as f: f.truncate(2**30)

DAMAGE = {
    'missing': lambda p: None, 'empty': lambda p: write(p, ''), 'binary': lambda p: write(p, bytes(range(256))), 'NULs': lambda p: write(p, bytes(4096)),
    'truncated': lambda p: write(p, p.kept[:len(p.kept)//2]), 'nested': lambda p: write(p, '['*100_000), 'a folder': lambda p: p.mkdir(),
    'a FIFO': os.mkfifo, '/dev/zero': lambda p: p.symlink_to('/dev/zero'), 'a link to nothing': lambda p: p.symlink_to(p.parent/'nothing'),
    'a link to itself': lambda p: p.symlink_to(p), '1 GB': huge, 'a list of numbers': lambda p: write(p, '[1, 2]'),
} | {f'JSON {text}': lambda p, text=text: write(p, text) for text in ('[]', 'null', '1', '"x"', '{}', '[{}]', 'NaN')}
VALUES = (None, -1, 10**30, 1e300, 1e999, True, 'x', '\ud800', [], [None], {}, {'a': {'b': 1}}, [[[]]])

@contextmanager
def in_time(what, seconds=30):
    "Fail if something takes too long, as a FIFO without a writer does."
    def over(*_): raise TimeoutError(f'{what} took longer than {seconds} s')
    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)

def shown(run):
    with redirect_stdout(StringIO()) as text: watch_loss(run)
    return text.getvalue()

CALLS = {  # Call → the exceptions that may say in words what is wrong
    'attach': (lambda f: repr(attach(f)), FileNotFoundError), 'status': (lambda f: Run(f).status, ()), 'progress': (lambda f: str(Run(f).progress), ()),
    'log': (lambda f: Run(f).log(), ()), 'log of a rank': (lambda f: Run(f).log(0), ValueError), 'failure': (lambda f: str(Run(f).failure), ()),
    'find_failure': (lambda f: str(find_failure(f)), ()), 'gpu': (lambda f: Run(f).gpu(), ()), 'recipe': (lambda f: Run(f).recipe, (ValueError, FileNotFoundError)),
    'runs': (lambda f: str(runs(f.parent)), ()), 'stop': (lambda f: Run(f).stop(patience=0), ()), 'wait': (lambda f: Run(f).wait(), RuntimeError),
    'watch': (shown, FileNotFoundError), 'resume': (lambda f: Run(f).resume(trust=True), (RuntimeError, ValueError, FileNotFoundError)),
}

def looked_at(folder, what, calls):
    "What goes wrong when each call is made."
    wrong = []
    for call in calls:
        act, allowed = CALLS[call]
        try:
            with in_time(what): act(folder)
        except allowed as e:
            if not any(name in str(e) for name in ('run.json', 'recipe.yaml', 'rank', str(folder))): wrong.append(f'{call} of {what}: {e!r}')
        except Exception as e: wrong.append(f'{call} of {what}: {e!r}')
    return wrong

def damaged(folder):
    "Damage a file in every way, one after the other; yields what it is."
    for name in (*STATE, *OTHERS, 'recipe.yaml'):
        path = folder/name
        for kind, damage in DAMAGE.items():
            if kind == '1 GB' and path.suffix == '.jsonl': continue
            is_there, path.kept = path.exists(), path.read_bytes() if path.exists() else json.dumps(STATE.get(name, 1)).encode()
            wipe(path)
            damage(path)
            yield f'{name}: {kind}'
            wipe(path)
            if is_there: write(path, path.kept)

def changed(folder, pick=lambda field, value: True):
    "Give a field of a file's JSON each value, one after the other; yields what it is."
    for name, state in STATE.items():
        path, is_list = folder/name, isinstance(state, list)
        is_there = path.exists()
        for i, key in enumerate(state[0] if is_list else state):
            for k, value in enumerate(VALUES):
                if not pick(i, k): continue
                write(path, json.dumps([state[0] | {key: value}] if is_list else state | {key: value}))
                yield f'{name}: {key} is {value!a}'
        wipe(path)
        if is_there: write(path, json.dumps(state))

class KeptPath(type(Path())):
    "A path that remembers what its file held."
    kept = b''

@pytest.fixture
def beside(tmp_path, monkeypatch):
    "The folder of a run, beside that of another."
    monkeypatch.setattr(waiter, 'GRACE', 1)
    monkeypatch.setattr(life, 'marked', lambda run_id: [])  # no process has this run's mark, and to look for it a thousand times takes minutes
    make(tmp_path/'good')
    return make(KeptPath(tmp_path/'bad'))

def no_raw_exception(folder, cases, calls):
    wrong, count = [], 0
    for what in cases:
        wrong += looked_at(folder, what, calls)
        count += len(calls)
    assert count and not wrong, f'{len(wrong)} of {count}:\n' + '\n'.join(wrong[:40])

def test_whatever_the_files_of_a_run_contain_it_can_be_looked_at(beside):
    def cases():
        for what in damaged(beside):
            yield what
            assert runs(beside.parent).set_index('run').state['good'] == 'failed', what
    no_raw_exception(beside, cases(), CALLS)

def test_whatever_a_field_of_a_run_contains_it_can_be_looked_at(beside):
    "Each field with three of the values; `make soak` has them all, with each call."
    third = len(VALUES)//3
    no_raw_exception(beside, changed(beside, lambda field, value: value % third == field % third), ('failure', 'gpu', 'watch'))

@pytest.mark.soak
def test_whatever_a_field_of_a_run_contains_each_call_says_so(beside): no_raw_exception(beside, changed(beside), CALLS)

def test_a_damaged_run_is_a_row_that_says_so(tmp_path):
    for name in ('good', 'bad'): make(tmp_path/name)
    (tmp_path/'bad'/'run.json').write_text('{"id": ')
    assert dict(runs(tmp_path).set_index('run').state) == {'good': 'failed', 'bad': 'damaged'}
    assert 'run.json is not JSON' in attach(tmp_path/'bad').failure.what
    with pytest.raises(RuntimeError, match='run.json'): attach(tmp_path/'bad').resume()

def test_the_row_of_a_run_that_has_ended_is_made_again_when_its_files_change(tmp_path):
    make(tmp_path/'run')
    row = lambda: runs(tmp_path).set_index('run').loc['run']
    assert (row().loss, row().state) == (.5, 'failed')
    write(tmp_path/'run'/'trainer_log.jsonl', LOG.replace('.5', '.4'))
    write(tmp_path/'run'/'ended.json', json.dumps(STATE['ended.json'] | dict(returncode=0)))
    assert (row().loss, row().state) == (.4, 'done')

SLEEPS = dict(nproc=1, nnodes=1, node_rank=0, master=None, given={}, force=False, python=sys.executable, host=socket.gethostname(), versions={}, gpus=[])

def begin(folder, command=('sleep', '300'), id='f'*32):
    "A run that is no training."
    return start(dict(model_name_or_path='m', output_dir=str(folder)), SLEEPS | {'id': id, 'cwd': str(folder)}, _clear, list(command))

def test_a_start_clears_only_what_a_start_has_made(tmp_path):
    mine = ('ranks/mine.txt', 'run.log', 'failure-0.json', 'ended.json', 'stop', 'recipe.yaml', 'failure-notes.md')
    for name in mine: write(tmp_path/name, 'mine')
    with pytest.raises(ValueError, match='ended.json.*run.log.*recipe.yaml.*Nothing was touched'): begin(tmp_path)
    assert all((tmp_path/name).read_text() == 'mine' for name in mine) and not (tmp_path/'run.json').exists()
    for name in mine[1:6]: (tmp_path/name).unlink()
    begin(tmp_path).stop(patience=0)
    begin(tmp_path).stop(patience=0)  # over what the first has left
    assert (tmp_path/'ranks'/'mine.txt').read_text() == (tmp_path/'failure-notes.md').read_text() == 'mine'

def test_a_run_with_a_suspended_waiter_is_stopped(tmp_path):
    run = begin(tmp_path)
    w = psutil.Process(state_or_empty(run, 'waiter.json')['pid'])
    below = w.children()
    w.suspend()
    with in_time('stop', 60): assert run.stop(patience=0).status == 'stopped'
    assert below and not psutil.wait_procs([w, *below], timeout=30)[1]

def test_a_run_in_a_folder_that_cannot_be_written_is_stopped(tmp_path):
    run = begin(tmp_path)
    below = psutil.Process(state_or_empty(run, 'waiter.json')['pid']).children()
    (tmp_path/'stop').mkdir()  # no file can take this name, whoever asks
    with in_time('stop', 60): run.stop(patience=0)
    assert below and not psutil.wait_procs(below, timeout=30)[1]

def test_a_dead_run_of_a_machine_whose_clock_was_ahead_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(waiter, 'BEAT', .2)
    run = Run(make(tmp_path, run={'host': 'elsewhere'}))
    (tmp_path/'ended.json').unlink()
    os.utime(tmp_path/'waiter.json', (time.time() + 10**6,)*2)
    assert run.is_running
    with in_time('stop', 30): assert run.stop(patience=0).status == 'failed'

def test_two_ranks_listen_on_this_machine_only_and_nothing_secret_is_written(few_steps):
    "Then the folder is deleted: nothing is left of the run, and nothing brings the folder back."
    recipe = few_steps(max_steps=100_000, deepspeed=zero_config('z0'), use_cpu=None, hf_hub_token='hf_secret')
    run = launch(recipe, nproc=2, env={'MY_PAT': 'pat_secret', 'X_PROXY': 'http://bob:pw_secret@host'})
    try: until(lambda: run.progress.step >= 1 or not run.is_running)
    except BaseException:
        run.stop(patience=0)
        raise
    assert run.is_running, run.failure
    ranks = marked(state_or_empty(run, 'run.json')['id'])
    assert {c.laddr.ip for p in ranks for c in p.net_connections() if c.status == psutil.CONN_LISTEN} == {'127.0.0.1'}
    assert all('pat_secret' in str(p.environ()) and 'hf_secret' in str(p.environ()) for p in ranks)
    assert not [p for p in run.output_dir.rglob('*') if p.is_file() and b'_secret' in p.read_bytes()]
    assert [(run.output_dir/name).stat().st_mode & 0o777 for name in ('run.json', 'recipe.yaml')] == [0o600]*2
    w = psutil.Process(state_or_empty(run, 'waiter.json')['pid'])
    below = [w, *w.children(recursive=True)]
    shutil.rmtree(run.output_dir, ignore_errors=True)
    assert not psutil.wait_procs(below, timeout=120)[1] and not run.output_dir.exists()
