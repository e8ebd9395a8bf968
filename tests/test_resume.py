"Stopped, killed and resumed: under every ZeRO config, on one rank and two, the joined curve is that of a run that nothing interrupted."
import json, os, re, shutil, signal, subprocess, sys, warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

from conftest import PATIENCE, until
from qwen2vl_nb.checkpoint import checkpoints, is_whole, why_not
from qwen2vl_nb.recipe import find_adapter
from qwen2vl_nb.run.folder import state_or_empty
from qwen2vl_nb.run.loss import read_log
from qwen2vl_nb.run.merge import export
from qwen2vl_nb.run.owner import _record_path
from qwen2vl_nb.run.start import Run, attach, launch, what_next
from qwen2vl_nb.run.watch import RunView, watch_loss
from qwen2vl_nb.zero import zero_config

STEPS = 40
KINDS = {'lora': {}, 'full': {}, 'freeze': dict(freeze_trainable_layers=1)}

@pytest.fixture(scope='module')
def in_fp32(tiny, tmp_path_factory):
    """The model with its weights in fp32. With `freeze`, LLaMA-Factory leaves what is frozen in bf16, and without autocast that fits nothing in fp32.
    With offload, DeepSpeed's CPU Adam keeps the powers of its betas as a running product, which a resumed run computes by `pow`: their last bits
    differ, and in bf16 that grows to 0.01 of loss within ten steps."""
    from safetensors.torch import load_file, save_file
    model = Path(shutil.copytree(tiny, tmp_path_factory.mktemp('model')/'fp32'))
    save_file({k: v.float() for k, v in load_file(model/'model.safetensors').items()}, model/'model.safetensors', {'format': 'pt'})
    (model/'config.json').write_text((model/'config.json').read_text().replace('bfloat16', 'float32'))
    return model

@pytest.fixture(scope='module')
def recipe(tiny, in_fp32, data):
    from qwen2vl_nb.recipe import train_recipe
    def make(output_dir, zero=None, kind='lora', **changes):
        where = dict(deepspeed=zero_config(zero)) if zero else dict(use_cpu=True)
        return train_recipe(in_fp32 if kind == 'freeze' or zero and 'offload' in zero else tiny, 'car_item', output_dir, **dict(dataset_dir=str(data), finetuning_type=kind, max_steps=STEPS, max_samples=16, logging_steps=1, save_steps=3,
            save_total_limit=3, bf16=None, gradient_accumulation_steps=1, preprocessing_num_workers=None, learning_rate=1e-3, plot_loss=None) | KINDS[kind] | where | changes)
    return make

def _losses(run): return read_log(run).dropna(subset=['loss']).set_index('current_steps').loss

@pytest.fixture(scope='module')
def reference(recipe, tmp_path_factory):
    "The losses of a run that nothing interrupted, by config, number of ranks, kind and number of steps."
    @cache
    def of(zero, ranks, kind='lora', steps=STEPS):
        return _losses(launch(recipe(tmp_path_factory.mktemp('reference')/'run', zero, kind, max_steps=steps), nproc=ranks).wait())
    return of

def _kill(run):
    "kill -9 of a rank."
    below = psutil.Process(state_or_empty(run, 'waiter.json')['pid']).children(recursive=True)
    max((p for p in below if 'run.rank' in p.cmdline() and 'run.agent' not in p.cmdline()), key=lambda p: p.pid).kill()

def _interrupt(run, how):
    "Stop or kill a run once it has a checkpoint from this start and is a step further."
    first = state_or_empty(run, 'progress.json').get('from_step', 0)
    until(lambda: run.progress.step > first + 3 and any(is_whole(c) or is_whole(c, 2) for c in checkpoints(run)) or not run.is_running)
    assert run.is_running, run.failure
    run.stop() if how == 'stop' else _kill(run)
    until(lambda: not run.is_running)
    assert run.status == ('stopped' if how == 'stop' else 'failed'), run.failure

def _joined(run, reference):
    losses = _losses(run)
    assert list(losses.index) == list(reference.index)
    assert (losses - reference).abs().max() <= 2e-4, (losses - reference).abs()

