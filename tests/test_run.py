"Runs as processes: they outlive who started them, stop at a step, go on where they were, and leave nothing behind."
import os, signal, subprocess, sys, sysconfig, venv
from pathlib import Path

import psutil
import pytest

from conftest import PATIENCE, free_ports, until
from qwen2vl_nb.boot import script
from qwen2vl_nb.checkpoint import checkpoints, is_whole
from qwen2vl_nb.run.folder import state_or_empty
from qwen2vl_nb.run.loss import read_log
from qwen2vl_nb.recipe import save_recipe
from qwen2vl_nb.processes import marked
from qwen2vl_nb.run.merge import export
from qwen2vl_nb.run.start import attach, launch, runs
from qwen2vl_nb.zero import zero_config

def _processes(run):
    "The waiter of a run and all below it."
    w = psutil.Process(state_or_empty(run, 'waiter.json')['pid'])
    return [w, *w.children(recursive=True)]

_until = until

def _at_step(run, step):
    _until(lambda: run.progress.step >= step or not run.is_running)
    assert run.is_running, run.failure

def _losses(run): return read_log(run).dropna(subset=['loss']).set_index('current_steps').loss

def _same(losses, others): return list(losses.index) == list(others.index) and (losses - others).abs().max() <= 2e-4

def _sessions(processes):
    "The sessions of processes: torchrun gives each rank its own."
    return {os.getsid(p.pid) for p in processes}

def _left(run, sessions):
    "Processes that a run has left, by its mark and by the sessions that it had."
    of_session = [p.pid for p in psutil.process_iter(['status']) if p.info['status'] != psutil.STATUS_ZOMBIE and _sid(p.pid) in sessions]
    return marked(state_or_empty(run, 'run.json')['id']), of_session

def _sid(pid):
    try: return os.getsid(pid)
    except ProcessLookupError: return None

def _python(code, **kwargs):
    "A process of its own session, as a Jupyter kernel is."
    return subprocess.Popen([sys.executable, '-c', f'from qwen2vl_nb.all import *\n{code}'], stdout=subprocess.PIPE, text=True, start_new_session=True, **kwargs)

def test_a_run_outlives_the_kernel_that_started_it(few_steps, tmp_path):
    "The kernel's whole process group is killed in the middle, as a Jupyter restart does; another process finds the run."
    save_recipe(few_steps(max_steps=30), tmp_path/'r.yaml')
    kernel = _python(f'run = launch(load_recipe({str(tmp_path/"r.yaml")!r}))\nprint("started", flush=True)\nrun.wait()')
    assert kernel.stdout.readline().strip() == 'started'
    run = attach(tmp_path/'run')
    _at_step(run, 2)
    os.killpg(kernel.pid, signal.SIGKILL)
    kernel.wait()
    assert run.status == 'running'
    code = f'run = attach({str(tmp_path/"run")!r}).wait()\nprint(run.status, len(read_log(run).dropna(subset=["loss"])))'
    assert _python(code).communicate()[0].splitlines()[-1] == 'done 30'
    assert (run.output_dir/'training_loss.png').exists() and run.recipe['max_steps'] == 30

def test_interrupting_a_cell_that_waits_leaves_the_run_at_work(few_steps, tmp_path):
    save_recipe(few_steps(max_steps=100_000), tmp_path/'r.yaml')
    code = f'''import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # as a kernel does; what a shell starts in the background ignores it
run = launch(load_recipe({str(tmp_path/"r.yaml")!r}))
print("started", flush=True)
try: run.wait()
except KeyboardInterrupt: print("interrupted", flush=True)'''
    kernel = _python(code)
    assert kernel.stdout.readline().strip() == 'started'
    run = attach(tmp_path/'run')
    try:
        _at_step(run, 1)
        kernel.send_signal(signal.SIGINT)
        said = kernel.communicate(timeout=PATIENCE)[0]
        assert 'The run continues in the background' in said and 'interrupted' in said and run.is_running
    finally: run.stop(patience=0)
    assert run.status == 'stopped'

def test_llamafactory_cli_trains_the_same(few_steps, tmp_path):
    "The recipe as it was left behind, unchanged, from another folder: the same losses."
    run = launch(few_steps(overwrite_output_dir=True, max_steps=6)).wait()
    losses = _losses(run)
    before = (run.output_dir/'trainer_log.jsonl').stat().st_mtime
    subprocess.run(['llamafactory-cli', 'train', run.output_dir/'recipe.yaml'], cwd=tmp_path, check=True, capture_output=True)
    assert (run.output_dir/'trainer_log.jsonl').stat().st_mtime > before
    assert len(losses) == 6 and _same(_losses(run), losses)

