"""Predicted memory against real LLaMA-Factory runs, byte by byte: `nbs/benchmarks/live_bytes.py` counts the live tensors of
its own trainer, PEFT and DeepSpeed on the CPU. All runs are done once, then each case is a test of its own."""
import json, os, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import accumulate

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from conftest import TRAINS_KTO, TRANSFORMERS, write_clip
from qwen2vl_nb.model import family_class, model_config
from qwen2vl_nb.memory.estimate import predict_memory
from qwen2vl_nb.memory.plan import zero_table
from qwen2vl_nb.recipe import predict_recipe, train_recipe
from qwen2vl_nb.data.registry import Registry
from qwen2vl_nb.tiny import tiny_model
from qwen2vl_nb.zero import zero_config

SMALL = {'z0': dict(reduce_bucket_size=200_000, allgather_bucket_size=200_000), # else buckets of 2 GB drown all else
         'z2': dict(reduce_bucket_size=200_000, allgather_bucket_size=200_000),
         'z3': dict(sub_group_size=1e6, stage3_max_live_parameters=1.5e6, stage3_max_reuse_distance=1.5e6)}

full, bf16 = dict(finetuning_type='full'), dict(bf16=True)
plain, pairs, by_four, twice = (dict(disable_gradient_checkpointing=True), dict(dataset='pairs'), dict(per_device_train_batch_size=4),
                                dict(gradient_accumulation_steps=2))
clip = dict(dataset='clip')
tower, projector = dict(freeze_vision_tower=False), dict(freeze_multi_modal_projector=False)

ALONE = {'tiny lora': dict(model='tiny'), 'lora plain': plain, 'lora pairs twice': pairs | twice,
         'lora bf16 by four': bf16 | by_four, 'full plain by four': full | plain | by_four,
         'freeze bf16': bf16 | dict(finetuning_type='freeze', freeze_trainable_layers=2), 'answers': dict(asks=True), 'answers bf16': bf16 | dict(asks=True)}
RANKS = {'lora z0': dict(zero='z0'), 'full z2 twice': full | twice | dict(zero='z2'),
         'lora bf16 z2': bf16 | dict(zero='z2'),
         'tiny full z3': full | dict(model='tiny', zero='z3'), 'lora pairs twice z3': pairs | twice | dict(zero='z3'),
         'lora bf16 z3': bf16 | dict(zero='z3')}
MORE = {'lora clip': clip, 'full plain clip': full | plain | clip, 'lora tower': tower, 'full bf16 z0': full | bf16 | dict(zero='z0'), 'full bf16 z3': full | bf16 | dict(zero='z3'), 'tiny full plain': full | plain | dict(model='tiny'), 'lora': {}, 'lora by four': by_four, 'full pairs': full | pairs,
        'full tower and projector': full | tower | projector, 'full bf16': full | bf16, 'full bf16 plain': full | bf16 | plain,
        'lora bf16 z0': bf16 | dict(zero='z0'), 'full bf16 z2': full | bf16 | dict(zero='z2'), 'full z0': full | dict(zero='z0'),
        'lora z2': dict(zero='z2'), 'full z2': full | dict(zero='z2'), 'tiny lora z3': dict(model='tiny', zero='z3'), 'full z3': full | dict(zero='z3')}
# The same for the other families: two of each here, the rest in `make soak`
KINDS = {'lora': {}, 'lora bf16 z3': bf16 | dict(zero='z3'), 'lora plain pairs': plain | pairs, 'full': full, 'full bf16 plain by four': full | bf16 | plain | by_four, 'full z0': full | dict(zero='z0'),
         'full bf16 z2': full | bf16 | dict(zero='z2'), 'full z3': full | dict(zero='z3'), 'lora pairs twice z3': pairs | twice | dict(zero='z3'), 'lora tower': tower, 'answers': dict(asks=True), 'lora clip': clip, 'full plain clip': full | plain | clip}
