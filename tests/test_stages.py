"""Every stage with every kind of data set, before LLaMA-Factory's own workflows; our findings must say the same of each pair.

One child asks all workflows, each with the stage for which it asks its data itself (DPO asks for `rm`)."""
import json, subprocess, sys

import pytest

from conftest import TRAINS_KTO
from qwen2vl_nb.checks import data_findings
from qwen2vl_nb.recipe import train_recipe
from qwen2vl_nb.boot import child_env
from qwen2vl_nb.data.registry import Registry

STAGES = 'pt', 'sft', 'rm', 'dpo', 'kto', 'ppo'
TEXT = 'The red car stands in front of the house.'
PAIR = {'chosen': 'A car.', 'rejected': 'A dog.'}
USER, ANSWER = {'from': 'human', 'value': 'What is this?'}, {'from': 'gpt', 'value': 'A car.'}
ALPACA = {'prompt': 'instruction', 'query': 'input', 'response': 'output'}
SHAREGPT = {'formatting': 'sharegpt', 'columns': {'messages': 'conversations'}}
QUESTION = {'instruction': 'What is this?', 'input': ''}
ROLES = {'tags': {'role_tag': 'role', 'content_tag': 'content', 'user_tag': 'user', 'assistant_tag': 'assistant', 'system_tag': 'system'}}
TURNS = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'What is this?'}, {'role': 'assistant', 'content': 'A car.'}]

KINDS = { # name → entry, a row
    'alpaca': ({'columns': ALPACA}, QUESTION | {'output': 'A car.'}),
    'alpaca by its usual names': ({}, QUESTION | {'output': 'A car.'}),
    'alpaca without a question': ({'columns': {'query': 'input', 'response': 'output'}}, {'input': 'What is this?', 'output': 'A car.'}),
    'alpaca without answers': ({'columns': ALPACA}, QUESTION | {'output': None}),
    'sharegpt': (SHAREGPT, {'conversations': [USER, ANSWER, USER, ANSWER]}),
    'sharegpt with roles': (SHAREGPT | ROLES, {'conversations': TURNS}),
    'openai': (SHAREGPT | ROLES | {'formatting': 'openai'}, {'conversations': TURNS}),
    'alpaca ranking': ({'ranking': True, 'columns': {'prompt': 'instruction', 'query': 'input', 'chosen': 'chosen', 'rejected': 'rejected'}}, QUESTION | PAIR),
    'sharegpt ranking': (SHAREGPT | {'ranking': True, 'columns': {'messages': 'conversations', 'chosen': 'chosen', 'rejected': 'rejected'}},
                         {'conversations': [USER], 'chosen': ANSWER, 'rejected': ANSWER | {'value': 'A dog.'}}),
    'ranking without pairs': ({'ranking': True, 'columns': ALPACA}, QUESTION | {'output': 'A car.'}),
    'alpaca kto': ({'columns': ALPACA | {'kto_tag': 'good'}}, QUESTION | {'output': 'A car.', 'good': True}),
    'sharegpt kto': (SHAREGPT | {'columns': {'messages': 'conversations', 'kto_tag': 'good'}}, {'conversations': [USER, ANSWER], 'good': False}),
    'kto without answers': ({'columns': {'prompt': 'instruction', 'kto_tag': 'good'}}, QUESTION | {'good': True}),
    'text': ({'columns': {'prompt': 'text'}}, {'text': TEXT}),
}