@pytest.mark.parametrize('nproc', [1, 2])
def test_stopping_ends_at_a_step_with_a_checkpoint_and_leaves_nothing(nproc, few_steps):
    zero = dict(deepspeed=zero_config('z2'), use_cpu=None) if nproc == 2 else {}
    run = launch(few_steps(max_steps=100_000, **zero), nproc=nproc)
    _at_step(run, 3)
    processes, sessions = _processes(run), _sessions(_processes(run))
    assert len(processes) >= 2*nproc and len(sessions) == (2 if nproc == 1 else 4), 'the waiter, torchrun and two ranks, each in a session of its own'
    assert not any('compile_worker' in ' '.join(p.cmdline()) for p in processes), "torch's compiler has nothing to do"
    assert attach(run).stop().status == 'stopped'
    assert _left(run, sessions) == ([], [])
    last = checkpoints(run)[-1]
    assert is_whole(last, nproc) and int(last.name.split('-')[1]) == run.progress.step == read_log(run).current_steps.max()
    if nproc == 2: assert 'trainable params' in run.log(rank=0) and run.log(rank=1)
    before = run.progress
    run.resume().stop(patience=0)  # before its first step
    row = runs(run.output_dir.parent).set_index('run').loc['run']
    assert (row.state, row.step, row.of) == ('stopped', before.step, before.steps) and before.step >= 3

def test_a_run_that_has_not_begun_is_stopped_without_a_checkpoint(few_steps):
    run = launch(few_steps(max_steps=100_000))
    assert run.stop().status == 'stopped' and run.failure is None
    assert bool(checkpoints(run)) == bool(run.progress.step), 'unless a step was made meanwhile'

@pytest.fixture(scope='module')
def whole(tiny, data, tmp_path_factory):
    "A run on two ranks that nothing has interrupted, and a recipe for others like it."
    from qwen2vl_nb.recipe import train_recipe
    folder = tmp_path_factory.mktemp('whole')
    recipe = train_recipe(tiny, 'car_item', folder/'whole', dataset_dir=str(data), max_steps=60, logging_steps=2, save_steps=8, max_samples=32, bf16=None,
        gradient_accumulation_steps=1, preprocessing_num_workers=None, deepspeed=zero_config('z2'), learning_rate=1e-3, overwrite_output_dir=True)
    return launch(recipe, nproc=2).wait(), recipe

def test_a_killed_rank_is_made_up_for(whole, tmp_path):
    "kill -9 of a rank, the newest checkpoint torn as well, then resume: the joined curve is that of a run that nothing interrupted."
    reference, recipe = whole
    run = launch(recipe | {'output_dir': str(tmp_path/'run')}, nproc=2)
    _until(lambda: is_whole(run.output_dir/'checkpoint-8', 2) and run.progress.step >= 17 or not run.is_running)
    next(p for p in _processes(run) if p.environ().get('RANK') == '1').kill()
    with pytest.raises(RuntimeError, match='rank 1.*SIGKILL'): run.wait()
    assert run.status == 'failed' and not marked(state_or_empty(run, 'run.json')['id'])
    torn = checkpoints(run)[-1]
    (torn/'trainer_state.json').write_text('{"half of it')
    with pytest.warns(match=f'{torn.name} is incomplete: trainer_state.json'): run.resume()
    assert run.wait().status == 'done'
    assert _same(_losses(run), _losses(reference)), (_losses(run), _losses(reference))
    assert run.recipe == reference.recipe | {'overwrite_output_dir': False, 'output_dir': str(tmp_path/'run'), 'deepspeed': run.recipe['deepspeed']}
    assert not [*run.output_dir.glob('torn-*')], 'a checkpoint is never renamed'
    assert 'SIGKILL' in (run.output_dir/'earlier'/'1'/'run.log').read_text()
    row = runs(tmp_path).set_index('run').loc['run']
    assert (row.state, row.step, row.of) == ('done', 60, 60) and row.loss == _losses(run).iloc[-1]

@pytest.mark.soak
def test_a_stopped_run_goes_on(whole, tmp_path):
    reference, recipe = whole
    run = launch(recipe | {'output_dir': str(tmp_path/'run')}, nproc=2)
    _at_step(run, 5)
    stopped = run.stop().progress.step
    assert run.resume().wait().status == 'done'
    logged = _losses(run)
    assert _same(logged[logged.index > stopped + 1], _losses(reference)[lambda l: l.index > stopped + 1])
    assert list(_losses(reference).index) == [s for s in logged.index if s % 2 == 0], 'a stop off the log steps has a row of its own'

