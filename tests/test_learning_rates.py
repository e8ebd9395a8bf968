"Learning rates by module: LLaMA-Factory's own losses where all are the same, and each module at its rate, under ZeRO, with the offload, killed and resumed."
import json, shutil
from pathlib import Path

import numpy as np
import psutil
import pytest

from conftest import until
from qwen2vl_nb.checkpoint import is_whole
from qwen2vl_nb.recipe import train_recipe
from qwen2vl_nb.run.folder import state_or_empty
from qwen2vl_nb.run.learning_rates import MODULES, job_of, module_of, modules_of_job, split_groups
from qwen2vl_nb.run.loss import read_log
from qwen2vl_nb.run.start import launch
from qwen2vl_nb.zero import zero_config

RATES = {'vision': 1e-5, 'projector': 1e-4}
FULL = dict(finetuning_type='full', freeze_vision_tower=False, freeze_multi_modal_projector=False)

@pytest.fixture(scope='module')
def in_fp32(tiny, tmp_path_factory):
    "The model with its weights in fp32, so that small steps are not rounded away."
    from safetensors.torch import load_file, save_file
    model = Path(shutil.copytree(tiny, tmp_path_factory.mktemp('model')/'fp32'))
    save_file({k: v.float() for k, v in load_file(model/'model.safetensors').items()}, model/'model.safetensors', {'format': 'pt'})
    (model/'config.json').write_text((model/'config.json').read_text().replace('bfloat16', 'float32'))
    return model

@pytest.fixture
def recipe(in_fp32, few_steps):
    def make(zero=None, **changes):
        where = dict(deepspeed=zero_config(zero), use_cpu=None) if zero else {}
        made = few_steps(**FULL | dict(model_name_or_path=str(in_fp32), lora_target=None, learning_rate=1e-3, lr_scheduler_type='constant', warmup_ratio=None, plot_loss=None)
                         | where | changes)
        return {k: v for k, v in made.items() if v is not None}
    return make

def _losses(run): return read_log(run).dropna(subset=['loss']).loss.tolist()

def _weights(folder):
    from safetensors.torch import load_file
    return load_file(Path(folder)/'model.safetensors')

def _moved(run, recipe):
    "The largest change of a weight of each module, in learning rates and steps: Adam moves a weight by at most about its rate in a step."
    before, after, found = _weights(recipe['model_name_or_path']), _weights(run), {}
    for name in before:
        found[module_of(name)] = max(found.get(module_of(name), 0), (before[name] - after[name].float()).abs().max().item())
    return {module: change/recipe['max_steps'] for module, change in found.items()}

def _each_at_its_rate(run, recipe, rates):
    moved = _moved(run, recipe)
    for module in MODULES: assert .5 < moved[module]/rates.get(module, recipe['learning_rate']) < 1.5, moved

def _kill(run):
    "kill -9 of a rank."
    below = psutil.Process(state_or_empty(run, 'waiter.json')['pid']).children(recursive=True)
    max((p for p in below if 'run.rank' in p.cmdline() and 'run.agent' not in p.cmdline()), key=lambda p: p.pid).kill()

def test_the_modules_are_those_that_llamafactory_freezes():
    "For every weight of each family, by LLaMA-Factory's own table."
    import torch
    from llamafactory.model.model_utils.visual import COMPOSITE_MODELS
    from qwen2vl_nb.model import family_class, model_config
    for name in ('Qwen2-VL-2B', 'Qwen2.5-VL-3B', 'Qwen3-VL-2B'):
        config = model_config(name)
        kind, table = config['model_type'], COMPOSITE_MODELS[config['model_type']]
        with torch.device('meta'): model = family_class(kind, 'ForConditionalGeneration')(family_class(kind, 'Config').from_dict(config))
        keys = dict(vision=table.vision_model_keys, projector=table.projector_keys, language=table.language_model_keys)
        for weight, _ in model.named_parameters():
            assert [m for m, some in keys.items() if any(key in weight for key in some)] == [module_of(weight)], weight

@pytest.mark.parametrize('model,changes,trained', [
    ('Qwen2-VL-2B', {}, ['language']), ('Qwen3-VL-2B', {}, ['language']),
    ('Qwen2.5-VL-3B', dict(freeze_vision_tower=False, freeze_multi_modal_projector=False), ['language', 'vision']),
    ('Qwen3-VL-2B', dict(freeze_vision_tower=False, freeze_multi_modal_projector=False), ['language', 'projector', 'vision']),
    ('Qwen2-VL-2B', dict(finetuning_type='full', freeze_multi_modal_projector=False), ['language', 'projector']),
    ('Qwen2-VL-2B', dict(finetuning_type='full', freeze_language_model=True, freeze_multi_modal_projector=False), ['projector']),
    ('Qwen2-VL-2B', dict(lora_target='q_proj', additional_target='visual.merger'), ['language', 'projector'])])
def test_what_a_recipe_trains_is_what_llamafactory_makes_trainable(model, changes, trained):
    assert modules_of_job(job_of(dict(model_name_or_path=model, do_train=True) | changes)) == trained

