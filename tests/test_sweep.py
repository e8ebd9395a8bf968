"Sweeps: trained side by side, killed and continued, ranked by answers or by evaluations; a run that fails is a row."
import json, os, re, signal, subprocess, sys, warnings

import numpy as np
import pandas as pd
import psutil
import pytest

from conftest import ROOT, until
from qwen2vl_nb.data.registry import Registry, dataset_samples
from qwen2vl_nb.prediction.engines import predict
from qwen2vl_nb.prediction.predictions import Predictions
from qwen2vl_nb.recipe import argument_names, find_adapter, predict_recipe, save_recipe
from qwen2vl_nb.run.folder import RUN, state_or_empty
from qwen2vl_nb.run.loss import plot_loss, read_log
from qwen2vl_nb.run.start import attach, launch
from qwen2vl_nb.tuning.checkpoints import score_checkpoints
from qwen2vl_nb.tuning.sweeps import combinations, gpu_groups, sweep

EVALUATED = dict(val_size=.25, eval_strategy='steps', eval_steps=2)
ASKING = dict(max_samples=6, max_new_tokens=8)

def test_no_argument_of_sweep_hides_one_of_llamafactory():
    import inspect
    assert not set(inspect.signature(sweep).parameters) & set(argument_names())

def test_runs_side_by_side_one_of_which_fails(few_steps, tmp_path):
    "The failed run is a row that says why; the best is a recipe; the curves are named by what differs."
    base = few_steps(**EVALUATED, plot_loss=None)
    found = sweep(base, at_once=2, learning_rate=[1e-5, 3e-3], lora_target=['q_proj', 'no_such_layer'])
    table = found.table
    assert list(table.state) == ['done', 'done', 'failed', 'failed'] and list(table.index[:2]) == [2, 0]
    assert table.eval_loss[2] < table.eval_loss[0] and table.eval_loss.isna().tolist() == [False, False, True, True]
    assert 'No `target_modules` passed' in table.why[1] and not table.why[0]
    assert found.best['learning_rate'] == 3e-3 and found.best == combinations(base, dict(learning_rate=[1e-5, 3e-3], lora_target=['q_proj', 'no_such_layer']))[2].recipe
    started = [state_or_empty(trial.run, 'waiter.json')['started'] for trial in found.trials]
    ended = [state_or_empty(trial.run, 'ended.json')['time'] for trial in found.trials]
    assert sum(a <= b < c for a, c in zip(started, ended) for b in started) > len(started)  # some ran at the same time
    assert [text.get_text() for text in plot_loss(found.runs).legends[0].get_texts()] == ['learning_rate 1e-05', 'learning_rate 0.003']
    again = sweep(base, only=[], learning_rate=[1e-5, 3e-3], lora_target=['q_proj', 'no_such_layer'])
    assert again.table.drop(columns='why').equals(table.drop(columns='why'))
    assert not any(p.is_file() for p in (tmp_path/'run').iterdir())  # a sweep has no files of its own

_kernel = '''
import sys
from qwen2vl_nb.all import *
sweep(load_recipe(sys.argv[1]), 'car_item_test', asking=dict(max_samples=6, max_new_tokens=8), learning_rate=[1e-5, 3e-3])
'''

