"Runs as processes: they outlive who started them, end when told to, and say why they failed."
import os, signal, subprocess, sys, time

import psutil
import pytest

from qwen2vl_nb import waiter
from qwen2vl_nb.recipe import save_recipe
from qwen2vl_nb.run import attach, launch
from qwen2vl_nb.zero import zero_config

def _processes(run):
    "The waiter of a run and all below it."
    w = psutil.Process(run._json('waiter.json')['pid'])
    return [w, *w.children(recursive=True)]

def _until(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, 'it took too long'
        time.sleep(.2)

def test_a_run_outlives_the_kernel_that_started_it(few_steps, tmp_path):
    "The kernel's whole process group is killed, as a Jupyter restart does."
    save_recipe(few_steps(), tmp_path/'r.yaml')
    code = f'from qwen2vl_nb.all import *\nrun = launch(load_recipe({str(tmp_path/"r.yaml")!r}))\nprint("started", flush=True)\nrun.wait()'
    kernel = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert kernel.stdout.readline().strip() == 'started'
    os.killpg(kernel.pid, signal.SIGKILL)
    kernel.wait()
    run = attach(tmp_path/'run')
    assert run.status == 'running'
    assert run.wait().status == 'done'
    assert (run.output_dir/'training_loss.png').exists() and run.recipe['max_steps'] == 4

def test_the_recipe_left_behind_runs_by_itself(few_steps, tmp_path):
    "Unchanged, under `llamafactory-cli train`, from another folder."
    run = launch(few_steps(overwrite_output_dir=True))
    run.wait()
    before = (run.output_dir/'trainer_log.jsonl').stat().st_mtime
    subprocess.run(['llamafactory-cli', 'train', run.output_dir/'recipe.yaml'], cwd=tmp_path, check=True, capture_output=True)
    assert (run.output_dir/'trainer_log.jsonl').stat().st_mtime > before

def test_two_ranks_end_together_when_stopped(few_steps):
    run = launch(few_steps(deepspeed=zero_config('z2'), use_cpu=None, max_steps=100_000), nproc=2)
    _until(lambda: (run.output_dir/'trainer_log.jsonl').exists())
    processes = _processes(run)
    assert len(processes) >= 4, 'waiter, torchrun and two ranks'
    assert attach(run).stop().status == 'stopped'
    assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert set(run._rank_logs()) == {0, 1} and 'trainable params' in run.log(rank=0)

def test_a_killed_rank_is_named(few_steps):
    run = launch(few_steps(deepspeed=zero_config('z0'), use_cpu=None, max_steps=100_000), nproc=2)
    _until(lambda: (run.output_dir/'trainer_log.jsonl').exists())
    rank = next(p for p in _processes(run) if p.environ().get('RANK') == '1')
    rank.kill()
    with pytest.raises(RuntimeError, match='Rank 1 was killed by SIGKILL') as e: run.wait()
    assert 'Out of host memory' in str(e.value)

def test_a_failure_says_its_cause(few_steps):
    run = launch(few_steps(lr_scheduler_type='cosinus'))
    with pytest.raises(RuntimeError, match='cosinus is not a valid SchedulerType'): run.wait()
    assert run.status == 'failed' and run.failure.startswith('ValueError')

def test_one_folder_one_run(few_steps):
    run = launch(few_steps(max_steps=100_000))
    try:
        with pytest.raises(RuntimeError, match='A run is at work'): launch(few_steps())
    finally: run.stop()
    assert run.status == 'stopped'

def test_a_run_and_its_waiter_killed_is_no_running_run(few_steps):
    run = launch(few_steps(max_steps=100_000))
    for p in _processes(run): p.kill()
    _until(lambda: run.status != 'running', 10)
    assert run.status == 'failed' and 'without a word' in run.failure

def test_the_waiter_needs_the_standard_library_only():
    code = f'import runpy, sys; runpy.run_path({waiter.__file__!r}); print(sorted(m for m in sys.modules if m.split(".")[0] in ("psutil", "pandas", "qwen2vl_nb")))'
    assert subprocess.check_output([sys.executable, '-I', '-c', code], text=True).strip() == '[]'