FAMILIES = {f'{family} {name}': changes | dict(model=family) for family in ('qwen2_5_vl', 'qwen3_vl') for name, changes in KINDS.items()}
FEW = [f'{family} {name}' for family in ('qwen2_5_vl', 'qwen3_vl') for name in ('lora plain pairs', 'full bf16 z2')] + ['dpo lora', 'kto full', 'rm full bf16']
# Preferences: three of them here, the rest in `make soak`
dpo, kto, rm = (dict(stage=stage) for stage in ('dpo', 'kto', 'rm'))
PREFERENCES = {'dpo lora': dpo, 'kto full': kto | full, 'dpo full': dpo | full, 'rm lora': rm, 'orpo lora plain': dpo | plain | dict(pref_loss='orpo'),
               'dpo full bf16 by four': dpo | full | bf16 | by_four, 'kto lora bf16 by four': kto | bf16 | by_four, 'simpo full': dpo | full | dict(pref_loss='simpo'), 'rm full bf16': rm | full | bf16, 'rm full plain': rm | full | plain, 'rm lora bf16 by four': rm | bf16 | by_four,
               'qwen3_vl dpo lora': dpo | dict(model='qwen3_vl'),
               'dpo lora bf16 z2': dpo | bf16 | dict(zero='z2'), 'kto full bf16 z2': kto | full | bf16 | dict(zero='z2'), 'rm full z0': rm | full | dict(zero='z0'), 'rm full bf16 z0': rm | full | bf16 | dict(zero='z0'),
               'rm full bf16 z2': rm | full | bf16 | dict(zero='z2'), 'rm full z3': rm | full | dict(zero='z3'), 'dpo lora z3': dpo | dict(zero='z3')}
if not TRAINS_KTO:
    PREFERENCES = {name: changes for name, changes in PREFERENCES.items() if changes['stage'] != 'kto'}
    FEW = [name for name in FEW if name in PREFERENCES | FAMILIES]
CASES = ALONE | RANKS | MORE | FAMILIES | PREFERENCES

TOWERS = {'qwen2_vl': dict(embed_dim=160, hidden_size=256), 'qwen2_5_vl': dict(hidden_size=160, intermediate_size=320, out_hidden_size=256, fullatt_block_indexes=[2, 5]),
          'qwen3_vl': dict(hidden_size=160, intermediate_size=320, out_hidden_size=256, deepstack_visual_indexes=[1, 3])}

def _medium(family, small, folder):
    "A model folder with seven million random weights: more layers, wider ones, embedding and head apart."
    import torch
    from safetensors.torch import save_file
    shutil.copytree(small, folder, ignore=shutil.ignore_patterns('*.safetensors'))
    config = json.loads((small/'config.json').read_text()) | {'tie_word_embeddings': False}
    config['text_config'] |= dict(hidden_size=256, num_hidden_layers=6, intermediate_size=704, num_attention_heads=8, num_key_value_heads=4,
                                  vocab_size=4096, tie_word_embeddings=False) | ({} if family == 'qwen3_vl' else dict(layer_types=['full_attention']*6))
    config['vision_config'] |= dict(depth=6, num_heads=5) | TOWERS[family]
    (folder/'config.json').write_text(json.dumps(config))
    model = family_class(family, 'ForConditionalGeneration')(family_class(family, 'Config').from_pretrained(folder)).to(torch.bfloat16)
    save_file(model.state_dict(), folder/'model.safetensors', {'format': 'pt'})
    return folder

@pytest.fixture(scope='session')
def mediums(tiny, tmp_path_factory):
    "A medium model of each family, made when it is asked for."
    folder = tmp_path_factory.mktemp('models')
    @cache
    def medium(family):
        return _medium(family, tiny if family == 'qwen2_vl' else tiny_model(folder/f'small-{family}', family=family), folder/f'medium-{family}')
    return medium

@pytest.fixture(scope='session')
def medium(mediums): return mediums('qwen2_vl')

