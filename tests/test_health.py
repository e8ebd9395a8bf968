"""The health of a run: real runs that show each fault, and real runs that are healthy, whatever their loss looks like.

One child trains them all with LLaMA-Factory's own `run_exp`, as a rank does."""
import json, os, random, subprocess, sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

from conftest import TRAINS_KTO, TRANSFORMERS, until
from qwen2vl_nb.boot import child_env
from qwen2vl_nb.prediction.engines import predict
from qwen2vl_nb.prediction.predictions import Predictions
from qwen2vl_nb.prediction.scores import score
from qwen2vl_nb.recipe import predict_recipe, save_recipe, train_recipe
from qwen2vl_nb.run.health import check_health, health_findings
from qwen2vl_nb.run.loss import read_log
from qwen2vl_nb.run.start import launch, runs
from qwen2vl_nb.run.watch import RunView, watch_loss
from qwen2vl_nb.tiny import tiny_model

TRAIN = '''
import json, sys, traceback
from llamafactory.train.tuner import run_exp
from qwen2vl_nb.run.rank import log_more
log_more()
for recipe in json.load(sys.stdin): run_exp(recipe)
'''

EVALUATED = dict(eval_dataset='other', do_eval=True, eval_strategy='steps', eval_steps=5, per_device_eval_batch_size=8)
FAULTS = { # name → data set, changes to the recipe, what is found
    'far too large a learning rate': ('many', dict(learning_rate=1e30, max_steps=8), 'NaN loss'),
    'the same in bf16': ('many', dict(learning_rate=1e30, max_steps=8, bf16=True), 'NaN loss'),
    'too large a learning rate': ('many', dict(learning_rate=1., finetuning_type='full', max_steps=16), 'diverging'),
    'answers cut off by cutoff_len': ('long questions', dict(cutoff_len=8, max_steps=4), 'zero loss'),
    'eight rows for many epochs': ('few', dict(learning_rate=3e-3, finetuning_type='full', max_steps=60) | EVALUATED, 'evaluation rising'),
    'a learning rate of zero': ('many', dict(learning_rate=0., max_steps=4), 'learning rate 0'),
    'a schedule that ends early': ('many', dict(lr_scheduler_type='warmup_stable_decay', lr_scheduler_kwargs=dict(num_stable_steps=2, num_decay_steps=2),
                                                warmup_ratio=0., max_steps=10), 'learning rate 0'),
}
FINE = { # name → data set, changes to the recipe
    'as in the tutorial': ('many', EVALUATED | dict(learning_rate=2e-3, max_steps=50, per_device_train_batch_size=8, logging_steps=5, eval_steps=10)),
    'its first steps': ('many', dict(max_steps=8) | EVALUATED | dict(eval_steps=2)),
    'one step': ('many', dict(max_steps=1)),
    'a long warm-up': ('many', dict(max_steps=12, warmup_ratio=1.)),
    'a row known by heart': ('one', dict(learning_rate=1e-2, finetuning_type='full', max_steps=50, per_device_train_batch_size=1, lr_scheduler_type='constant')),
    'packed': ('many', dict(max_steps=4, packing=True, cutoff_len=512)),
    'empty answers': ('empty', dict(learning_rate=3e-3, max_steps=20)),
    'equal answers': ('equal', dict(learning_rate=3e-3, max_steps=30)),
    'dpo': ('pairs', dict(stage='dpo', learning_rate=3e-3, max_steps=16)),
    'kto': ('marks', dict(stage='kto', learning_rate=3e-3, max_steps=16)),
    'rm': ('pairs', dict(stage='rm', learning_rate=3e-3, max_steps=16)),
}
if not TRAINS_KTO: del FINE['kto']

ANSWERS = { # name → adapter, data set, what is found
    # whether it ends some answers at once depends on its random weights, and they on the version of transformers
    'answers of a model without training': (None, 'other', [*['empty answers']*(TRANSFORMERS < (5,)), 'endless repetition']),
    'answers after empty ones': ('empty answers', 'other', ['empty answers']),
    'answers after equal ones': ('equal answers', 'other', ['one answer']),
    'equal answers to equal labels': ('equal answers', 'equal', []),
    'answers of the model as it is': ('as in the tutorial', 'other', []),
}

