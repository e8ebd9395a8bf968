"""What two versions of the stack keep of what is frozen: `python nbs/benchmarks/frozen_tower.py OUT.csv`.

Counts LLaMA-Factory's own trainer on the CPU with `live_bytes.py`, predicts the same runs, and predicts 7B; once as
the versions are published and once as `launch` uses them (column `spared`). Run it under each stack: lines of other
versions stay in OUT.csv. As `frozen_tower.py --count JOBS.json` it is a rank of such a run."""
import csv, importlib.metadata, json, os, shutil, subprocess, sys, tempfile
from pathlib import Path

from qwen2vl_nb.frozen import SPARE_FROZEN
from qwen2vl_nb.memory.estimate import predict_memory
from qwen2vl_nb.recipe import predict_recipe, train_recipe
from qwen2vl_nb.data.registry import Registry
from qwen2vl_nb.zero import zero_config

DATA = Path(__file__).resolve().parents[2]/'data'
PACKAGES = ['torch', 'transformers', 'deepspeed', 'peft', 'llamafactory']
PARTS = ['weights', 'adapters', 'gradients', 'optimizer', 'communication', 'vision', 'language', 'logits', 'KV cache']
SMALL = {'z0': dict(reduce_bucket_size=200_000, allgather_bucket_size=200_000),  # else buckets of 2 GB drown all else
         'z2': dict(reduce_bucket_size=200_000, allgather_bucket_size=200_000),
         'z3': dict(sub_group_size=1e6, stage3_max_live_parameters=1.5e6, stage3_max_reuse_distance=1.5e6)}

