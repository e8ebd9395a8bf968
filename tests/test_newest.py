"The newest versions that `settings.ini` allows, as `pip install` resolves them: they work, and cost hardly more. Collected by `make test-newest`, which has them."
import importlib.metadata, importlib.util, inspect, json, shutil

import pytest
from packaging.version import Version

from qwen2vl_nb.checks import quick_findings
from qwen2vl_nb.data.registry import Registry
from qwen2vl_nb.frozen import SPARE_FROZEN
from qwen2vl_nb.memory.estimate import predict_memory
from qwen2vl_nb.model import family_class
from qwen2vl_nb.recipe import train_recipe
from qwen2vl_nb.run.loss import read_log
from qwen2vl_nb.run.start import launch
from qwen2vl_nb.stack import installed_versions, version_findings
from qwen2vl_nb.tiny import tiny_model
from qwen2vl_nb.zero import zero_config

__test__ = Version(importlib.metadata.version('transformers')) >= Version('5')  # with the lock file there is nothing to collect

def test_what_pip_installs_by_ranges_works_together():
    assert not [f for f in version_findings(installed_versions()) if f.level == 'error']
    assert Version(installed_versions()['deepspeed']) >= Version('0.19')

@pytest.mark.parametrize('zero, ranks', [(None, 1), ('z2', 2), ('z3', 2)])
def test_losses_are_those_of_the_versions_as_published(zero, ranks, few_steps, tmp_path):
    given = dict(deepspeed=zero_config(zero), use_cpu=None) if zero else {}
    losses = {}
    for spared in '0', '1':
        run = launch(few_steps(output_dir=tmp_path/spared, max_steps=6, learning_rate=1e-3, **given), nproc=ranks, env={SPARE_FROZEN: spared})
        run.wait()
        losses[spared] = read_log(run).loss.dropna().tolist()
        log = run.log(rank=0) if ranks > 1 else run.log()
        assert ('of the frozen vision tower' in log) is (spared == '1')
        assert ('gathered frozen weights' in log) is (spared == '1' and zero == 'z3')
    assert len(losses['0']) == 6 and losses['0'] == losses['1']

FAMILIES = {'qwen2_vl': True, 'qwen2_5_vl': False, 'qwen3_vl': True} # family → whether its model refuses pictures without their positions

@pytest.mark.parametrize('family', FAMILIES)
def test_kto_fails_or_learns_wrong_positions(family, data, tmp_path):
    "As `check_recipe` says. LLaMA-Factory's trainer passes no positions in this stage; the model computes them from what kind of token each is, which it is not told either."
    import torch
    from llamafactory.train.kto.trainer import CustomKTOTrainer
    rows = json.loads((data/'car_item'/'train.json').read_text())[:8]
    Registry(tmp_path/'data').add('marked', [row | {'images': [str(data/path) for path in row['images']], 'kto_tag': i % 2 == 0} for i, row in enumerate(rows)])
    model = tiny_model(tmp_path/'model', family=family)
    recipe = train_recipe(model, 'marked', tmp_path/'run', stage='kto', dataset_dir=str(tmp_path/'data'), max_steps=2, bf16=None, use_cpu=True, gradient_accumulation_steps=1, preprocessing_num_workers=None)
    assert ['KTO needs an older release' in f.what for f in quick_findings(recipe)] == [True]
    run = launch(recipe, force=True)
    if FAMILIES[family]:
        with pytest.raises(RuntimeError, match='`mm_token_type_ids` is missing'): run.wait()
        return
    assert run.wait().status == 'done' and 'position_ids' not in inspect.getsource(CustomKTOTrainer.forward)
    loaded = family_class(family, 'ForConditionalGeneration').from_pretrained(model)
    size = loaded.config.vision_config.spatial_merge_size
    ids = torch.tensor([[loaded.config.vision_start_token_id, *[loaded.config.image_token_id]*16, 5, 6]])
    grid = torch.tensor([[1, 4*size, 4*size]])
    position = lambda **kinds: loaded.model.compute_3d_position_ids(input_ids=ids, inputs_embeds=None, image_grid_thw=grid, video_grid_thw=None, attention_mask=None, past_key_values=None, **kinds)
    right = position(mm_token_type_ids=(ids == loaded.config.image_token_id).int())
    assert not torch.equal(right[1], right[2]) and position() is None, 'so that the model counts tokens in all three'