def test_killed_with_its_run_and_continued(few_steps, tmp_path):
    "kill -9 of the kernel and of the run that it had started: the next call resumes that run, trains what is missing, and predicts."
    base = few_steps(max_steps=40, save_steps=3, save_total_limit=2, plot_loss=None)
    save_recipe(base, tmp_path/'recipe.yaml')
    kernel = subprocess.Popen([sys.executable, '-c', _kernel, tmp_path/'recipe.yaml'], start_new_session=True, stdout=subprocess.DEVNULL)
    first, second = (trial.run for trial in combinations(base, dict(learning_rate=[1e-5, 3e-3])))
    until(lambda: [*first.output_dir.glob('checkpoint-*/trainer_state.json')] and first.progress.step > 4 or kernel.poll() is not None)
    os.killpg(kernel.pid, signal.SIGKILL)
    kernel.wait()
    assert first.status == 'running' and not second.output_dir.exists()  # it outlives the kernel
    waiter = psutil.Process(state_or_empty(first, 'waiter.json')['pid'])
    for p in [waiter, *waiter.children(recursive=True)]: p.kill()
    until(lambda: not first.is_running)
    found = sweep(base, 'car_item_test', asking=ASKING, at_once=2, learning_rate=[1e-5, 3e-3])
    assert [run.status for run in found.runs] == ['done', 'done']
    assert first.progress.begin >= 3 and second.progress.begin == 0
    assert read_log(first).dropna(subset=['loss']).current_steps.tolist() == list(range(1, 41))
    table = found.table
    assert found.measure == 'json' and not any(table.why) and (table.low <= table.json).all() and (table.json <= table.high).all()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/'run').rglob('*') if p.name in ('run.json', 'predictions.jsonl')}
    assert len(before) == 6 and sweep(base, 'car_item_test', asking=ASKING, learning_rate=[1e-5, 3e-3]).table.equals(table)
    assert {p: p.stat().st_mtime_ns for p in before} == before  # nothing was trained or asked again
    moved = (tmp_path/'run').rename(tmp_path/'moved')
    assert sweep(base | {'output_dir': str(moved)}, 'car_item_test', asking=ASKING, learning_rate=[1e-5, 3e-3]).table.equals(table)
    assert all((moved/p.relative_to(tmp_path/'run')).stat().st_mtime_ns == time for p, time in before.items())

def test_rows_that_change_between_two_calls_are_told(few_steps, data, tmp_path):
    "The runs that were trained with the earlier rows are named, as long as others can be compared with them; also by resume."
    registry, values = Registry(tmp_path/'data'), dict(learning_rate=[1e-4, 3e-4])
    rows = dataset_samples(Registry(data), 'car_item')[:16]
    registry.add('car_item', rows)
    base = few_steps(**EVALUATED, dataset_dir=str(registry.dataset_dir), max_steps=4, save_steps=1, plot_loss=None)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        sweep(base, only=0, **values)
        registry.add('car_item', rows)  # as a notebook does that is run again
        one, other = (trial.run for trial in sweep(base, only=[], **values).trials)
    registry.add('car_item', rows[:12])
    with pytest.warns(UserWarning, match='car_item: the rows have changed since .* to train them again: learning_rate-0.0001$'): sweep(base, **values)
    assert (one.status, other.status) == ('done', 'done') and one.progress.begin == 0
    registry.add('car_item', rows)
    with pytest.warns(UserWarning, match='again: learning_rate-0.0003$'): sweep(base, only=[], **values)
    (other.output_dir/'ended.json').unlink()  # as if it had been killed
    with pytest.warns(UserWarning, match='car_item: the rows have changed since the run was started'): other.resume().wait()
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert sweep(base, only=[], **values).trials[1].state == 'done'

_other_kernel = '''
import sys
from qwen2vl_nb.all import *
sweep(load_recipe(sys.argv[1]), at_once=1, max_steps=[40, 2])
'''

def test_two_sweeps_share_the_work(few_steps, tmp_path):
    "The first trains one run at a time; while it waits for that, another one trains the second run, which is not trained again."
    base = few_steps(**EVALUATED, plot_loss=None)
    save_recipe(base, tmp_path/'recipe.yaml')
    kernel = subprocess.Popen([sys.executable, '-c', _other_kernel, tmp_path/'recipe.yaml'], stdout=subprocess.DEVNULL)
    first, second = (trial.run for trial in combinations(base, dict(max_steps=[40, 2])))
    until(lambda: (first.output_dir/'waiter.json').exists() or kernel.poll() is not None)
    held = [psutil.Process(state_or_empty(first, 'waiter.json')['child'])]
    for p in held: p.suspend()
    assert sweep(base, only=1, max_steps=[40, 2]).trials[1].state == 'done' and first.is_running
    started = state_or_empty(second, RUN)['id']
    for p in held: p.resume()
    assert not kernel.wait()
    found = sweep(base, max_steps=[40, 2])
    assert list(found.table.state) == ['done', 'done'] and not any(found.table.why)
    assert state_or_empty(second, RUN)['id'] == started