@pytest.fixture(scope='session')
def make(tiny, medium, mediums, data, tmp_path_factory):
    "The recipe of a case."
    work = tmp_path_factory.mktemp('runs')
    rows = json.loads((data/'car_item'/'train.json').read_text())[:8]
    pictures = [str(data/path) for row in rows for path in row['images']]
    singles = [{'images': [p], 'instruction': '<image>What is this?', 'input': '', 'output': 'A car.'} for p in pictures]
    Registry(work/'data').add('single', singles)
    Registry(work/'data').add('ranked', [{k: v for k, v in s.items() if k != 'output'} | {'chosen': s['output'], 'rejected': 'It is a dog.'} for s in singles])
    Registry(work/'data').add('marked', [s | {'kto_tag': i % 2 == 0} for i, s in enumerate(singles)])
    Registry(work/'data').add('pairs', [s | {'images': [s['images'][0], p], 'instruction': '<image>' + s['instruction']} for s,p in zip(singles, reversed(pictures))])
    write_clip(work/'clip.mp4', 16, 4, (256, 256))
    Registry(work/'data').add('clip', [{'videos': [str(work/'clip.mp4')], 'messages': [{'role': 'user', 'content': '<video>What is this?'}, {'role': 'assistant', 'content': 'A car.'}]}]*8)
    def make(name, model='medium', zero=None, asks=False, **changes):
        common = dict(image_min_pixels=200_000, image_max_pixels=262_144, preprocessing_num_workers=None, dataset_dir=str(work/'data'), cache_dir=str(work/'cache'))
        folder = {'tiny': tiny, 'medium': medium}.get(model) or mediums(model)
        if asks: return predict_recipe(folder, 'single', work/name, **common | dict(use_cpu=True, per_device_eval_batch_size=4, max_new_tokens=8) | changes)
        shared = common | dict(lora_rank=8, max_steps=2, save_strategy='no', plot_loss=None, gradient_accumulation_steps=1, bf16=None)
        config = zero and zero_config(zero)
        if zero: config['zero_optimization'] |= SMALL[zero]
        engine = {'deepspeed': config} if zero else {'use_cpu': True}
        usual = {'dpo': 'ranked', 'rm': 'ranked', 'kto': 'marked'}.get(changes.get('stage'), 'single')
        return train_recipe(folder, changes.pop('dataset', usual), work/name, **shared | engine | changes)
    make.work = work
    return make

def _start(folder, recipes, *launcher):
    "Begin to count the live bytes of recipes."
    script = os.path.join(os.path.dirname(__file__), os.pardir, 'nbs', 'benchmarks', 'live_bytes.py')
    folder.mkdir()
    (folder/'jobs.json').write_text(json.dumps(recipes))
    return subprocess.Popen([sys.executable, *launcher, script, folder/'jobs.json'], stdout=(folder/'log').open('w'), stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {'OMP_NUM_THREADS': '1', 'HF_DATASETS_CACHE': str(folder/'cache')})

def _sample(batches):
    "The longest sample of the batches that a run has met."
    batch = max(batches, key=lambda b: b['tokens'])
    rows, tokens = batch['tokens']
    parts = batch['grids'][:len(batch['grids'])//rows]
    return {'tokens': tokens, 'pictures': [h*w//4 for t,h,w in parts for _ in range(t)], 'padded': batch['padded']}  # each step of a clip is seen by itself

@pytest.fixture(scope='session')
def cases(make, request):
    "Real and predicted bytes of the cases that are asked for."
    asked = [i.callspec.params['name'] for i in request.session.items if i.originalname == 'test_real_runs']
    recipes = {name: make(name, **CASES[name]) for name in asked}
    launchers = {'alone': [], 'ranks': ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']}
    parted = {kind: {n: r for n,r in recipes.items() if ('deepspeed' in r) == (kind == 'ranks')} for kind in launchers}
    children = {kind: _start(make.work/kind, parted[kind], *launchers[kind]) for kind in launchers}
    failed = [kind for kind,child in children.items() if child.wait()]
    assert not failed, '\n'.join((make.work/kind/'log').read_text()[-5000:] for kind in failed)
    def compare(name):
        found = [json.loads(file.read_text()) for kind in launchers for file in (make.work/kind).glob(f'{name}.[01].json')]
        most = max(found, key=lambda f: f['peak'])
        return most['peak'], predict_memory(recipes[name], None, len(found), gpu=False, sample=_sample(most['batches']))
    with ThreadPoolExecutor(2) as pool: return {name: pool.submit(compare, name) for name in recipes}

@pytest.mark.parametrize('name', [*ALONE, *RANKS, *FEW, *(pytest.param(name, marks=pytest.mark.soak) for name in [*MORE, *FAMILIES, *PREFERENCES] if name not in FEW)])
def test_real_runs(name, cases):
    "Within 2 %; of Qwen2-VL, not more than 1 % too low."
    real, predicted = cases[name].result()
    error = predicted.tensors/real - 1
    said = f'{predicted.tensors:,} bytes predicted at the {predicted.when}, {real:,} counted: {error:+.2%}; {predicted.parts}'
    print(f'\n{name}: {said}') # pytest -s
    assert (-.02 if name in FAMILIES else -.01) <= error <= .02, said

def test_counted_as_by_torchs_profiler(medium):
    "The counter itself: a model is made and trained for a step, and the allocator is watched."
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from qwen2vl_nb.memory.simulate import LiveBytes
    config = Qwen2VLConfig.from_pretrained(medium)
    def step():
        model = Qwen2VLForConditionalGeneration(config)
        ids = torch.tensor([[config.vision_start_token_id, *[config.image_token_id]*252, *range(5, 40)]])
        pictures = dict(pixel_values=torch.randn(1008, 1176), image_grid_thw=torch.tensor([[1, 28, 36]]))
        if TRANSFORMERS >= (5, 3): pictures |= dict(mm_token_type_ids=(ids == config.image_token_id).int())
        model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), **pictures).loss.backward()
        torch.optim.AdamW(model.parameters(), fused=True).step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile, LiveBytes('cpu') as live: step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == '[memory]']
    seen, counted = max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))), sum(live.peak.values())
    assert abs(counted/seen - 1) < .005, f'{counted:,} bytes counted, {seen:,} seen by the profiler'

