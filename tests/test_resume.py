"Stopped, killed and resumed: under every ZeRO config, on one rank and two, the joined curve is that of a run that nothing interrupted."
import json, os, shutil, subprocess, sys, warnings
from pathlib import Path

import psutil
import pytest

from conftest import until
from qwen2vl_nb.checkpoint import checkpoints, is_whole, newest_complete
from qwen2vl_nb.loss import read_log
from qwen2vl_nb.run import _note, attach, export, launch
from qwen2vl_nb.zero import zero_config

STEPS = 40
KINDS = {'lora': {}, 'full': {}, 'freeze': dict(freeze_trainable_layers=1)}

@pytest.fixture(scope='module')
def recipe(tiny, data):
    from qwen2vl_nb.recipe import train_recipe
    def make(output_dir, zero=None, kind='lora', **changes):
        where = dict(deepspeed=zero_config(zero)) if zero else dict(use_cpu=True)
        return train_recipe(tiny, 'car_item', output_dir, **dict(dataset_dir=str(data), finetuning_type=kind, max_steps=STEPS, max_samples=16, logging_steps=1, save_steps=3,
            save_total_limit=3, bf16=None, gradient_accumulation_steps=1, preprocessing_num_workers=None, learning_rate=1e-3, plot_loss=None) | KINDS[kind] | where | changes)
    return make

def _losses(run): return read_log(run).dropna(subset=['loss']).set_index('current_steps').loss

@pytest.fixture(scope='module')
def reference(recipe, tmp_path_factory):
    "The losses of a run that nothing interrupted, by number of ranks and kind."
    made = {}
    def of(ranks, kind):
        if (ranks, kind) not in made: made[ranks, kind] = _losses(launch(recipe(tmp_path_factory.mktemp('reference')/'run', None, kind), nproc=ranks).wait())
        return made[ranks, kind]
    return of

def _kill(run):
    "kill -9 of a rank."
    below = psutil.Process(run._json('waiter.json')['pid']).children(recursive=True)
    max((p for p in below if 'worker.py' in ' '.join(p.cmdline()) and 'torch.distributed.run' not in p.cmdline()), key=lambda p: p.pid).kill()

def _interrupt(run, how):
    "Stop or kill a run once it has a checkpoint from this start and is a step further."
    first = run._json('progress.json').get('from_step', 0)
    until(lambda: run.progress.step > first + 3 and any(is_whole(c) or is_whole(c, 2) for c in checkpoints(run)) or not run.is_running, 900)
    assert run.is_running, run.failure
    run.stop() if how == 'stop' else _kill(run)
    until(lambda: not run.is_running, 900)
    assert run.status == ('stopped' if how == 'stop' else 'failed'), run.failure

def _joined(run, reference):
    losses = _losses(run)
    assert list(losses.index) == list(range(1, STEPS + 1))
    assert (losses - reference).abs().max() <= 2e-4, (losses - reference).abs()

def _through(run, ranks, reference, hows):
    "A run through its interruptions, to its end."
    for how in hows:
        _interrupt(run, how)
        with warnings.catch_warnings(record=True): run.resume()
        until(lambda: run.progress.begin or not run.is_running, 900)
        assert run.progress.begin >= 3 and not list(run.output_dir.glob('torn-*'))
    assert run.wait().status == 'done'
    _joined(run, reference)
    assert len(checkpoints(run)) <= 3 and is_whole(checkpoints(run)[-1], ranks)

@pytest.mark.parametrize('zero, ranks, how', [('z0', 1, 'stop'), ('z2_offload', 1, 'kill'), ('z3', 1, 'stop'), ('z3_offload', 1, 'kill'), (None, 2, 'kill')])
def test_each_config_once(zero, ranks, how, recipe, reference, tmp_path):
    _through(launch(recipe(tmp_path/'run', zero), nproc=ranks), ranks, reference(ranks, 'lora'), [how])

@pytest.mark.soak
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('ranks', [1, 2])
@pytest.mark.parametrize('zero', [None, 'z0', 'z2', 'z2_offload', 'z3', 'z3_offload'])
def test_every_config_stopped_and_killed(zero, ranks, kind, recipe, reference, tmp_path):
    _through(launch(recipe(tmp_path/'run', zero, kind), nproc=ranks), ranks, reference(ranks, kind), ['stop', 'kill'])