def _through(run, ranks, reference, hows):
    "A run through its interruptions, to its end."
    for how in hows:
        _interrupt(run, how)
        with warnings.catch_warnings(record=True): run.resume()
        until(lambda: run.progress.begin or not run.is_running)
        assert run.progress.begin >= 3 and not list(run.output_dir.glob('torn-*'))
    assert run.wait().status == 'done'
    _joined(run, reference)
    assert len(checkpoints(run)) <= 3 and is_whole(checkpoints(run)[-1], ranks)

ONCE = {'z0-1-lora': ('z0', 1, 'lora'), 'z2_offload-1-lora': ('z2_offload', 1, 'lora'), 'z3-1-lora': ('z3', 1, 'lora'),
        'z3_offload-1-lora': ('z3_offload', 1, 'lora'), 'None-2-full': (None, 2, 'full')}

def _killed_and_resumed(recipe, ranks):
    "A run that is killed in its third epoch and resumed in the middle of its second; and the losses that it had when it was killed."
    run = launch(recipe, nproc=ranks)
    until(lambda: run.progress.step >= 10 and is_whole(run.output_dir/'checkpoint-6', ranks) or not run.is_running)
    _kill(run)
    until(lambda: not run.is_running)
    killed = _losses(run)
    for later in checkpoints(run)[1:]: shutil.rmtree(later)  # it may have come as far as 12 and 18
    return run.resume().wait(), killed

@pytest.fixture(scope='module')
def once(request, recipe, tmp_path_factory):
    "The runs that were asked for, by config, two at a time: each is there, or will be."
    pool, found = ThreadPoolExecutor(2), {}
    for name in [item.callspec.params['name'] for item in request.session.items if item.originalname == 'test_each_config_once']:
        zero, ranks, kind = ONCE[name]
        steps = dict(max_steps=24, max_samples=4*ranks, save_steps=6, save_total_limit=None)
        found[name] = pool.submit(_killed_and_resumed, recipe(tmp_path_factory.mktemp('once')/'run', zero, kind, **steps), ranks)
    yield found
    pool.shutdown(cancel_futures=True)

@pytest.mark.parametrize('name', ONCE)
def test_each_config_once(name, once):
    "The steps that are done twice have the same losses. `make soak` has the whole product."
    (run, killed), ranks = once[name].result(), ONCE[name][1]
    losses = _losses(run)
    assert run.status == 'done' and run.progress.begin == 6 and len(killed) >= 8 and list(losses.index) == list(range(1, 25))
    assert (losses - killed).abs().max() <= 2e-4, losses - killed
    assert is_whole(checkpoints(run)[-1], ranks)

@pytest.mark.soak
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('ranks', [1, 2])
@pytest.mark.parametrize('zero', [None, 'z0', 'z2', 'z2_offload', 'z3', 'z3_offload'])
def test_every_config_stopped_and_killed(zero, ranks, kind, recipe, reference, data, tmp_path):
    expected = reference(zero, ranks, kind)
    run = launch(recipe(tmp_path/'run', zero, kind), nproc=ranks)
    _through(run, ranks, expected, ['stop', 'kill'])
    _used(run, kind, data, tmp_path)

def _used(run, kind, data, tmp_path):
    "What the README does with a run that has ended: it is looked at, predicts, and becomes a model."
    from qwen2vl_nb.prediction.engines import predict
    from qwen2vl_nb.recipe import predict_recipe
    from qwen2vl_nb.run.watch import watch_loss
    watch_loss(run)
    asking = dict(dataset_dir=str(data), use_cpu=True, preprocessing_num_workers=None, max_samples=4, max_new_tokens=8)
    def answers(name, model, **given): return [row['predict'] for row in predict(predict_recipe(model, 'car_item_test', tmp_path/name, **asking | given))]
    if kind == 'lora': assert answers('adapter', run.recipe['model_name_or_path'], adapter=run) == answers('merged', export(run, tmp_path/'merged'))
    else:
        assert len(answers('whole', run)) == 4
        with pytest.raises(FileNotFoundError, match='pass its folder as the model'): export(run, tmp_path/'merged')

# bf16, which LLaMA-Factory leaves to GPUs: DeepSpeed itself trains so on the CPU