PUBLISHED = {'Qwen2-VL-2B': 2.209e9, 'Qwen2-VL-7B': 8.291e9, 'Qwen2-VL-72B': 73.41e9, 'Qwen2.5-VL-3B': 3.755e9, 'Qwen2.5-VL-7B': 8.292e9, 'Qwen2.5-VL-32B': 33.45e9,
             'Qwen2.5-VL-72B': 73.41e9, 'Qwen3-VL-2B': 2.128e9, 'Qwen3-VL-4B': 4.438e9, 'Qwen3-VL-8B': 8.767e9, 'Qwen3-VL-32B': 33.36e9}

@pytest.mark.parametrize('name,count', PUBLISHED.items())
def test_parameters_of_the_published_sizes(name, count):
    from qwen2vl_nb.memory.simulate import build_model
    recipe = {'model_name_or_path': '-', 'do_train': True, 'finetuning_type': 'full', 'flash_attn': 'disabled'}
    model = build_model({'config': model_config(name), 'recipe': recipe, 'dtype': 'bfloat16', 'cast': None})
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=.0005)

@pytest.mark.parametrize('flash_attn', ['auto', 'fa2'])
def test_samples_without_padding_are_predicted_for_a_gpu(flash_attn, tiny):
    "FlashAttention takes keys that several heads share."
    recipe = train_recipe(tiny, 'car_item', flash_attn=flash_attn)
    assert predict_memory(recipe, None, 1, sample={'tokens': 288, 'pictures': [252], 'padded': False}).tensors > 0

# --- what must hold for every number of ranks, batch and bucket; nothing is simulated anew for these

SAMPLE = {'tokens': 288, 'pictures': [252], 'padded': True}
names, numbers = st.sampled_from(['lora bf16', 'full bf16']), st.integers(1, 64)
zeros = ['z0', 'z2', 'z2_offload', 'z3', 'z3_offload']
buckets = st.fixed_dictionaries({'reduce_bucket_size': st.integers(1000, 10**7), 'stage3_prefetch_bucket_size': st.integers(0, 10**7),
    'stage3_param_persistence_threshold': st.integers(0, 10**5), 'stage3_max_live_parameters': st.integers(0, 10**7),
    'stage3_max_reuse_distance': st.integers(0, 10**7), 'sub_group_size': st.integers(1000, 10**7)})