def _data_sets(folder, data):
    "A folder with the data sets, and their registry."
    cars = {half: [row | {'images': [str(data/path) for path in row['images']]} for row in json.loads((data/'car_item'/f'{half}.json').read_text())] for half in ('train', 'test')}
    many, answer = cars['train'], {'instruction': 'What is this? '*60, 'output': 'A red car stands in front of the big house.'}
    alpaca = {'prompt': 'instruction', 'query': 'input', 'response': 'output', 'images': 'images'}
    pairs = [{k: row[k] for k in ('instruction', 'images')} | {'chosen': row['output'], 'rejected': other['output']} for row, other in zip(many[:64], many[64:128])]
    marks = [row | {'good': i % 2 == 0, 'output': row['output'] if i % 2 == 0 else many[i + 1]['output']} for i, row in enumerate(many[:64])]
    sets = {'many': (many, alpaca), 'few': (many[:8], alpaca), 'one': (many[:1], alpaca), 'other': (cars['test'][:16], alpaca), 'empty': ([row | {'output': ''} for row in many[:32]], alpaca), 'equal': ([row | {'output': 'A red car.'} for row in many[:32]], alpaca),
            'long questions': ([answer]*16, {'prompt': 'instruction', 'response': 'output'}), 'marks': (marks, alpaca | {'kto_tag': 'good'}),
            'pairs': (pairs, {'prompt': 'instruction', 'images': 'images', 'chosen': 'chosen', 'rejected': 'rejected'})}
    for name, (rows, _) in sets.items(): (folder/f'{name}.json').write_text(json.dumps(rows))
    info = {name: {'file_name': f'{name}.json', 'columns': columns} | ({'ranking': True} if name == 'pairs' else {}) for name, (_, columns) in sets.items()}
    (folder/'dataset_info.json').write_text(json.dumps(info))