_bf16 = '''
import os, sys, torch, deepspeed
from qwen2vl_nb.run import rank as worker
folder, stage = sys.argv[1], int(sys.argv[2])
config = dict(train_micro_batch_size_per_gpu=1, zero_optimization=dict(stage=stage), zero_allow_untested_optimizer=True, bf16=dict(enabled=True))

def engine():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=.1), config=config)[0]

def steps(engine, n):
    losses = []
    for _ in range(n):
        loss = engine(torch.ones(1, 4, dtype=torch.bfloat16)).float().pow(2).sum()
        engine.backward(loss)
        engine.step()
        engine.module.zero_grad()  # as the Trainer does; in bf16 at stage 0 DeepSpeed leaves it to the caller
        losses.append(loss.item())
    return losses

def loaded(name):
    e = engine()
    e.load_checkpoint(f'{folder}/{name}', load_module_strict=False)
    return e

first = engine()
steps(first, 3)
first.save_checkpoint(f'{folder}/old')  # as DeepSpeed does by itself
worker._save_bf16_optimizer()
first.save_checkpoint(f'{folder}/new')
old = loaded('old')
weights = next(old.module.parameters()).clone()
fresh = [p for group in getattr(old.optimizer, 'fp32_groups', []) for p in group]
print('same', all(torch.equal(p.bfloat16(), q) for p, q in zip(fresh, old.module.parameters())), torch.equal(weights, next(first.module.parameters())))
print('went on', steps(first, 3))
print('resumed', steps(loaded('new'), 3))
'''

@pytest.mark.parametrize('stage', [0, pytest.param(2, marks=pytest.mark.soak)])
def test_bf16_resumes_with_its_optimizer(stage, tmp_path):
    "At stage 0 DeepSpeed 0.18.4 leaves it out, and the step after a resume takes the model back to its first weights."
    (tmp_path/'bf16.py').write_text(_bf16)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '1', tmp_path/'bf16.py', tmp_path, str(stage)]
    extensions = Path.home()/'.cache'/'torch_extensions'/f'torch_{version("torch")}'  # where `launch` has DeepSpeed's compiled parts
    done = subprocess.run(command, capture_output=True, text=True, env={'TORCH_EXTENSIONS_DIR': str(extensions)} | os.environ)
    said = dict(line.partition(' ')[::2] for line in done.stdout.splitlines() if line.startswith(('same', 'went', 'resumed')))
    assert not done.returncode, done.stderr[-3000:]
    assert said['same'] == 'True True' and said['went'].removeprefix('on ') == said['resumed'], said
    assert not _states_fault(tmp_path/'new', stage)

def _states_fault(folder, stage):
    "What is wrong with the states that DeepSpeed has just written, in the words of the package."
    shutil.copytree(folder, folder/'..'/'checkpoint-3')
    folder = folder.parent/'checkpoint-3'
    (folder/'trainer_state.json').write_text('{}')
    other = why_not(folder, 2)
    assert bool(other) == bool(stage) and ('1 rank(s) only' in other) == bool(stage)
    return why_not(folder, 1)

# Compiled parts of DeepSpeed's

_compile = """
import sys
from torch.utils.cpp_extension import load
from qwen2vl_nb.run import rank as worker
worker._compile_under_lock()
load('two', ['two.cpp'], build_directory='.', is_python_module=False)
"""

def test_a_compile_that_was_killed_is_done_again(tmp_path):
    "torch alone waits for it: its lock is a file, which stays."
    (tmp_path/'two.cpp').write_text('extern "C" int two() { return 2; }')
    compiler = tmp_path/'never-ready'
    compiler.write_text('#!/bin/sh\ncase "$*" in *-dumpfullversion*|*-v*) exec c++ "$@";; esac\necho $$ > compiling\nexec sleep 1000\n')
    compiler.chmod(0o755)
    start = lambda **env: subprocess.Popen([sys.executable, '-c', _compile], cwd=tmp_path, env=os.environ | env, start_new_session=True)
    first = start(CXX=str(compiler))
    until(lambda: (tmp_path/'compiling').exists() and (tmp_path/'compiling').read_text().strip() or first.poll() is not None)
    assert first.poll() is None and (tmp_path/'lock').exists()
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    os.kill(int((tmp_path/'compiling').read_text()), signal.SIGKILL)  # ninja puts the compiler into a group of its own
    assert (tmp_path/'lock').exists() and start().wait(PATIENCE) == 0
    assert (tmp_path/'two.so').exists() and not (tmp_path/'lock').exists()