@pytest.mark.soak
def test_several_machines_go_on_at_another_address(few_steps):
    recipe = few_steps(max_steps=40, save_steps=5, deepspeed=zero_config('z2'), use_cpu=None)
    first, second = (f'127.0.0.1:{port}' for port in free_ports(2))
    ranks = [launch(recipe, nproc=1, nnodes=2, node_rank=rank, master=first) for rank in (0, 1)]
    _until(lambda: is_whole(ranks[0].output_dir/'checkpoint-5', 2) or not ranks[0].is_running)
    for run in ranks: run.stop(patience=0)
    again = [run.resume(master=second) for run in ranks]
    assert [run.wait().status for run in again] == ['done', 'done']
    assert all(second.split(':')[1] in state_or_empty(run, 'run.json')['command'] for run in again)

def test_there_must_be_something_to_go_on_from(few_steps):
    run = launch(few_steps(max_steps=100_000, save_steps=100_000))
    with pytest.raises(RuntimeError, match='is running'): run.resume()
    run.stop(patience=0)
    with pytest.raises(RuntimeError, match='no complete checkpoint'): run.resume()

def test_a_run_and_its_waiter_killed_is_no_running_run(few_steps):
    run = launch(few_steps(max_steps=100_000))
    for p in _processes(run): p.kill()
    _until(lambda: run.status != 'running')
    assert run.status == 'failed' and 'without leaving a reason' in run.failure.what

def test_a_run_whose_waiter_was_killed_is_stopped_all_the_same(few_steps):
    run = launch(few_steps(max_steps=100_000, deepspeed=zero_config('z0'), use_cpu=None), nproc=2)
    _at_step(run, 1)
    sessions = _sessions(_processes(run))
    _processes(run)[0].kill()
    assert run.is_running
    run.stop(patience=0)
    assert _left(run, sessions) == ([], [])

def test_another_environment_does_the_work(few_steps, tmp_path):
    "Its interpreter is named. Its path has a space, and it has LLaMA-Factory, but not this package."
    environment = tmp_path/'another environment'
    venv.create(environment)
    python = environment/'bin'/'python'
    (next(environment.glob('lib/python*/site-packages'))/'stack.pth').write_text(sysconfig.get_path('purelib'))
    assert subprocess.run([python, '-P', '-c', 'import qwen2vl_nb'], env=os.environ | {'PYTHONPATH': ''}, capture_output=True).returncode
    recipe = few_steps(deepspeed=zero_config('z0'), use_cpu=None, max_steps=2)
    run = launch(recipe, nproc=2, python=python, env={'PYTHONPATH': ''})
    _until(lambda: len(_processes(run)) >= 4 or not run.is_running)
    assert {Path(p.cmdline()[0]) for p in _processes(run)[1:] if 'run.rank' in p.cmdline()} == {python}
    assert run.wait().status == 'done' and len(_losses(run)) == 2

def test_a_merged_model_answers_as_base_and_adapter_did(few_steps, tiny, data, tmp_path):
    from qwen2vl_nb.prediction.engines import predict
    from qwen2vl_nb.recipe import predict_recipe
    run = launch(few_steps(max_steps=60, max_samples=100, learning_rate=2e-3, per_device_train_batch_size=8)).wait()
    asking = dict(dataset_dir=str(data), use_cpu=True, preprocessing_num_workers=None, max_samples=25, per_device_eval_batch_size=25, max_new_tokens=32)
    merged = export(run, tmp_path/'merged 合并')
    with pytest.raises(FileExistsError): export(run, merged)
    answers = [[row['predict'] for row in predict(predict_recipe(model, 'car_item_test', tmp_path/name, **asking | adapter))]
               for name, model, adapter in (('adapter', tiny, {'adapter': run}), ('merged', merged, {}))]
    assert answers[0] == answers[1] and len(set(answers[0])) > 1 and '{' in answers[0][0]
    assert sorted(p.name for p in tmp_path.glob('.merged*')) == []

def test_the_waiter_needs_the_standard_library_only(tmp_path):
    done = subprocess.run([sys.executable, '-I', '-S', *script('run.waiter', tmp_path)], capture_output=True, text=True)
    assert "'run.json'" in done.stderr.splitlines()[-1], 'it came to its work without any package'