@pytest.fixture(scope='module')
def trained(tiny, data, tmp_path_factory):
    "The folder of each run."
    folder, recipes = tmp_path_factory.mktemp('health'), {}
    _data_sets(folder, data)
    for name, (rows, changes, *_) in (FAULTS | FINE).items():
        recipe = train_recipe(tiny, rows, folder/name, **dict(dataset_dir=str(folder), logging_steps=1, save_steps=10_000, bf16=None, use_cpu=True, plot_loss=False,
            per_device_train_batch_size=4, gradient_accumulation_steps=1, preprocessing_num_workers=None) | changes)
        recipes[name] = {k: v for k, v in recipe.items() if v is not None}
        (folder/name).mkdir()
        save_recipe(recipes[name], folder/name/'recipe.yaml')
    for name, (adapter, rows, _) in ANSWERS.items():
        adapted = dict(adapter_name_or_path=str(folder/adapter), finetuning_type='lora') if adapter else {}
        recipe = predict_recipe(tiny if adapter else tiny_model(folder/'random'), rows, folder/name, dataset_dir=str(folder), use_cpu=True, preprocessing_num_workers=None,
            per_device_eval_batch_size=16, max_new_tokens=128 if adapter is None else 40, **adapted)
        recipes[name] = {k: v for k, v in recipe.items() if v is not None}
    done = subprocess.run([sys.executable, '-c', TRAIN], env=child_env(), input=json.dumps([*recipes.values()], default=str), capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    return folder

@pytest.mark.parametrize('name', FAULTS)
def test_each_fault_is_found_in_a_real_run(trained, name):
    found = check_health(trained/name)
    assert list(found['where']) == [FAULTS[name][2]] and set(found.level) == {'warning'} and all(found.cure), f'{found}\n{read_log(trained/name)}'

@pytest.mark.parametrize('name', FINE)
def test_healthy_runs_have_no_findings(trained, name):
    assert health_findings(trained/name) == [], read_log(trained/name).to_string()

def test_a_fault_is_said_wherever_a_run_is_looked_at(few_steps):
    run = launch(few_steps(learning_rate=1e30, max_steps=6)).wait()
    row = runs(run.output_dir.parent).set_index('run').loc['run']
    assert row.health == 'NaN loss' and row.cure == next(f.cure for f in health_findings(run))
    with redirect_stdout(StringIO()) as text: watch_loss(run)
    assert 'NaN loss: Since step ' in text.getvalue()
    view = RunView(run)
    view.follow()
    until(lambda: not view._thread)
    assert 'NaN loss: Since step ' in view._faults.value and view._faults.layout.display is None and '#ab6a00' in view._faults.value

def test_a_resumed_run_that_was_cured_is_healthy(trained, tmp_path):
    "Its log no longer has the rows that were not numbers."
    rows = [json.loads(line) for line in (trained/'a long warm-up'/'trainer_log.jsonl').read_text().splitlines()]
    lost = [row | {'loss': 0., 'grad_norm': float('nan')} if row['current_steps'] > 6 and 'loss' in row else row for row in rows]
    lines = lambda some: ''.join(json.dumps(row) + '\n' for row in some)
    (tmp_path/'trainer_log.jsonl').write_text(lines(lost))
    assert [f.where for f in health_findings(tmp_path)] == ['NaN loss']
    (tmp_path/'trainer_log.jsonl').write_text(lines(lost) + lines(row for row in rows if row['current_steps'] > 6))
    assert health_findings(tmp_path) == []

# --- logs that hold anything

WRONG = ['"nan"', 'null', '[1]', '{}', 'true', '1' + '0'*400, 'Infinity', '-Infinity', 'NaN', '1e400', '"x"', '-1', '0', '0.0']
GOOD = [dict(current_steps=n, total_steps=40, loss=3/n**.5, grad_norm=1., lr=1e-4) for n in range(1, 31)]

@pytest.mark.parametrize('key', ['current_steps', 'total_steps', 'loss', 'eval_loss', 'grad_norm', 'lr'])
def test_a_log_may_hold_anything(tmp_path, key):
    "Also in every row; one odd row among good ones is no fault, unless it is a loss that is no number."
    lines = lambda odd: [json.dumps(row | {key: 'HERE'}).replace('"HERE"', value) if odd(i) else json.dumps(row) for i, row in enumerate(GOOD)]
    for value in WRONG:
        for odd in (lambda i: True, lambda i: i == 15, lambda i: i > 20):
            (tmp_path/'trainer_log.jsonl').write_text('\n'.join(lines(odd)) + '\n')
            found = health_findings(tmp_path)
            assert all(f.level == 'warning' for f in found) and (key in ('loss', 'lr') or not odd(15) or odd(0) or not found), (value, found)

@pytest.mark.parametrize('keys', [['current_steps'], ['current_steps', 'loss'], ['current_steps', 'loss', 'lr'], ['loss', 'lr'], ['current_steps', 'grad_norm'], ['current_steps', 'eval_loss']])
def test_a_log_may_lack_anything(tmp_path, keys):
    (tmp_path/'trainer_log.jsonl').write_text(''.join(json.dumps({k: row[k] for k in keys if k in row}) + '\n' for row in GOOD))
    assert health_findings(tmp_path) == []

@pytest.mark.parametrize('kind', ['nothing', 'directory', 'fifo', 'bytes'])
def test_no_log_no_finding(tmp_path, kind):
    for name in ('trainer_log.jsonl', 'predictions.jsonl'):
        {'nothing': lambda p: None, 'directory': Path.mkdir, 'fifo': os.mkfifo, 'bytes': lambda p: p.write_bytes(random.Random(0).randbytes(100_000))}[kind](tmp_path/name)
    assert health_findings(tmp_path) == []

def test_evaluations_that_wobble_are_healthy():
    rng, wobbly = np.random.default_rng(0), []
    from qwen2vl_nb.run.health import _lowest_before_rise
    for n in (4, 6, 10, 30, 100): wobbly += [(.3 + 2*np.exp(-np.arange(n)/n*5))*rng.normal(1, .02, n) for _ in range(200)]
    assert not any(_lowest_before_rise(losses) is not None for losses in wobbly)

# --- answers

@pytest.mark.parametrize('name', ANSWERS)
def test_what_answers_look_like(trained, name):
    "Of LLaMA-Factory's own prediction, which does not say how an answer ended."
    found = score(Predictions(trained/name))
    assert list(found.findings['where']) == ANSWERS[name][2], [(row['label'], row['predict']) for row in Predictions(trained/name)]
    assert all(f'{where}: ' in repr(found) and f'{where}: ' in found._repr_html_() for where in ANSWERS[name][2])

def test_answers_that_are_cut_off_are_said_to_be(trained, tiny, tmp_path):
    found = predict(predict_recipe(tiny, 'other', tmp_path/'answers', trained/'as in the tutorial', dataset_dir=str(trained), max_new_tokens=4))
    assert list(score(found).findings['where']) == ['cut answers'] and '16 of 16, at max_new_tokens (4)' in repr(score(found))
    assert runs(tmp_path).set_index('run').health['answers'] == 'cut answers'

def test_short_answers_that_never_end_are_repetitions(trained, tmp_path):
    "Forty tokens of one character are too few for what is said of longer texts, but they were cut off."
    found = predict(predict_recipe(trained/'random', 'other', tmp_path/'answers', dataset_dir=str(trained), max_new_tokens=40, use_cpu=True))
    stuck = [row['id'] for row in found if len(row['predict'].strip()) > len(row['label']) and len({*row['predict'].strip()[-20:]}) == 1]
    table = score(found).findings.set_index('where')
    assert stuck and table.what['endless repetition'].startswith(f'{len(stuck)} of 16;'), [(row['label'], row['predict']) for row in found]