def test_a_model_with_added_tokens_is_asked_as_it_was_trained(few_steps, tiny_fp32, data, tmp_path):
    "With its added tokens, system prompt and limits: a sweep and score_checkpoints ask the same, and predict_recipe on its own something else, with a warning."
    base = few_steps(model_name_or_path=str(tiny_fp32), add_special_tokens='<car>,<bus>', default_system='<car><bus>', image_max_pixels=3136, plot_loss=None, max_steps=2)
    found = sweep(base, 'car_item_test', asking=ASKING, learning_rate=[1e-3])
    assert found.table.why.tolist() == [''] and found.trials[0].scores['rows'] == 6 and not found.trials[0].scores['failed']
    run = found.runs[0]
    asked = attach(run.output_dir/'predict-car_item_test').recipe
    scored = score_checkpoints(run, 'car_item_test', **ASKING)
    assert asked['default_system'] == '<car><bus>' and asked['image_max_pixels'] == 3136
    answers = [[row['predict'] for row in rows] for rows in (Predictions(run.output_dir/'predict-car_item_test'), *scored.predictions.values())]
    assert len(answers) == 2 and answers[0] == answers[1]
    again = sweep(base, 'car_item_test', asking=ASKING, learning_rate=[1e-3])  # with the weights that it ended with, as before
    assert again.table.why.tolist() == [''] and find_adapter(run) == run.best == run.output_dir/'checkpoint-2'
    alone = predict_recipe(tiny_fp32, 'car_item_test', tmp_path/'alone', adapter=run, dataset_dir=str(data), use_cpu=True, **ASKING)
    with pytest.warns(UserWarning, match='trained with other prompts'): otherwise = predict(alone)
    assert all(a['prompt_tokens'] != b['prompt_tokens'] for a, b in zip(otherwise, Predictions(run.output_dir/'predict-car_item_test')))

def test_what_is_wrong_is_said_before_the_start(few_steps, data, tmp_path):
    base = few_steps()
    with pytest.raises(ValueError) as told: sweep(base, 'car_item_tset', lerning_rate=[1e-4], lora_rank=8, lora_alpha=[], output_dir=['a'], lora_dropout=[.1, .1])
    for part in ("did you mean 'learning_rate'", '8 is not a list', 'no values to try', 'output_dir: a sweep sets it', 'twice', "did you mean 'car_item_test'"):
        assert part in str(told.value), part
    with pytest.raises(ValueError, match='name the data set that is asked with score_on'): sweep(few_steps(**EVALUATED), measure='exact', learning_rate=[1e-4])
    with pytest.raises(ValueError, match='nothing to rank by'): sweep(base, learning_rate=[1e-4])
    with pytest.raises(ValueError, match='no combination 2; there are 2'): sweep(base, 'car_item_test', only=2, learning_rate=[1e-4, 3e-4])
    with pytest.raises(ValueError) as told: sweep(base, 'car_item_test', asking={'max_new_token': 8, 'output_dir': 'a'}, nproc=0, at_once=-1, only='0', learning_rate=[1e-4])
    for part in ("did you mean 'max_new_tokens'", 'asking: output_dir: it is set for each model', 'nproc: 0 is not', 'at_once: -1 is not', "only: '0' is not"):
        assert part in str(told.value), part
    with pytest.raises(ValueError, match="no measure 'jsn' to rank by; available: exact, json"): sweep(base, 'car_item_test', 'jsn', learning_rate=[1e-4])
    with pytest.raises(ValueError, match="Less of 'malformed' is better"): sweep(base, 'car_item_test', 'malformed', learning_rate=[1e-4])
    Registry(tmp_path/'data').add('unlabelled', [{'instruction': 'What?', 'output': ''}]*3)
    with pytest.raises(ValueError, match='None of the 3 rows has a label'): sweep(base | {'dataset_dir': str(tmp_path/'data')}, 'unlabelled', learning_rate=[1e-4])
    for wrong in (None, 'recipe.yaml'):
        with pytest.raises(ValueError, match='is not a recipe'): sweep(wrong, learning_rate=[1e-4])
    with pytest.raises(ValueError, match='is not the name of a data set'): sweep(base, ['car_item_test'], learning_rate=[1e-4])
    with pytest.raises(ValueError, match='has no order'): sweep(base, 'car_item_test', lora_rank={4, 8})  # only= would count in another order elsewhere
    with pytest.raises(ValueError, match='learning_rate: 0.5 is not a list'): sweep(base, 'car_item_test', learning_rate=np.array(.5))
    with pytest.raises(ValueError, match='no combination 7; there are 2'): sweep(base, 'car_item_test', only=np.int64(7), learning_rate=np.array([.5, .25]))
    found = sweep(base, 'car_item_test', only=np.arange(0), nproc=np.int64(1), learning_rate=pd.Series([.5, .25]))
    assert [type(trial.values['learning_rate']) for trial in found.trials] == [float, float]
    with pytest.raises(ValueError, match='No run has a score: not started'): found.best
    assert not (tmp_path/'run').exists()