def test_tied_embeddings_as_transformers_4_writes_them_are_random(few_steps, tiny, data, tmp_path):
    "It says so in `text_config` alone, and the output layer is random; exported by this package, the folder is sound."
    from transformers import AutoModelForImageTextToText
    model = shutil.copytree(tiny, tmp_path/'model')
    config = json.loads((model/'config.json').read_text())
    assert config.pop('tie_word_embeddings') and config['text_config']['tie_word_embeddings']
    (model/'config.json').write_text(json.dumps(config))
    losses = {}
    for name, folder in ('as it was', tiny), ('tied in text_config', model):
        recipe = few_steps(output_dir=tmp_path/name, model_name_or_path=str(folder))
        found = [f for f in quick_findings(recipe) if 'output layer' in f.what]
        assert [f.level for f in found] == ['error']*(folder is model)
        run = launch(recipe, force=True)
        run.wait()
        losses[name] = read_log(run).loss.iloc[0]
    assert losses['tied in text_config'] > 2*losses['as it was'], losses
    head = AutoModelForImageTextToText.from_pretrained(model)
    assert not head.lm_head.weight.equal(head.get_input_embeddings().weight)
    (model/'config.json').write_text(json.dumps(config | {'tie_word_embeddings': True}))  # as the finding says
    assert not [f for f in quick_findings(recipe) if 'output layer' in f.what]
    cured = AutoModelForImageTextToText.from_pretrained(model)
    assert cured.lm_head.weight.equal(cured.get_input_embeddings().weight)

@pytest.fixture(scope='module')
def counting(data):
    "The script that counts LLaMA-Factory's own trainer."
    spec = importlib.util.spec_from_file_location('frozen_tower', data.parent/'nbs'/'benchmarks'/'frozen_tower.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

@pytest.mark.parametrize('zero, ranks, most', [(None, 1, .6), ('z3', 2, .4)])
def test_frozen_weights_take_no_memory(zero, ranks, most, counting, tmp_path, monkeypatch):
    "Bytes of live tensors, and their prediction, as published and as `launch` trains."
    counting.register_pictures(tmp_path/'data')
    model, found = counting.make_model(tmp_path/'model'), {}
    for spared in '0', '1':
        monkeypatch.setenv(SPARE_FROZEN, spared)
        recipe = counting.make_recipe(tmp_path, f'run{spared}', model, zero)
        (counted, sample), = counting.count(tmp_path/spared, {'run': recipe}, ranks, 'frozen_tower.py', '--count').values()
        estimate = predict_memory(recipe, None, ranks, gpu=False, sample=sample)
        assert estimate.tensors == pytest.approx(counted, rel=.02)
        assert any('are not kept' in words for words in estimate.assumptions) is (spared == '1')
        monkeypatch.setenv(SPARE_FROZEN, '01'[spared == '0'])  # what the run is given counts, not what this process has
        given = predict_memory(recipe, None, ranks, gpu=False, sample=sample, env={SPARE_FROZEN: spared})
        assert given.tensors == estimate.tensors and given.assumptions == estimate.assumptions
        found[spared] = counted
    assert found['1'] < most*found['0']

def test_adapters_stay_in_fp32_under_zero_3(counting, tmp_path):
    "In a recipe in bf16, since DeepSpeed 0.19.2: counted, predicted, and in the checkpoint."
    from safetensors.torch import load_file
    counting.register_pictures(tmp_path/'data')
    recipe = counting.make_recipe(tmp_path, 'run', counting.make_model(tmp_path/'model'), 'z3', bf16=True, save_strategy='steps', save_steps=2)
    (counted, sample), = counting.count(tmp_path/'count', {'run': recipe}, 2).values()
    estimate = predict_memory(recipe, None, 2, gpu=False, sample=sample)
    assert estimate.tensors == pytest.approx(counted, rel=.01)
    saved = tmp_path/'run'/'checkpoint-2'
    weights = load_file(saved/'adapter_model.safetensors')
    assert {str(w.dtype) for w in weights.values()} == {'torch.float32'}
    assert 2*estimate.parts['adapters'] == sum(w.nbytes for w in weights.values())
    assert estimate.disk == pytest.approx(sum(f.stat().st_size for pattern in ('adapter_model.safetensors', 'global_step2/*_optim_states.pt') for f in saved.glob(pattern)), rel=.01)

@pytest.mark.parametrize('changes', [dict(additional_target='embed_tokens'), dict(stage='rm', finetuning_type='full', dataset='ranked')], ids=['LoRA', 'reward model'])
def test_weights_of_two_types_stop_under_zero_3(changes, counting, tmp_path):
    "As `check_recipe` says: weights of the model are in bf16, and those that were added to it in fp32."
    counting.register_pictures(tmp_path/'data')
    ranked = [{k: v for k, v in s.items() if k != 'output'} | {'chosen': s['output'], 'rejected': 'A dog.'} for s in json.loads((tmp_path/'data'/'single.json').read_text())]
    Registry(tmp_path/'data').add('ranked', ranked)
    recipe = counting.make_recipe(tmp_path, 'run', counting.make_model(tmp_path/'model'), 'z3', bf16=True) | changes
    assert any('it trains weights in both types' in f.what for f in quick_findings(recipe))
    with pytest.raises(RuntimeError, match='in defragment(.|\n)*AssertionError'): counting.count(tmp_path/'count', {'run': recipe}, 2)
