"""What is called an error before a start: LLaMA-Factory really fails there, each case in one child that trains them one after another."""
import json, subprocess, sys

import pytest

from qwen2vl_nb.checks import quick_findings, slow_findings
from qwen2vl_nb.checks import _checkable_zero
from qwen2vl_nb.checks import _checkable_recipe
from qwen2vl_nb.boot import child_env
from qwen2vl_nb.run.start import launch
from qwen2vl_nb.findings import Finding
from qwen2vl_nb.zero import zero_config

TRAIN = '''
import json, os, sys
recipes = json.load(sys.stdin)
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from llamafactory.train.tuner import run_exp
for name, recipe in recipes.items():
    try: run_exp(dict(recipe))
    except BaseException as e: said = f"{type(e).__name__}: {e}"
    else: said = ""
    print(json.dumps([name, said]), file=answers, flush=True)
'''

# name → changes to a recipe that trains here, where LLaMA-Factory's parser or trainer stops
STOPS = {
    'bf16 without a GPU': dict(bf16=True, use_cpu=None),
    'a tracker that is not installed': dict(report_to='wandb'),
    'TensorBoard that is not installed': dict(report_to='tensorboard'),
    'a tracker that nobody knows': dict(report_to='nonsense'),
    'words for a number': dict(learning_rate='fast'),
    'a number as text': dict(learning_rate='1e-4'),
    'a whole number as text': dict(max_samples='8'),
    'quantization without bitsandbytes': dict(quantization_bit=4),
    'an adapter with full fine-tuning': dict(adapter_name_or_path='nowhere', finetuning_type='full'),
    'an adapter that is not there': dict(adapter_name_or_path='/nowhere'),
    'a template that nobody knows': dict(template='qwen2vl'),
    'a package that an argument needs': dict(enable_liger_kernel=True),
    'DeepSpeed without its file': dict(deepspeed='ds_z9.json', use_cpu=None),
    'a model folder that is not there': dict(model_name_or_path='/nowhere/model'),
}
TRAINS = {
    'as it is': {},
    'FlashAttention that is not installed': dict(flash_attn='fa2'),
    'bf16 with use_cpu': dict(bf16=True),
    'fp16 without a GPU': dict(fp16=True, use_cpu=None),
}

@pytest.fixture(scope='module')
def recipes(tiny, data, tmp_path_factory):
    from qwen2vl_nb.recipe import train_recipe
    make = lambda name, changes: train_recipe(tiny, 'car_item', tmp_path_factory.mktemp('run')/'out', **dict(dataset_dir=str(data), max_steps=1, max_samples=4,
        bf16=None, use_cpu=True, gradient_accumulation_steps=1, preprocessing_num_workers=None, plot_loss=None, save_strategy='no', overwrite_output_dir=True) | changes)
    return {name: make(name, changes) for name, changes in (STOPS | TRAINS).items()}

@pytest.fixture(scope='module')
def said(recipes):
    "name → what LLaMA-Factory says; empty where it has trained."
    given = json.dumps(recipes, default=str)
    done = subprocess.run([sys.executable, '-c', TRAIN], input=given, capture_output=True, text=True, env=child_env() | {'FORCE_TORCHRUN': '0'})
    found = dict(map(json.loads, done.stdout.splitlines()))
    assert found.keys() == recipes.keys(), done.stderr[-3000:]
    return found

def test_llamafactory_fails_where_it_is_called_an_error(said):
    assert {name: bool(why) for name, why in said.items()} == dict.fromkeys(STOPS, True) | dict.fromkeys(TRAINS, False), said

ASK_ALL = '''
import json, os, sys
from qwen2vl_nb.questions import arguments
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for name, question in json.load(sys.stdin).items(): print(json.dumps([name, list(arguments(*question))]), file=answers, flush=True)
'''

@pytest.fixture(scope='module')
def found(recipes, tmp_path_factory):
    "name → the errors of `check_recipe`, whose question to LLaMA-Factory is put for all recipes in one child."
    folder = str(tmp_path_factory.mktemp('asked'))
    questions = {name: [_checkable_recipe(r, folder), _checkable_zero(r)] for name, r in recipes.items()}
    done = subprocess.run([sys.executable, '-c', ASK_ALL], input=json.dumps(questions, default=str), capture_output=True, text=True, env=child_env())
    asked = {name: [Finding(*f) for f in answers] for name, answers in map(json.loads, done.stdout.splitlines())}
    assert asked.keys() == recipes.keys(), done.stderr[-3000:]
    errors = lambda findings: [f.what for f in findings if f.level == 'error']
    return {name: errors(quick_findings(r, 1) + slow_findings(r, 1) + asked[name]) for name, r in recipes.items()}

def test_check_recipe_finds_it_and_nothing_else(found):
    assert {name: bool(why) for name, why in found.items()} == dict.fromkeys(STOPS, True) | dict.fromkeys(TRAINS, False), found

@pytest.mark.soak
@pytest.mark.parametrize('zero', ['z2', 'z3'])
def test_ranks_with_use_cpu_train_under_z2_and_not_under_z3(zero, few_steps):
    recipe = few_steps(deepspeed=zero_config(zero), gradient_accumulation_steps=2)
    errors = [f.where for f in quick_findings(recipe, 2) if f.level == 'error']
    run = launch(recipe, nproc=2, force=True)
    if zero == 'z2': assert run.wait().status == 'done' and not errors
    else:
        with pytest.raises(RuntimeError, match='batch'): run.wait()
        assert errors == ['use_cpu']