def test_folders_with_other_runs_and_foreign_files(few_steps, tmp_path):
    "A run with another recipe is refused before anything starts; a foreign file is a row, and stays."
    values, base = dict(learning_rate=[1e-4, 3e-4]), few_steps(**EVALUATED, plot_loss=None, max_steps=2)
    one, other = (trial.run.output_dir for trial in combinations(base, values))
    launch(base | {'output_dir': str(one), 'learning_rate': 1e-4, 'lora_rank': 4}).wait()
    with pytest.raises(ValueError, match='another recipe: lora_rank was 4, now None'): sweep(base, **values)
    assert not other.exists()
    other.mkdir()
    (other/'recipe.yaml').write_text('mine: 1\n')
    (other/'notes.txt').write_text('mine')
    found = sweep(base | {'lora_rank': 4}, **values)
    assert list(found.table.state) == ['done', 'not started'] and 'not created by a run' in found.table.why[1]
    assert (other/'recipe.yaml').read_text() == 'mine: 1\n' and sorted(p.name for p in other.iterdir() if p.name[0] != '.') == ['notes.txt', 'recipe.yaml']

def test_task_of_a_slurm_array_runs_its_own_combination(few_steps, tmp_path):
    "The script from the page on Slurm, as each task runs it; then the table from a notebook."
    cells = json.loads((ROOT/'nbs'/'tutorials'/'several_machines.ipynb').read_text(encoding='utf-8'))['cells']
    page = next(text for cell in cells if 'tune.sbatch' in (text := ''.join(cell['source'])))
    script, = re.findall(r'^```python\n(.*?)^```', page, re.M | re.S)
    assert '#SBATCH --array=0-3' in page
    base = few_steps(**EVALUATED, max_steps=2, plot_loss=None)
    save_recipe(base, tmp_path/'recipe.yaml')
    (tmp_path/'tune.py').write_text(script.replace("'my_test'", 'None'))
    done = subprocess.run([sys.executable, 'tune.py'], cwd=tmp_path, env=os.environ | {'SLURM_ARRAY_TASK_ID': '2'}, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    runs = [p.parent for p in (tmp_path/'run').rglob(RUN) if p.parent.parent == tmp_path/'run']
    assert [attach(p).status for p in runs] == ['done'] and 'not started' in done.stdout

def test_gpus_are_shared_among_runs():
    cards = [{'device': name} for name in ('2', '5', 'GPU-1', 'GPU-2')]
    assert [env['CUDA_VISIBLE_DEVICES'] for env in gpu_groups(cards, 2)] == ['2,5', 'GPU-1,GPU-2']