# From which checkpoint

@pytest.fixture(scope='module')
def stopped(recipe, tmp_path_factory):
    "A run with three checkpoints that could be resumed, and that nobody resumes: tests work on copies."
    folder = tmp_path_factory.mktemp('stopped')/'run'
    run = launch(recipe(folder, max_steps=100_000, save_steps=1))
    until(lambda: len([c for c in checkpoints(run) if is_whole(c)]) >= 3 or not run.is_running)
    return run.stop()

@pytest.fixture
def resumed(stopped, tmp_path, monkeypatch):
    "`resumed(change)`: what a resume of a copy, changed, starts, as (its command, its warnings). It starts nothing."
    from qwen2vl_nb.run import start as module
    shutil.copytree(stopped.output_dir, tmp_path/'run')
    for name in ('run.json', 'recipe.yaml'):
        text = (tmp_path/'run'/name).read_text(encoding='utf-8').replace(str(stopped.output_dir), str(tmp_path/'run'))
        (tmp_path/'run'/name).write_text(text.replace('max_steps: 100000', 'max_steps: 1000'), encoding='utf-8')
    started = []
    monkeypatch.setattr(module, 'start', lambda recipe, about, make_room, command: started.append(command) or attach(about['cwd']))
    def resume(change=lambda run: None, trust=True):
        run = attach(tmp_path/'run')
        change(run)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            run.resume(trust=trust)
        return started[-1][-1], [str(w.message) for w in said]
    return resume

