"Every recipe and ZeRO config that ships, before LLaMA-Factory's own parser and DeepSpeed's own class."
import json

import pytest

from qwen2vl_nb.checks import check_recipe
from qwen2vl_nb.checks import ask_llamafactory
from qwen2vl_nb.checks import _without_auto, _checkable_recipe
from qwen2vl_nb.recipe import load_recipe, predict_recipe, save_recipe, train_recipe
from qwen2vl_nb.zero import zero_config, zero_names

SEED_72B = dict(trust_remote_code=True, max_samples=1000, preprocessing_num_workers=16, report_to=None, overwrite_output_dir=True, gradient_accumulation_steps=1,
                num_train_epochs=25., val_size=.1, eval_strategy='steps', eval_steps=500)

def _recipes():
    yield 'train', train_recipe('m/model_7b', 'car_item')
    yield 'full', train_recipe('m/model_7b', 'car_item', finetuning_type='full')
    yield '72b', train_recipe('m/model_72b', 'car_item', 'saves/out', **SEED_72B)
    yield 'predict', predict_recipe('m/model_7b', 'car_item')
    yield '7b', predict_recipe('m/model_7b', 'car_item', trust_remote_code=True, max_samples=200, temperature=.1, top_k=1, do_sample=None, report_to=None, logging_steps=1)

@pytest.mark.parametrize('name,recipe', list(_recipes()), ids=[n for n,_ in _recipes()])
def test_recipes_are_parsed(name, recipe, tmp_path):
    "In this process, since LLaMA-Factory's import is what takes long."
    from llamafactory.hparams import get_train_args
    saved = load_recipe(save_recipe(recipe, tmp_path/'recipe.yaml'))
    model, data, training, finetuning, generating = get_train_args(_checkable_recipe(saved, str(tmp_path)))
    assert model.model_name_or_path == recipe['model_name_or_path'] and finetuning.finetuning_type == recipe['finetuning_type'] and data.template == 'qwen2_vl'
    assert generating.max_new_tokens == recipe.get('max_new_tokens', generating.max_new_tokens) and training.learning_rate == recipe.get('learning_rate', training.learning_rate)

def test_zero_configs_are_parsed():
    "All seven in one process, since DeepSpeed's import is what takes long."
    import deepspeed.runtime.config as ds
    for name in zero_names: assert ds.DeepSpeedConfig({'train_micro_batch_size_per_gpu': 1} | _without_auto(zero_config(name))).zero_optimization_stage == int(name[1])

def test_a_bad_zero_config_is_refused_by_deepspeed():
    zero = zero_config('z3')
    zero['zero_optimization']['stage'] = 'three'
    zero['zero_optimization']['reduce_bucket_size'] = -5
    found = ask_llamafactory(train_recipe('m/model_7b', 'car_item', deepspeed=zero))
    assert [f.where for f in found] == ['deepspeed'] and 'stage' in found[0].what

def test_parser_and_words_come_together(tiny, data):
    recipe = train_recipe(tiny, 'car_itme', dataset_dir=str(data), learning_rat=1, finetuning_type='lara', cutoff_len=10)
    said = ' '.join(check_recipe(recipe, nproc=4).what)
    for words in ("'car_item'", "'learning_rate'", 'Invalid fine-tuning method', 'every GPU loads the whole model'): assert words in said, words

def test_a_recipe_for_another_machine_is_not_refused_for_this_one():
    "bf16 and DeepSpeed cannot run on this CPU, and are right on eight GPUs."
    assert ask_llamafactory(train_recipe('m/model_72b', 'car_item', deepspeed=zero_config('z3'), bf16=True)) == []

def test_yaml_is_what_was_written(tmp_path):
    recipe = train_recipe('模型/7b', '小车', learning_rate=1e-5, run_name='1e5', lora_target='q_proj,v_proj')
    again = load_recipe(save_recipe(recipe, tmp_path/'r.yaml'))
    assert {k:v for k,v in again.items() if k not in ('output_dir', 'dataset_dir')} == {k:v for k,v in recipe.items() if k != 'output_dir'}
    assert again['run_name'] == '1e5', 'text stays text'

def test_zero_dict_becomes_a_file_beside(tmp_path):
    recipe = save_recipe(train_recipe('m', 'd', deepspeed=zero_config('z3_offload')), tmp_path/'run 运行'/'r.yaml')
    file = load_recipe(recipe)['deepspeed']
    assert file == str(tmp_path/'run 运行'/'ds_z3_offload_config.json') and json.load(open(file)) == zero_config('z3_offload')

def test_tab_offers_the_arguments_that_the_parser_knows():
    from dataclasses import fields
    from llamafactory import hparams
    from qwen2vl_nb.recipe import argument_names
    kinds = [getattr(hparams, f'{kind}Arguments') for kind in ('Model', 'Data', 'Training', 'Finetuning', 'Generating')]
    assert {*argument_names()} == {f.name for kind in kinds for f in fields(kind) if f.init}

# Arguments that say what is trained, on what and how fast, or that belong to other engines: an answer does not depend on them
NOT_FOR_ANSWERS = '''
    model_name_or_path adapter_name_or_path adapter_folder low_cpu_mem_usage shift_attn mixture_of_depths use_unsloth use_unsloth_gc enable_liger_kernel moe_aux_loss_coef
    disable_gradient_checkpointing use_reentrant_gc upcast_layernorm upcast_lmhead_output train_from_scratch infer_backend offload_folder use_v1_kernels print_param_status
    dataset eval_dataset train_on_prompt mask_history streaming buffer_size mix_strategy interleave_probs overwrite_cache preprocessing_batch_size max_samples eval_num_beams
    ignore_pad_token_for_loss val_size eval_on_each_dataset packing neat_packing tokenized_path data_shared_file_system max_length
'''.split()

def test_each_argument_of_llamafactory_is_known_to_matter_for_answers_or_not():
    "A version with another argument is noticed here."
    from dataclasses import fields
    from llamafactory.hparams import DataArguments, GeneratingArguments, model_args
    from qwen2vl_nb.recipe import answer_arguments
    kinds = model_args.BaseModelArguments, model_args.QuantizationArguments, model_args.ProcessorArguments, DataArguments, GeneratingArguments
    names = {f.name for kind in kinds for f in fields(kind) if f.init}
    assert names - {*answer_arguments(dict.fromkeys(names))} == {*NOT_FOR_ANSWERS}