def padding(ranks): return 4*ranks*1000 # bytes: fewer than 1000 parameters, each padded where it is gathered and where its gradient is, in bf16
some = settings(max_examples=int(os.environ.get('EXAMPLES', 100)), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

@pytest.fixture(scope='session')
def ask(make):
    "Predict a case with other numbers: ZeRO config, ranks, micro batch, accumulation, buckets."
    recipes = {name: make(name, use_cpu=None, **CASES[f'{name} z2'] | {'zero': None}) for name in ('lora bf16', 'full bf16')}
    def ask(name, zero, ranks, batch=1, twice=1, **sizes):
        config = zero and zero_config(zero)
        if zero: config['zero_optimization'] |= sizes
        recipe = recipes[name] | {'per_device_train_batch_size': batch, 'gradient_accumulation_steps': twice}
        return predict_memory(recipe, config, ranks, gpu=False, sample=SAMPLE)
    return ask

@some
@given(name=names, ranks=st.tuples(st.integers(2, 64), st.integers(2, 64)).map(sorted), batch=st.integers(1, 16), twice=st.integers(1, 2), sizes=buckets)
def test_more_ranks_never_need_more_under_zero_3(name, ranks, batch, twice, sizes, ask):
    "But for padding: a parameter is made a multiple of the ranks where it is gathered, and its gradient where it is dealt out."
    fewer, more = (ask(name, 'z3', n, batch, twice, **sizes) for n in ranks)
    assert more.tensors <= fewer.tensors + padding(ranks[1])

@some
@given(stage=st.sampled_from(['z2', 'z3']), ranks=st.integers(1, 32), batch=st.integers(1, 16), twice=st.integers(1, 4), sizes=buckets)
def test_offload_takes_no_more_of_the_gpu_for_full_fine_tuning(stage, ranks, batch, twice, sizes, ask):
    "Up to so many ranks that a share of the optimizer is less than z2_offload's buffer for the largest parameter; here from 38."
    kept, offloaded = (ask('full bf16', zero, ranks, batch, twice, **sizes) for zero in (stage, f'{stage}_offload'))
    assert offloaded.tensors <= kept.tensors and offloaded.host > kept.host == 0

@some
@given(name=names, zero=st.sampled_from([None, *zeros]), ranks=numbers, batch=st.integers(1, 16), twice=st.integers(1, 4), sizes=buckets)
def test_parts_are_positive_and_larger_batches_take_more(name, zero, ranks, batch, twice, sizes, ask):
    one, two = (ask(name, zero, ranks, n, twice, **sizes) for n in (batch, 2*batch))
    assert min(one.parts.values()) >= 0 and one.tensors == sum(one.parts.values()) > 0
    assert two.tensors >= one.tensors
    assert one.low <= one.peak <= one.high

# --- what can't be predicted, in words

def _model(folder, text):
    (folder/'config.json').write_text(text)
    return dict(model_name_or_path=str(folder))

FAULTS = {
    'a name without a size': (lambda f: dict(model_name_or_path='Qwen/Qwen2-VL'), {}, 'Qwen/Qwen2-VL is not a model folder, and its name has none of the sizes of Qwen2-VL: 2B, 7B, 72B'),
    'a size that is not published': (lambda f: dict(model_name_or_path='Qwen/Qwen2-VL-3B'), {}, 'none of the sizes of Qwen2-VL: 2B, 7B, 72B'),
    'a model of another kind': (lambda f: _model(f, '{"model_type": "llama"}'), {}, 'is of a llama model; supported are Qwen2-VL'),
    'a config of no kind': (lambda f: _model(f, '{}'), {}, 'supported are Qwen2-VL'),
    'a config that is a list': (lambda f: _model(f, '[]'), {}, 'config.json'),
    'a config that is torn': (lambda f: _model(f, '{"model_type": "qwen2_'), {}, 'config.json is not JSON'),
    'a config that is not text': (lambda f: (f/'config.json').write_bytes(b'\xff\xfe\x00') and dict(model_name_or_path=str(f)), {}, 'config.json is not JSON'),
    'a config without layers': (lambda f: _model(f, '{"model_type": "qwen2_vl", "vision_config": {}, "hidden_size": 8}'), {}, 'config.json lacks num_hidden_layers, '),
    'no GPU': ({}, dict(world_size=0), 'gpus must be at least 1, not 0'),
    'fewer than none': ({}, dict(world_size=-2), 'gpus must be at least 1, not -2'),
    'no samples at once': (dict(per_device_train_batch_size=0), {}, 'per_device_train_batch_size must be at least 1'),
    'text for a number': (dict(per_device_train_batch_size='4', cutoff_len='x'), {}, "per_device_train_batch_size must be a number, not '4'.\ncutoff_len must"),
    'two precisions': (dict(bf16=True, fp16=True), {}, 'bf16 and fp16 are both set: choose one'),
    'quantized and full': (dict(quantization_bit=4, finetuning_type='full'), {}, 'A quantized model can only be trained with LoRA'),
    'quantized under ZeRO-3': (dict(quantization_bit=4), dict(zero='z3'), 'not predicted with ZeRO-3'),
    'in eight bits': (dict(quantization_bit=8), {}, 'only those in 4 bits'),
    'another optimizer': (dict(optim='adafactor'), {}, "The optimizer 'adafactor' is not predicted; AdamW is"),
    'another way to train': (dict(finetuning_type='oft'), {}, "finetuning_type 'oft' is not predicted; lora, full and freeze are"),
    'reinforcement': (dict(stage='ppo'), {}, "stage 'ppo' is not predicted"),
    'nothing to train': (dict(freeze_language_model=True), {}, 'Nothing would be trained'),
    'weights that are quantized already': (lambda f: _model(f, json.dumps(model_config('Qwen2-VL-7B') | {'quantization_config': {'quant_method': 'awq', 'bits': 4}})), {}, 'are quantized already (awq), which is not predicted'),
    'weights that are quantized already, by name': (dict(model_name_or_path='Qwen/Qwen2.5-VL-7B-Instruct-AWQ'), {}, 'are quantized already (awq), which is not predicted'),
    'a reference model under ZeRO-3': (dict(stage='dpo', finetuning_type='full'), dict(zero='z3', gpus=2), 'A reference model under ZeRO-3 is not predicted'),
    'another reference model': (dict(stage='dpo', ref_model='other'), {}, 'ref_model is not predicted'),
    'ZeRO-1': ({}, dict(zero={'zero_optimization': {'stage': 1}}), 'ZeRO stage 1 is not predicted'),
    'offload to disk': ({}, dict(zero={'zero_optimization': {'stage': 3, 'offload_param': {'device': 'nvme'}}}), 'only to the host'),
    'fp8': ({}, dict(zero='z3_fp8'), 'needs `fp8: true` and a Hopper GPU'),
    'an unknown ZeRO config': ({}, dict(zero='z9'), "There is no ZeRO config 'z9'; choose one of z0"),
    'a picture longer than its sample': ({}, dict(sample={'tokens': 8, 'pictures': [12]}), 'The pictures take 12 tokens, but the sample has 8'),
}

@pytest.mark.parametrize('changes,arguments,words', FAULTS.values(), ids=FAULTS.keys())
def test_what_cannot_be_predicted_is_said(changes, arguments, words, tiny, tmp_path):
    recipe = train_recipe(tiny, 'car_item', tmp_path/'run') | (changes(tmp_path) if callable(changes) else changes)
    with pytest.raises(ValueError) as e: predict_memory(recipe, **{'sample': SAMPLE} | arguments)
    assert words in str(e.value)

def test_several_faults_come_together(tiny, tmp_path):
    recipe = train_recipe(tiny, 'car_item', tmp_path/'run', fp16=True, quantization_bit=4, finetuning_type='full', optim='lomo')
    with pytest.raises(ValueError) as e: predict_memory(recipe, world_size=0)
    assert len(str(e.value).splitlines()) == 4

def test_a_table_that_takes_a_while_says_how_far_it_is(tmp_path, monkeypatch, capsys, tiny):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))  # nothing has been simulated yet
    recipe = train_recipe(tiny, 'car_item')
    longest = {'tokens': 72, 'pictures': [16]}
    assert len(zero_table(recipe, gpus=2, gpu_gib=8, sample=longest)) == 7
    assert 'Simulating a step' in (said := capsys.readouterr().out) and '5/5' in said
    zero_table(recipe, gpus=2, gpu_gib=8, sample=longest)
    assert not capsys.readouterr().out  # what is known takes no time