def make_model(folder, text=(256, 6, 704), vision=(160, 6)):
    """A model folder of random weights: hidden size, layers and intermediate size of the text, width and depth of
    the vision tower."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    shutil.copytree(DATA/'tiny_qwen2vl', folder, ignore=shutil.ignore_patterns('*.safetensors'))
    config = json.loads((folder/'config.json').read_text()) | {'tie_word_embeddings': False}
    hidden, layers, between = text
    config['text_config'] |= dict(hidden_size=hidden, num_hidden_layers=layers, intermediate_size=between,
        num_attention_heads=hidden//32,
        num_key_value_heads=hidden//64, vocab_size=4096, tie_word_embeddings=False,
        layer_types=['full_attention']*layers)
    config['vision_config'] |= dict(embed_dim=vision[0], depth=vision[1], num_heads=vision[0]//32, hidden_size=hidden)
    (folder/'config.json').write_text(json.dumps(config))
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(folder)).to(torch.bfloat16)
    save_file(model.state_dict(), folder/'model.safetensors', {'format': 'pt'})
    return folder

def register_pictures(folder):
    "A data set with one picture to a sample, of 28 by 36 patches, which are 252 tokens."
    rows = json.loads((DATA/'car_item'/'train.json').read_text())[:8]
    samples = [{'images': [str(DATA/p)], 'instruction': '<image>What is this?', 'input': '', 'output': 'A car.'}
               for r in rows for p in r['images']]
    Registry(folder).add('single', samples)

def make_recipe(home, name, model, zero=None, **changes):
    "A recipe of two steps; with a ZeRO config it is for ranks."
    shared = dict(lora_rank=8, max_steps=2, image_min_pixels=200_000, image_max_pixels=262_144,
                  preprocessing_num_workers=None, save_strategy='no',
                  plot_loss=None, gradient_accumulation_steps=1, dataset_dir=str(home/'data'),
                  cache_dir=str(home/'cache'), bf16=None)
    config = zero and zero_config(zero)
    if zero: config['zero_optimization'] |= SMALL[zero]
    return train_recipe(model, 'single', home/name, **shared | ({'deepspeed': config} if zero else {'use_cpu': True})
                        | changes)

def count(folder, recipes, ranks=1, script='live_bytes.py', *options):
    "The most live bytes of any rank, and the longest sample, of each recipe."
    folder.mkdir()
    (folder/'jobs.json').write_text(json.dumps(recipes))
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(ranks)] if ranks > 1 else []
    env = {k: v for k,v in os.environ.items() if k != 'PYTHONDONTWRITEBYTECODE'} | {'OMP_NUM_THREADS': '1',
           'CUDA_VISIBLE_DEVICES': '',
           'HF_HUB_OFFLINE': '1', 'HF_DATASETS_CACHE': str(folder/'cache')}
    child = subprocess.run([sys.executable, *launcher, Path(__file__).with_name(script), *options, folder/'jobs.json'],
                           env=env, capture_output=True, text=True)
    if child.returncode: raise RuntimeError((child.stdout + child.stderr)[-5000:])
    found = {name: [json.loads(f.read_text()) for f in folder.glob(f'{name}.[0-9].json')] for name in recipes}
    return {name: (max(f['peak'] for f in files), longest(files[0]['batches'])) for name, files in found.items()}

def longest(batches):
    "The longest sample of a step, as `predict_memory` takes it."
    batch = max(batches, key=lambda b: b['tokens'])
    rows, tokens = batch['tokens']
    return {'tokens': tokens, 'pictures': [t*h*w//4 for t,h,w in batch['grids']][:len(batch['grids'])//rows],
            'padded': batch['padded']}

def count_with_weights(jobs):
    """As `live_bytes.py`; weights count too where threads loaded them, which no dispatch mode sees: transformers 5
    does so."""
    import live_bytes
    plain = live_bytes.steps_of
    def steps_of(live, *more):
        steps = plain(live, *more)
        begin = steps.on_step_begin
        def on_step_begin(args, state, control, model=None, **others):
            for t in [*model.parameters(), *model.buffers()]: live.add(t)
            begin(args, state, control, model=model, **others)
        steps.on_step_begin = on_step_begin
        return steps
    live_bytes.steps_of = steps_of
    live_bytes.main(jobs)

def line(what, estimate, counted='', **said):
    "A line of the CSV file, in bytes."
    versions = {p: importlib.metadata.version(p) for p in PACKAGES}
    parts = {p: estimate.parts.get(p, 0) for p in PARTS}
    said = {'what': what, 'spared': os.environ[SPARE_FROZEN]} | said
    return said | {'counted': counted, 'predicted': estimate.tensors} | parts | versions

def small_runs(home):
    "Counted and predicted, on small models."
    register_pictures(home/'data')
    wide, medium = make_model(home/'wide', (128, 4, 384), (320, 8)), make_model(home/'medium')
    tower = dict(freeze_vision_tower=False)
    alone = {'tower frozen': make_recipe(home, 'frozen', wide),
             'tower trained': make_recipe(home, 'trained', wide, **tower)}
    ranks = {'z3': make_recipe(home, 'z3', medium, 'z3'),
             'z3 twice': make_recipe(home, 'twice', medium, 'z3', gradient_accumulation_steps=2),
             'z3 tower trained': make_recipe(home, 'z3t', medium, 'z3', **tower)}
    for n, recipes in (1, alone), (2, ranks):
        for name, (counted, sample) in count(home/f'ranks{n}', recipes, n, Path(__file__).name, '--count').items():
            estimate = predict_memory(recipes[name], None, n, gpu=False, sample=sample)
            yield line(name, estimate, counted, model='small', ranks=n, tokens=sample['tokens'],
                       image_tokens=sum(sample['pictures']))

def of_7b():
    "Predicted, for 7B on GPUs."
    recipe = train_recipe('Qwen2-VL-7B', 'data', gradient_accumulation_steps=1)
    prompt = predict_recipe('Qwen2-VL-7B', 'data', per_device_eval_batch_size=1, flash_attn='fa2')
    cases = [('LoRA', recipe, None, 1, 2048, [768]), ('LoRA', recipe, None, 1, 2048, [1274]),
             ('z3', recipe, 'z3', 4, 2048, [1274]),
             ('z3 twice', recipe | {'gradient_accumulation_steps': 2}, 'z3', 4, 2048, [1274]),
             ('prompt', prompt, None, 1, 30_720, [])]
    for what, asked, zero, ranks, tokens, pictures in cases:
        estimate = predict_memory(asked, zero, ranks, sample={'tokens': tokens, 'pictures': pictures, 'padded': False})
        yield line(what, estimate, model='7B', ranks=ranks, tokens=tokens, image_tokens=sum(pictures))

def main(out):
    rows = []
    for os.environ[SPARE_FROZEN] in '0', '1':
        with tempfile.TemporaryDirectory() as home: rows += [*small_runs(Path(home)), *of_7b()]
    file = Path(out)
    others = list(csv.DictReader(file.open())) if file.is_file() else []
    kept = [row for row in others if any(row[p] != rows[0][p] for p in PACKAGES)]
    with file.open('w', newline='') as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(kept + rows)

if __name__ == '__main__': count_with_weights(sys.argv[2]) if sys.argv[1] == '--count' else main(sys.argv[1])
