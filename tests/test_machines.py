"""Two machines: two network namespaces with a cable between them, a run started in each, and everything else as it is.

Both namespaces have the host name of this machine, which stands for 127.0.0.1. So torchrun is told by which address to reach each, and gloo which card to take."""
import json, os, re, shutil, signal, subprocess, sys, time
from types import SimpleNamespace

import psutil
import pytest

from conftest import AS_ROOT, PATIENCE, until
from qwen2vl_nb.checkpoint import is_whole
from qwen2vl_nb.run.folder import state_or_empty
from qwen2vl_nb.run.loss import read_log
from qwen2vl_nb.recipe import save_recipe
from qwen2vl_nb.processes import marked
from qwen2vl_nb.run.start import attach, launch
from qwen2vl_nb.zero import zero_config

STEPS = 12

def _ip(*arguments):
    done = subprocess.run(['ip', *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, f'The kernel did not let this test have a network of its own: ip {" ".join(arguments)}: {done.stderr}'
    return done.stdout

_until = until

class Machine:
    "A network namespace with one card."
    def __init__(self, number):
        self.name, self.number, self.address, self.starts = f'q{os.getpid()}-{number}', number, f'10.99.0.{number + 1}', []
        _ip('netns', 'add', self.name)

    def connect(self):
        _ip('-n', self.name, 'address', 'add', f'{self.address}/24', 'dev', self.name)
        for card in (self.name, 'lo'): _ip('-n', self.name, 'link', 'set', card, 'up')

    def received(self):
        "Bytes that have come in by the cable."
        return json.loads(_ip('-n', self.name, '-s', '-j', 'link', 'show', self.name))[0]['stats64']['rx']['bytes']

    def start(self, code, folder, **env):
        "Run Python code here, in a folder that has the recipe."
        with open(folder/f'said-{self.number}.txt', 'w') as said:
            self.starts.append(subprocess.Popen(['ip', 'netns', 'exec', self.name, sys.executable, '-c', code], cwd=folder, stdout=said, stderr=said,
                                                env=os.environ | {'GLOO_SOCKET_IFNAME': self.name} | env))

    def remove(self):
        "End all that runs here, and take the namespace away."
        while pids := _ip('netns', 'pids', self.name).split():
            for pid in map(int, pids):
                try: os.kill(pid, signal.SIGKILL)
                except ProcessLookupError: pass
            for p in self.starts: p.poll()
            time.sleep(.1)
        for p in self.starts: p.wait()
        _ip('netns', 'del', self.name)

@pytest.fixture
def machines():
    if os.geteuid(): pytest.fail(f'Two machines are played by two network namespaces. {AS_ROOT}')
    if not shutil.which('ip'): pytest.fail('Two machines are played by two network namespaces: install the command ip (package iproute2).')
    made = []
    try:
        for number in range(2): made.append(Machine(number))
        first, second = made
        _ip('-n', first.name, 'link', 'add', first.name, 'type', 'veth', 'peer', 'name', second.name, 'netns', second.name)
        for m in made: m.connect()
        yield made
    finally:
        for m in made: m.remove()

def _started(machines, folder):
    "The runs, of the first machine and of the second, once they are there."
    folders = folder/'run', folder/'run'/'node-1'
    def are_there(): return all((f/'waiter.json').exists() for f in folders)
    _until(lambda: are_there() or any(m.starts[-1].poll() for m in machines))
    assert are_there(), [(folder/f'said-{m.number}.txt').read_text()[-2000:] for m in machines]
    return [attach(f) for f in folders]

def _launched(machines, recipe, folder, env=lambda machine: {}):
    "A recipe launched on all machines, each in a Python process of its own."
    save_recipe(recipe, folder/'recipe.yaml')
    for m in machines:
        given = dict(nproc=1, nnodes=2, node_rank=m.number, master='10.99.0.1:29511', env=env(m))
        m.start(f"from qwen2vl_nb.all import *\nlaunch(load_recipe('recipe.yaml'), **{given!r}).wait()", folder)
    return _started(machines, folder)

def _await_end(runs):
    _until(lambda: not any(r.is_running for r in runs))
    return [(r.status, r.failure and str(r.failure)) for r in runs]

@pytest.fixture
def three(few_steps):
    "A recipe for ZeRO-3 on CPU ranks."
    return lambda **changes: few_steps(**dict(deepspeed=zero_config('z3'), use_cpu=None, max_steps=STEPS) | changes)

@pytest.fixture(scope='module')
def kept(): return SimpleNamespace(losses=None)

@pytest.fixture
def losses(three, tmp_path, kept):
    "Those of two ranks on one machine, in one go."
    if kept.losses is None:
        run = launch(three(output_dir=tmp_path/'alone'), nproc=2)
        _await_end([run])
        kept.losses = list(read_log(run).dropna(subset=['loss']).loss)
    assert len(kept.losses) == STEPS and all(.5 < x < 10 for x in kept.losses)
    return kept.losses

def _logged(run, losses):
    "Every step once, and the losses are those of one machine."
    log = read_log(run).dropna(subset=['loss'])
    assert list(log.current_steps) == list(range(1, STEPS + 1))
    assert list(log.loss) == pytest.approx(losses, abs=2e-4)

def _two_wrote(checkpoint): return len([*checkpoint.glob('global_step*/*_optim_states.pt')]) == 2 and is_whole(checkpoint, 2)

@pytest.mark.soak
def test_two_machines_train_as_one_with_two_ranks(machines, three, losses, tmp_path):
    runs = _launched(machines, three(), tmp_path)
    assert _await_end(runs) == [('done', None)]*2
    _logged(runs[0], losses)
    assert _two_wrote(runs[0].output_dir/f'checkpoint-{STEPS}')
    assert all('Total train batch size (w. parallel, distributed & accumulation) = 2' in r.log(rank=0) for r in runs)
    assert all(m.received() > 10*2**20 for m in machines), 'the weights are gathered in every step'

def test_a_lost_rank_is_started_again_and_all_go_on(machines, three, losses, tmp_path):
    "Also where the recipe says to start over: that is meant once."
    def env(m): return dict(RDZV_ID='cars', MAX_RESTARTS='2')
    first, second = runs = _launched(machines, three(overwrite_output_dir=True, save_steps=3), tmp_path, env)
    _until(lambda: (first.output_dir/'checkpoint-3').exists() and second.progress.step >= 4 or not second.is_running)
    [rank] = psutil.Process(state_or_empty(second, 'waiter.json')['child']).children()
    rank.kill()
    assert _await_end(runs) == [('done', None)]*2
    _logged(first, losses)
    assert (first.output_dir/'trainer_log.jsonl').read_text().count('"current_steps": 1,') == 1, 'it has not started over'
    assert all(state_or_empty(r, 'progress.json')['from_step'] >= 3 for r in runs)
    assert [*second.output_dir.glob('ranks/*/attempt_1')], 'its rank was started again; the other machine may first see the new meeting, or its own rank fail'

def _at_step(runs, step): _until(lambda: all(r.progress.step >= step or not r.is_running for r in runs))

def _ended_together(runs, ids):
    "Both ended at one step, with a checkpoint, and nothing of them is left; the step."
    assert _await_end(runs) == [('stopped', None)]*2
    first, second = (r.progress.step for r in runs)
    assert first == second and _two_wrote(runs[0].output_dir/f'checkpoint-{first}')
    _until(lambda: not any(map(marked, ids)))
    return first

def _ids(runs): return [state_or_empty(r, 'run.json')['id'] for r in runs]

@pytest.mark.soak
@pytest.mark.parametrize('asked', [0, 1])
def test_a_stop_on_one_machine_ends_both_at_one_step(asked, machines, three, tmp_path):
    runs = _launched(machines, three(max_steps=100_000), tmp_path)
    _at_step(runs, 2)
    runs[asked].stop()
    _ended_together(runs, _ids(runs))

@pytest.mark.soak
def test_the_script_for_slurm_stops_when_told_and_the_next_job_goes_on(machines, three, losses, data, tmp_path):
    "The page's own script, with the variables that Slurm sets, and the signal that it sends."
    page = (data.parent/'nbs'/'tutorials'/'slurm.md').read_text(encoding='utf-8')
    script, = re.findall('```python\n(.*?)```', page, re.S)
    save_recipe(three(), tmp_path/'recipe.yaml')
    def job(port):
        for m in machines: m.start(script, tmp_path, SLURM_NNODES='2', SLURM_NODEID=str(m.number), MASTER=f'10.99.0.1:{port}')
        return _started(machines, tmp_path)
    runs = job(29500)
    _at_step(runs, 2)
    for m in machines: m.starts[-1].send_signal(signal.SIGUSR1)
    assert 2 <= _ended_together(runs, _ids(runs)) < STEPS
    assert [m.starts[-1].wait(PATIENCE) for m in machines] == [0, 0]
    runs = job(29501)
    _until(lambda: all(m.starts[-1].poll() is not None for m in machines))
    assert _await_end(runs) == [('done', None)]*2
    _logged(runs[0], losses)