def test_rates_that_are_all_the_same_change_no_bit(recipe, tmp_path):
    "The recipe's own rate for some modules; and a rate for all, as if the recipe had it."
    plain = launch(recipe(output_dir=tmp_path/'plain')).wait()
    named = launch(recipe(output_dir=tmp_path/'named', learning_rate=5e-3), learning_rates=dict.fromkeys(MODULES, 1e-3)).wait()
    one, other = _weights(plain), _weights(named)
    assert _losses(plain) == _losses(named) and all(one[name].equal(other[name]) for name in one)
    assert json.loads((named.output_dir/'run.json').read_text())['learning_rates'] == dict.fromkeys(MODULES, 1e-3)
    assert 'learning_rates' not in (plain.output_dir/'run.json').read_text() + (named.output_dir/'recipe.yaml').read_text()

def test_each_module_at_its_rate_with_offload_killed_and_resumed(recipe, tmp_path):
    "Two ranks, ZeRO-3 with DeepSpeed's CPU Adam; one of them is killed."
    made = recipe('z3_offload', max_steps=12, max_samples=48, save_steps=4)
    run = launch(made, 2, learning_rates=RATES)
    until(lambda: is_whole(run.output_dir/'checkpoint-4', 2) and run.progress.step >= 5 or not run.is_running)
    _kill(run)
    until(lambda: not run.is_running)
    run.resume().wait()
    assert run.status == 'done' and run.progress.begin >= 4 and state_or_empty(run, 'run.json')['learning_rates'] == RATES
    _each_at_its_rate(run, made, RATES)

def test_the_schedule_and_weight_decay_apply_to_each_group(recipe, tmp_path):
    "The optimizer's state in the last checkpoint says at which rate each group ended."
    import torch
    made = recipe(lr_scheduler_type='linear', weight_decay=.1, max_steps=4, save_steps=3)
    run = launch(made, learning_rates=RATES).wait()
    groups = torch.load(run.output_dir/'checkpoint-3'/'optimizer.pt', weights_only=True)['param_groups']
    rates = {'language': 1e-3} | RATES
    assert [(g['weight_decay'], g['initial_lr']) for g in groups] == [(decay, rates[m]) for decay in (.1, 0.) for m in MODULES]
    assert all(g['lr'] == pytest.approx(g['initial_lr']/4) for g in groups)
    assert read_log(run).lr.dropna().tolist()[0] == 1e-3  # the log has that of the language model

def test_what_is_wrong_is_said_before_the_start(few_steps, tmp_path):
    with pytest.raises(ValueError) as told:
        launch(few_steps(learning_rate='1e-4'), learning_rates={'visual': 1e-6, 'vision': 1e-6, 'projector': '1e-5', 'language': -1})
    for part in ("did you mean 'vision'", 'freeze_vision_tower: false', 'freeze_multi_modal_projector: false', "'1e-5', not a number", 'above 0', "'1e-4' is text"):
        assert part in str(told.value), part
    with pytest.raises(TypeError, match='give a dict'): launch(few_steps(), learning_rates=1e-5)
    assert not (tmp_path/'run').exists()

@pytest.mark.parametrize('rates,changes,why', [({'vision': 1e-6}, {}, "trains no weights of the module 'vision'"), 
    pytest.param({'language': 1e-6}, dict(loraplus_lr_ratio=16.), 'its own groups', marks=pytest.mark.soak)])
def test_a_rank_refuses_what_was_forced(rates, changes, why, few_steps):
    with pytest.warns(UserWarning, match='learning_rates'): run = launch(few_steps(**changes), learning_rates=rates, force=True)
    with pytest.raises(RuntimeError, match=why): run.wait()

def test_groups_stay_as_they_are_where_nothing_differs():
    groups = [dict(params=[], lr=1e-4, weight_decay=0.)]
    assert split_groups(groups, {}, RATES) == groups

@pytest.mark.soak
@pytest.mark.parametrize('ranks', [1, 2])
@pytest.mark.parametrize('zero', [None, 'z0', 'z2', 'z2_offload', 'z3', 'z3_offload'])
def test_every_config(zero, ranks, recipe, tmp_path):
    "The same losses and weights as without rates where they are all the same, and each module at its rate where they differ."
    made = recipe(zero, max_steps=6)
    runs = {name: launch(made | {'output_dir': str(tmp_path/name)}, ranks, learning_rates=rates).wait()
            for name, rates in dict(plain=None, same=dict.fromkeys(MODULES, 1e-3), each=RATES).items()}
    one, other = _weights(runs['plain']), _weights(runs['same'])
    assert _losses(runs['plain']) == _losses(runs['same']) and all(one[name].equal(other[name]) for name in one)
    _each_at_its_rate(runs['each'], made, RATES)

def test_numbers_of_numpy_are_numbers(tiny, data, tmp_path):
    "In the rates and in the recipe: what is refused is the data set that does not exist."
    recipe = train_recipe(tiny, 'no_such_data', tmp_path/'run', dataset_dir=str(data)) | {'max_steps': np.int64(2), 'learning_rate': np.float32(1e-4)}
    with pytest.raises(ValueError, match='no_such_data') as told: launch(recipe, learning_rates={'language': np.float32(1e-5)})
    assert 'learning_rates' not in str(told.value) and 'max_steps' not in str(told.value)