ASK = '''
import contextlib, importlib, json, os, sys
recipe, stages, names = json.load(sys.stdin)
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from llamafactory.data.loader import get_dataset
from llamafactory.hparams import get_train_args

class Loaded(Exception): "The workflow has its data."

def loading(*args, **kwargs):
    get_dataset(*args, **kwargs)
    raise Loaded

for stage in stages:
    workflow = importlib.import_module(f"llamafactory.train.{stage}.workflow")
    workflow.get_dataset = loading
    for name in names:
        model, data, training, finetuning, generating = get_train_args(recipe | {"stage": stage, "dataset": name})
        more = [generating] if stage in ("sft", "ppo") else []
        try: getattr(workflow, f"run_{stage}")(model, data, training, finetuning, *more)
        except Loaded: print(json.dumps([stage, name, ""]), file=answers, flush=True)
        except Exception as e: print(json.dumps([stage, name, f"{type(e).__name__}: {e}"]), file=answers, flush=True)
'''

@pytest.fixture(scope='module')
def registry(tmp_path_factory):
    registry = Registry(tmp_path_factory.mktemp('kinds'))
    for name, (entry, row) in KINDS.items():
        (registry.dataset_dir/f'{name}.json').write_text(json.dumps([row]*8))
        registry[name] = {'file_name': f'{name}.json'} | entry
    return registry

def _recipe(tiny, registry, stage='sft', name='alpaca', output_dir=None, **changes):
    more = {'reward_model': str(tiny)} if stage == 'ppo' else {}
    return train_recipe(tiny, name, output_dir or registry.dataset_dir/'out', **dict(stage=stage, dataset_dir=str(registry.dataset_dir), cutoff_len=32, max_steps=1,
        bf16=None, use_cpu=True, preprocessing_num_workers=None, gradient_accumulation_steps=1) | more | changes)

@pytest.fixture(scope='module')
def verdicts(tiny, registry):
    "(stage, kind) → what LLaMA-Factory's workflow says; empty where it takes the data."
    recipe = _recipe(tiny, registry, reward_model=str(tiny), cache_dir=str(registry.dataset_dir/'cache'))
    done = subprocess.run([sys.executable, '-c', ASK], input=json.dumps([recipe, STAGES, list(KINDS)]), capture_output=True, text=True, env=child_env())
    found = {(stage, name): said for stage, name, said in map(json.loads, done.stdout.splitlines())}
    assert len(found) == len(STAGES)*len(KINDS), done.stderr[-3000:]
    return found

def test_the_stage_table_is_llamafactory_s_own(tiny, registry, verdicts):
    "Pair by pair: an error among our findings exactly where the workflow can't have its data."
    assert {s for s in STAGES if not verdicts[s, 'alpaca ranking']} == {'rm', 'dpo'}  # the workflows were really asked
    for (stage, name), said in verdicts.items():
        errors = [f.what for f in data_findings(_recipe(tiny, registry, stage, name)) if f.level == 'error']
        assert bool(errors) == bool(said), f'{stage} with {name}. LLaMA-Factory: {said or "takes it"}. Ours: {errors or "nothing"}.'

def test_dpo_on_a_ranking_trains(tiny, registry):
    "The way of a user: launched as it is, with nothing in the way, and the loss of DPO in the log."
    from qwen2vl_nb.run.start import launch
    run = launch(_recipe(tiny, registry, 'dpo', 'sharegpt ranking', cutoff_len=256, max_steps=2, logging_steps=1)).wait()
    assert run.status == 'done' and 'rewards/accuracies' in run.log() and (run.output_dir/'adapter_model.safetensors').is_file()

@pytest.mark.soak
@pytest.mark.parametrize('stage, name', [('pt', 'text'), ('sft', 'sharegpt with roles'), ('rm', 'alpaca ranking'), ('dpo', 'alpaca ranking'), *[('kto', 'alpaca kto'), ('kto', 'sharegpt kto')]*TRAINS_KTO])
def test_a_stage_trains_on_data_that_its_workflow_takes(stage, name, tiny, registry):
    from qwen2vl_nb.run.start import launch
    out = registry.dataset_dir/f'out-{stage}-{name}'
    assert launch(_recipe(tiny, registry, stage, name, cutoff_len=32 if stage == 'pt' else 256, max_steps=2, output_dir=str(out))).wait().status == 'done'
