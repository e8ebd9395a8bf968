"Samples against what LLaMA-Factory and the real processor make of them."
import json, random

import pytest
from PIL import Image

from qwen2vl_nb.data import image_tokens, read_samples, split_samples
from qwen2vl_nb.registry import Registry

@pytest.fixture(scope='module')
def plugin():
    from llamafactory.data.mm_plugin import get_mm_plugin
    return get_mm_plugin(name='qwen2_vl', image_token='<|image_pad|>', video_token='<|video_pad|>')

@pytest.fixture(scope='module')
def processor(tiny):
    from transformers import AutoProcessor
    return AutoProcessor.from_pretrained(tiny)

def _true_tokens(plugin, processor, size, **limits):
    "Tokens by LLaMA-Factory's own picture steps and the real processor."
    image = plugin._preprocess_image(Image.new('RGB', size), **limits)
    grid = processor.image_processor(images=[image], return_tensors='pt')['image_grid_thw'][0]
    return int(grid.prod()) // processor.image_processor.merge_size**2

def test_image_tokens_are_those_of_the_trainer(plugin, processor, tiny):
    rng = random.Random(0)
    sizes = [(int(10**rng.uniform(0, 3.3)), int(10**rng.uniform(0, 3.3))) for _ in range(250)] + [(112, 84), (28, 28), (27, 29), (1, 1), (1999, 9), (9, 1999), (42, 42), (70, 98)]
    for size in sizes:
        limits = dict(image_max_pixels=rng.choice([768*768, 300_000, 1_500_000]), image_min_pixels=rng.choice([32*32, 3136, 40_000]))
        assert image_tokens(*size, **limits, model=tiny) == _true_tokens(plugin, processor, size, **limits), (size, limits)

def test_image_tokens_follow_the_model_folder(plugin, tiny, tmp_path):
    import shutil
    from transformers import AutoProcessor
    folder = shutil.copytree(tiny, tmp_path/'model')
    config = json.loads((folder/'preprocessor_config.json').read_text())
    config = {k:v for k,v in config.items() if k not in ('size',)} | {'min_pixels': 20_000, 'max_pixels': 100_000}
    (folder/'preprocessor_config.json').write_text(json.dumps(config))
    processor = AutoProcessor.from_pretrained(folder)
    limits = dict(image_max_pixels=768*768, image_min_pixels=32*32)
    for size in [(112, 84), (640, 480), (1000, 100), (50, 50)]:
        assert image_tokens(*size, model=folder) == _true_tokens(plugin, processor, size, **limits), size

def test_the_stored_data_is_deterministic_and_does_not_leak(data, tmp_path):
    from qwen2vl_nb.tiny import make_car_item
    make_car_item(tmp_path/'car_item')
    stored = {p.relative_to(data): p for p in sorted((data/'car_item').rglob('*')) if p.is_file()}
    made = {p.relative_to(tmp_path): p for p in sorted(tmp_path.rglob('*')) if p.is_file()}
    assert list(stored) == list(made)
    for name, path in stored.items():
        if path.suffix == '.png': assert Image.open(path).tobytes() == Image.open(made[name]).tobytes(), name
        else: assert path.read_bytes() == made[name].read_bytes(), name
    halves = [{Image.open(p).tobytes() for s in read_samples(data/'car_item'/f'{half}.json') for p in s['image']} for half in ('train', 'test')]
    assert len(halves[0]) >= 200 and len(halves[1]) >= 100 and not halves[0] & halves[1]

def test_what_is_registered_is_what_llamafactory_loads(data, tiny, tmp_path):
    "Rows written here, loaded by LLaMA-Factory's own loader, from another working folder."
    import os
    from llamafactory.data.converter import align_dataset  # noqa: F401  (the loader imports it lazily)
    from llamafactory.data.loader import _get_merged_dataset
    from llamafactory.hparams import get_train_args
    folder = tmp_path/'数据 data'
    train, test = split_samples(read_samples(data/'car_item'/'test.json'), test=.3)
    Registry(folder).add('小车', train)
    args = get_train_args(dict(model_name_or_path=str(tiny), stage='sft', do_train=True, dataset='小车', dataset_dir=str(folder), template='qwen2_vl', output_dir=str(tmp_path/'out'), use_cpu=True, report_to='none'))
    before = os.getcwd()
    os.chdir(tmp_path)
    try: rows = _get_merged_dataset(['小车'], *args[:3], 'sft')
    finally: os.chdir(before)
    assert [(r['_images'], r['_prompt'][0]['content'], r['_response'][0]['content']) for r in rows] == [(s['image'], s['instruction'], s['output']) for s in train]