def _damage(file):
    "One byte in the middle of a file is another one."
    content = bytearray(file.read_bytes())
    content[len(content)//2] ^= 0xff
    file.write_bytes(content)

def test_the_newest_complete_checkpoint_is_named_to_llamafactory(resumed, stopped):
    command, said = resumed()
    assert command == f'resume_from_checkpoint={checkpoints(stopped)[-1].name}' and not said

def test_the_training_data_is_read_once_and_noted_as_it_was_compared(resumed, stopped, monkeypatch):
    from qwen2vl_nb.run import learned as module
    read, digest = [], module.file_digest
    monkeypatch.setattr(module, 'file_digest', lambda path, **options: read.append(path) or digest(path, **options))
    command, said = resumed()
    assert command and not said and len(read) == len(state_or_empty(stopped, 'run.json')['data']) == 1

@pytest.mark.parametrize('what, word', [(_damage, 'is damaged'), (lambda file: file.write_bytes(file.read_bytes()[:-100]), 'is cut off'), (Path.unlink, 'is missing')])
def test_a_damaged_checkpoint_is_passed_over_and_left_alone(what, word, resumed, stopped):
    before, last = checkpoints(stopped)[-2:]
    command, [said] = resumed(lambda run: what(run.output_dir/last.name/'optimizer.pt'))
    assert command == f'resume_from_checkpoint={before.name}'
    assert f'{last.name} is incomplete: optimizer.pt {word}' in said

def test_checkpoints_that_an_earlier_version_renamed_are_found(resumed, stopped):
    def rename(run):
        for c in checkpoints(run): c.rename(run.output_dir/f'torn-{c.name}')
    assert resumed(rename) == (f'resume_from_checkpoint=torn-{checkpoints(stopped)[-1].name}', [])

def test_without_a_complete_checkpoint_it_says_what_is_wrong_with_each(resumed, stopped):
    def damage(run):
        for c in checkpoints(run): _damage(c/'optimizer.pt')
    with pytest.raises(RuntimeError, match=f'no complete checkpoint(?s:.*){checkpoints(stopped)[0].name} is incomplete: optimizer.pt is damaged'): resumed(damage)

def test_checkpoints_of_an_earlier_run_in_the_folder_are_passed_over(resumed, recipe, stopped):
    "They may have higher numbers than those of a run that has begun again with overwrite_output_dir."
    from qwen2vl_nb.run.start import _stale
    before, last = checkpoints(stopped)[-2:]
    def begin_again(run):
        about = state_or_empty(run, 'run.json') | {'stale': _stale(recipe(run.output_dir, overwrite_output_dir=True))}
        (run.output_dir/'run.json').write_text(json.dumps(about))
        os.utime(run.output_dir/before.name/'trainer_state.json', (1, 1))  # as if it had been written since
    assert resumed(begin_again) == (f'resume_from_checkpoint={before.name}', [f'Resuming from {before.name}. {last.name} was written by an earlier run in this folder.'])

def test_the_adapter_of_a_run_that_was_started_anew_is_its_own(recipe, tmp_path):
    "Neither the weights that the earlier run has left in the folder nor its later checkpoints."
    folder = tmp_path/'run'
    assert find_adapter(launch(recipe(folder, max_steps=2, save_steps=1)).wait()) == folder
    (folder/'checkpoint-2').rename(folder/'checkpoint-900000')
    again = launch(recipe(folder, max_steps=100_000, save_steps=1, save_total_limit=None, overwrite_output_dir=True))
    began, stale = (folder/'run.json').stat().st_mtime, state_or_empty(again, 'run.json')['stale']
    assert sorted(stale) == ['.', 'checkpoint-1', 'checkpoint-900000']
    until(lambda: is_whole(folder/'checkpoint-2') or not again.is_running)
    while_at_work, after = find_adapter(again), find_adapter(again.stop())
    for found in (while_at_work, after): assert (found/'adapter_model.safetensors').stat().st_mtime > began, found

@pytest.mark.parametrize('changes, first', [({}, None), (dict(overwrite_output_dir=True), 0), (dict(resume_from_checkpoint=False), 0), (dict(resume_from_checkpoint=True), None),
                                            (dict(resume_from_checkpoint='1', overwrite_output_dir=True), 2)])
def test_which_checkpoints_a_run_builds_on(changes, first, recipe, stopped):
    "As LLaMA-Factory takes them: without overwrite_output_dir it resumes by itself from the last one."
    from qwen2vl_nb.run.start import _stale
    found = checkpoints(stopped)
    if isinstance(start := changes.get('resume_from_checkpoint'), str): changes = changes | {'resume_from_checkpoint': str(found[int(start)])}
    assert list(_stale(recipe(stopped.output_dir, **changes))) == ([] if first is None else [*(c.name for c in found[first:]), '.'])

def _with_states(run, ranks, stage):
    "The checkpoints of a run as DeepSpeed writes them on more ranks."
    import torch
    for c in checkpoints(run):
        states = c/f'global_step{c.name.partition("-")[2]}'
        states.mkdir()
        (c/'latest').write_text(states.name)
        torch.save({'dp_world_size': ranks, 'mp_world_size': 1, 'ds_config': {'zero_optimization': {'stage': stage}}}, states/'mp_rank_00_model_states.pt')
        for rank in range(ranks if stage else 0): torch.save({}, states/f'zero_pp_rank_{rank}_mp_rank_00_optim_states.pt')

def test_a_checkpoint_for_more_ranks_is_said_to_need_them(resumed, stopped):
    "DeepSpeed refuses another number of ranks from stage 1 on, and takes any at stage 0."
    with pytest.raises(RuntimeError, match='is complete, but DeepSpeed can load it on 4 rank'): resumed(lambda run: _with_states(run, 4, 2))

def test_a_checkpoint_of_stage_0_suits_any_number_of_ranks(resumed, stopped):
    assert resumed(lambda run: _with_states(run, 4, 0)) == (f'resume_from_checkpoint={checkpoints(stopped)[-1].name}', [])

@pytest.mark.parametrize('changes, word', [(dict(stage='ppo'), 'ppo with lora'), (dict(stage='rm', finetuning_type='full'), 'rm with full'), (dict(save_only_model=True, deepspeed='ds.json'), 'save_only_model')])
def test_what_llamafactory_cannot_resume_is_said(changes, word, resumed):
    from qwen2vl_nb.recipe import load_recipe, save_recipe
    with pytest.raises(RuntimeError, match=word): resumed(lambda run: save_recipe(load_recipe(run.output_dir/'recipe.yaml') | changes, run.output_dir/'recipe.yaml'))

@pytest.mark.parametrize('old', ['gone', 'still there'])
def test_a_run_that_was_moved_or_copied_is_resumed_where_it_is(old, stopped, tmp_path):
    "Its files name the folder that it was started in; a run that is still there is not touched."
    first = Path(shutil.copytree(stopped.output_dir, tmp_path/'first'))
    steps = int(checkpoints(first)[-1].name.rpartition('-')[2]) + 2
    for name in ('run.json', 'recipe.yaml'):
        text = (first/name).read_text(encoding='utf-8').replace(str(stopped.output_dir), str(first))
        (first/name).write_text(text.replace('max_steps: 100000', f'max_steps: {steps}'), encoding='utf-8')
    content = lambda: {p.relative_to(first): p.read_bytes() for p in first.rglob('*') if p.is_file()}
    before, moved = content(), tmp_path/'moved'
    if old == 'gone': first.rename(moved)
    else: shutil.copytree(first, moved)
    run = attach(moved).resume(trust=True).wait()
    assert (run.output_dir, run.status, run.progress.step) == (moved, 'done', steps)
    assert run.recipe['output_dir'] == str(moved) and (moved/f'checkpoint-{steps}').is_dir()
    assert content() == before if old != 'gone' else not first.exists()

# Whose run it is

def test_a_run_that_nobody_here_started_is_resumed_only_with_trust(resumed, tmp_path):
    with pytest.raises(RuntimeError, match=r'no run in this folder is listed(?s:.*)would execute .*python.*pickles.*trust=True'): resumed(trust=False)
    assert attach(tmp_path/'run').status == 'stopped', 'to look is free'
    resumed(trust=True)

def test_a_run_json_that_was_changed_is_resumed_only_with_trust(resumed, tmp_path):
    from qwen2vl_nb.run.owner import note_start
    note_start(tmp_path/'run')
    resumed(trust=False)
    def change(run): (run.output_dir/'run.json').write_text((run.output_dir/'run.json').read_text().replace('"python": "', '"python": "/elsewhere'))
    with pytest.raises(RuntimeError, match='run.json was changed(?s:.*)would execute /elsewhere'): resumed(change, trust=False)

@pytest.mark.parametrize('name', ['run.json', 'recipe.yaml', '.'])
def test_a_run_of_another_user_is_resumed_only_with_trust(name, resumed, tmp_path, monkeypatch):
    from qwen2vl_nb.run.owner import note_start
    note_start(tmp_path/'run')
    stat, path = Path.stat, tmp_path/'run'/name
    def of_another(self, **kwargs):
        found = stat(self, **kwargs)
        return os.stat_result([*found[:4], found.st_uid + 1, *found[5:]]) if self == path else found
    monkeypatch.setattr(Path, 'stat', of_another)
    with pytest.raises(RuntimeError, match='belongs to the user'): resumed(trust=False)

def test_notes_of_starts_are_private_and_forgotten_with_their_folders(tmp_path):
    from qwen2vl_nb.run.owner import note_start
    folders = [tmp_path/'a', tmp_path/'b']
    for folder in folders:
        folder.mkdir()
        (folder/'run.json').write_text('{}')
        note_start(folder)
    assert all(_record_path(f).stat().st_mode & 0o777 == 0o600 for f in folders)
    shutil.rmtree(folders[0])
    note_start(folders[1])
    assert [_record_path(f).exists() for f in folders] == [False, True]
    (_record_path(folders[1]).parent/'broken.json').write_text('no JSON')
    note_start(folders[1])
    assert json.loads(_record_path(folders[1]).read_text())['folder'] == str(folders[1])

# torchrun starts the ranks again

def test_ranks_that_were_started_again_pass_over_a_damaged_checkpoint(recipe, reference, stopped, tmp_path):
    "And one of an earlier run. All of them load the same one; the run goes on with one curve, and says in its log what was passed over."
    expected = reference(None, 2, steps=24)
    shutil.copytree(checkpoints(stopped)[-1], tmp_path/'run'/'checkpoint-99')
    run = launch(recipe(tmp_path/'run', max_steps=24, save_total_limit=None, overwrite_output_dir=True), nproc=2, env={'MAX_RESTARTS': '1'})
    until(lambda: len([c for c in checkpoints(run) if is_whole(c, 2)]) >= 3 or not run.is_running)
    below = [p for p in psutil.Process(state_or_empty(run, 'waiter.json')['pid']).children(recursive=True) if 'run.rank' in p.cmdline() and 'RANK' in p.environ()]
    for p in below: p.suspend()
    last = [c for c in checkpoints(run) if (c/'trainer_state.json').exists()][-2]
    _damage(last/'optimizer.pt')
    for p in below: p.kill()
    assert run.wait().status == 'done'
    _joined(run, expected)
    said = ''.join((f/'stdout.log').read_text() for f in run.output_dir.glob('ranks/*/attempt_1/0'))
    assert f'{last.name} is incomplete: optimizer.pt is damaged.' in said and 'resume from' in said
    assert 'checkpoint-99 was written by an earlier run in this folder.' in said
    assert is_whole(last, 2), 'it was written again'

@pytest.mark.parametrize('ranks', [1, 2])
def test_batches_are_skipped_in_the_order_of_their_epoch(ranks):
    "accelerate alone takes the rest of the rows from the order of the first epoch, on one rank."
    from accelerate.data_loader import prepare_data_loader, skip_first_batches
    from torch.utils.data import DataLoader
    from qwen2vl_nb.run.rank import keeping_epoch
    def rows(loader): return [row for batch in loader for row in batch.tolist()]
    def loader():
        made = prepare_data_loader(DataLoader(range(32), shuffle=True), num_processes=ranks, process_index=0, use_seedable_sampler=True, data_seed=1, put_on_device=False)
        made.set_epoch(1)
        return made
    expected = rows(loader())[3:]
    assert rows(keeping_epoch(skip_first_batches)(loader(), 3)) == expected
    if ranks == 1: assert rows(skip_first_batches(loader(), 3)) != expected, 'accelerate has mended it: keeping_epoch can go'

@pytest.mark.parametrize('method', ['_load_from_checkpoint', '_load_best_model'])
def test_weights_are_loaded_under_the_names_that_they_are_saved_under(method, tiny, tmp_path):
    "transformers alone loads none of them."
    import torch
    from transformers import Qwen2VLForConditionalGeneration, Trainer, TrainingArguments
    from qwen2vl_nb.run.rank import renaming_weights
    trained = Qwen2VLForConditionalGeneration.from_pretrained(tiny)
    with torch.no_grad(): [p.add_(1) for p in trained.parameters()]
    trained.save_pretrained(tmp_path/'checkpoint-1')
    def is_loaded(load):
        trainer = Trainer(Qwen2VLForConditionalGeneration.from_pretrained(tiny), TrainingArguments(tmp_path/'out', use_cpu=True, report_to='none'))
        trainer.state.best_model_checkpoint = str(tmp_path/'checkpoint-1')
        load(trainer, *[str(tmp_path/'checkpoint-1')]*(method == '_load_from_checkpoint'))
        return all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), trained.parameters()))
    assert is_loaded(renaming_weights(getattr(Trainer, method)))
    assert not is_loaded(getattr(Trainer, method)), 'transformers has mended it: renaming_weights can go'

def test_a_run_that_ended_early_says_what_can_be_done(stopped, tmp_path, capsys):
    "In words that come from one place: when it is stopped, when it is waited for, and in its view."
    run = Run(shutil.copytree(stopped.output_dir, tmp_path/'run'))
    last = checkpoints(run)[-1].name
    said = f'resume() continues from {last}; score_checkpoints(run, …) scores the answers that it gives so far.'
    assert what_next(run) == said and what_next(run, '"Resume"').startswith(f'"Resume" continues from {last};')
    watch_loss(run)
    assert capsys.readouterr().out.splitlines()[-1] == said
    run.stop()  # also of one that has ended
    assert said in capsys.readouterr().out
    view = RunView(run)
    view._refresh(True)
    assert f'&quot;Resume&quot; continues from {last};' in view._next.value and view._next.layout.display is None
    (run.output_dir/'ended.json').write_text('{"returncode": 1, "asked": false}')
    with pytest.raises(RuntimeError, match=re.escape(said)): run.wait()
    for checkpoint in checkpoints(run): shutil.rmtree(checkpoint)
    assert what_next(run) == 'There is no complete checkpoint: launch(recipe) starts from the beginning.'
