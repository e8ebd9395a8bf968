"""What training takes on a GPU, measured: `python nbs/benchmarks/gpu_memory.py OUT.csv`, a line for each case below.

Every row is LLaMA-Factory's own trainer in a process of its own, on a model of random weights with the published
dimensions. One rank is a real run. Rank 0 of several is the same trainer under torch's fake process group: it holds its
share, and collectives return at once with what it put in, so one card is enough; NCCL's own buffers are missing there.
A row that is in the file for this card is not measured again. Then `calibrate(pandas.read_csv('OUT.csv'))`. The models
take 21 GB of the folder for temporary files.

`--cpu` tries the same on small models without a GPU: bytes of live tensors are counted, offloaded ones among them."""
import argparse, csv, importlib.metadata, json, os, shutil, subprocess, sys, tempfile
from contextlib import nullcontext
from pathlib import Path

from qwen2vl_nb.data.tokens import count_tokens
from qwen2vl_nb.model import image_tokens
from qwen2vl_nb.recipe import load_recipe, save_recipe, train_recipe
from qwen2vl_nb.data.registry import Registry
from qwen2vl_nb.stack import gpus
from qwen2vl_nb.zero import zero_config

DATA = Path(__file__).resolve().parents[2]/'data'
TINY = DATA/'tiny_qwen2vl'  # its tokenizer, processor and special tokens serve every size
STEPS = 3                   # the optimizer's state is there from the second on
GiB = 2**30

# hidden, layers, heads, key-value heads, intermediate, vocabulary, tied; vision width, depth, heads; M-RoPE sections
SIZES = {'2B': (1536, 28, 12, 2, 8960, 151_936, True, 1280, 32, 16, [16, 24, 24]),
         '7B': (3584, 28, 28, 4, 18_944, 152_064, False, 1280, 32, 16, [16, 24, 24]),
         'small': (256, 6, 8, 2, 768, 4096, False, 128, 4, 4, [4, 6, 6])}

# model, finetuning, ZeRO, ranks, micro batch, tokens of a sample, pixels of its picture
ON_GPU = """
2B lora none       1 1 1024  602112
2B lora none       1 2 2048 1003520
2B lora z2_offload 1 1 2048 1003520
2B lora z3         1 2 2048 1003520
2B lora z3_offload 1 1 1024  602112
2B full none       1 1 2048 1003520
2B full z2         1 1 1024  602112
2B full z2_offload 1 2 2048  602112
2B full z3         1 2 1024  200704
2B full z3_offload 1 1 2048 1003520
7B lora none       1 1 2048 1003520
7B lora z0         1 2 2048 1003520
7B lora z2         1 1 1024  200704
7B lora z2_offload 1 2 1024  602112
7B lora z3         1 1 2048 1003520
7B lora z3_offload 1 2 2048  602112
7B full z2         1 1 1024  200704
2B full z2         4 1 2048 1003520
7B lora z2         4 2 2048 1003520
7B lora z3         8 1 1024  602112
7B full z2         4 1 2048 1003520
7B full z2         8 2 1024  602112
7B full z2_offload 4 1 1024  200704
7B full z3         4 1 2048 1003520
7B full z3         8 2 2048  602112
7B full z3_offload 8 1 2048 1003520
"""
ON_CPU = """
small lora none       1 1 256 100352
tiny  full z2         1 2 128  50176
tiny  full z3         4 1 128  50176
tiny  full none       1 2 128  50176
small lora z0         1 2 256 100352
small lora z3         8 1 256 100352
small full z2_offload 1 1 256 100352
small full z3_offload 4 2 256 100352
"""

ASKED = ['model', 'finetuning', 'zero', 'ranks', 'how', 'tokens', 'image_tokens', 'batch']
MEASURED = ['allocated', 'reserved', 'context', 'predicted']  # bytes
PACKAGES = ['torch', 'transformers', 'deepspeed', 'llamafactory']

def cases(table):
    "The rows of a table as dicts."
    for line in table.strip().splitlines():
        model, kind, zero, *numbers = line.split()
        ranks, batch, tokens, pixels = map(int, numbers)
        yield dict(model=model, finetuning=kind, zero=zero, ranks=ranks, how='fake group' if ranks > 1 else 'trainer',
                   tokens=tokens,
                   image_tokens=image_tokens(112, 84, pixels, pixels), batch=batch, pixels=pixels)

def machine(cpu):
    "The card, its driver and the packages that are measured."
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    if cpu: return {'card': 'cpu', 'driver': ''} | versions
    import pynvml
    pynvml.nvmlInit()
    return {'card': gpus()[0].name, 'driver': pynvml.nvmlSystemGetDriverVersion()} | versions

# --- the models, and samples of a given length

def model_config(size):
    "The tiny model's `config.json` in another size."
    hidden, layers, heads, kv, intermediate, vocabulary, tied, width, depth, vision_heads, sections = SIZES[size]
    config = json.loads((TINY/'config.json').read_text())
    config['text_config'] |= dict(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv,
        intermediate_size=intermediate, vocab_size=vocabulary, tie_word_embeddings=tied, initializer_range=.02,
        rope_scaling=dict(type='mrope', mrope_section=sections))
    del config['text_config']['layer_types']  # one for each layer of the tiny model
    config['vision_config'] |= dict(embed_dim=width, hidden_size=hidden, depth=depth, num_heads=vision_heads,
                                    initializer_range=.02)
    return config | {'tie_word_embeddings': tied}

def build(folder, size):
    "Write a model folder with random weights; in a child process, since a CUDA context stays with the process."
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForImageTextToText
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns('*.safetensors'))
    config = model_config(size)
    Path(folder, 'config.json').write_text(json.dumps(config, indent=2))
    with torch.device('cuda' if torch.cuda.is_available() else 'cpu'):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    weights = model.state_dict()
    if config['tie_word_embeddings']: del weights['lm_head.weight']
    # `save_pretrained` would rewrite the config, without what is tied
    save_file(weights, f'{folder}/model.safetensors', {'format': 'pt'})

def model_folder(work, size):
    "The folder of a model, built when it is first asked for."
    if size == 'tiny': return TINY
    folder = work/size
    if not folder.exists(): subprocess.run([sys.executable, __file__, '--build', folder, size], check=True)
    return folder

def write_data(folder, case):
    "Enough `car_item` samples for all steps, their answers so long that each sample has the tokens of the case."
    samples = json.loads((DATA/'car_item'/'train.json').read_text())[:STEPS*case['batch']*case['ranks']]
    samples = [s | {'images': [str(DATA/path) for path in s['images']]} for s in samples]
    lengths = lambda: count_tokens(samples, TINY, image_min_pixels=case['pixels'],
                                   image_max_pixels=case['pixels']).total
    samples = [s | {'output': s['output'] + ' car'*int(case['tokens'] - n)} for s, n in zip(samples, lengths())]
    assert (lengths() == case['tokens']).all(), '" car" should be one token, and the samples without it shorter'
    Registry(folder).add('car_item', samples)

def recipe_of(case, model, run, cpu):
    "The recipe of a case; `run` is a folder for all that it writes."
    # LLaMA-Factory refuses bf16 on CPU ranks
    on_cpu = dict(bf16=None, use_cpu=True if case['zero'] == 'none' else None) if cpu else {}
    zero = {} if case['zero'] == 'none' else {'deepspeed': zero_config(case['zero'])}
    return train_recipe(model, 'car_item', run/'out', finetuning_type=case['finetuning'], dataset_dir=str(run/'data'),
        per_device_train_batch_size=case['batch'], gradient_accumulation_steps=1, cutoff_len=case['tokens'],
        image_min_pixels=case['pixels'], image_max_pixels=case['pixels'], preprocessing_num_workers=None,
        max_steps=STEPS,
        logging_steps=1, save_strategy='no', plot_loss=None, **zero, **on_cpu)

# --- in the child: the trainer, and what it takes

def join_fake_group(ranks):
    "Make this process rank 0 of many, with nobody else there."
    import torch.distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore
    torch.distributed.init_process_group('fake', store=FakeStore(), rank=0, world_size=ranks)
    import deepspeed  # noqa: F401
    # DeepSpeed's shared memory between CPU ranks would wait for the others; deepspeed.comm.torch, as an attribute, is
    # torch itself
    sys.modules['deepspeed.comm.torch'].build_shm_op = lambda: None

def in_use():
    "Bytes of the card that are in use by the driver's count."
    card = gpus()[0]
    return card.total - card.free

def leave_out_host(counter, trainer, callback):
    """A callback by which the counter leaves out what a card would not hold: weights as they are read, and batches
    made ahead."""
    from torch.utils._python_dispatch import _disable_current_modes
    fetch = trainer.get_batch_samples
    def fetch_uncounted(*args, **kwargs):
        with _disable_current_modes(): batches, count = fetch(*args, **kwargs)
        for batch in batches:
            for tensor in batch.values(): counter.add(tensor)
        return batches, count
    trainer.get_batch_samples = fetch_uncounted
    class FromHere(callback):
        def on_train_begin(self, *args, model, **kwargs):
            for tensor in [*model.parameters(), *model.buffers()]: counter.add(tensor)
            counter.peak = {}
    return FromHere()

def on_card(read, before):
    "Figures of the card now; context is what the driver counts for this run beyond torch's reserve."
    import torch
    allocated, reserved = read()
    return dict(allocated=allocated, reserved=reserved, context=in_use() - before - torch.cuda.memory_reserved())

def train(run):
    """Run the recipe in a folder; at each step note in `figures.json`, in bytes, what RECORD_VRAM rounds to
    hundredths of a GiB."""
    run = Path(run)
    asked = json.loads((run/'asked.json').read_text())
    if asked['ranks'] > 1: join_fake_group(asked['ranks'])
    from llamafactory.train import callbacks, tuner
    from transformers import Trainer, TrainerCallback
    Trainer.save_model = lambda *args, **kwargs: None  # up to 16 GB that nobody reads, after the last figure
    from qwen2vl_nb.memory.simulate import LiveBytes
    counter, read = LiveBytes('cpu') if asked['cpu'] else None, callbacks.get_peak_memory
    def noted():
        found = dict(allocated=sum(counter.peak.values()), reserved='',
                     context='') if counter else on_card(read, asked['before'])
        (run/'figures.json').write_text(json.dumps(found))
        return found['allocated'], found['reserved'] or 0
    callbacks.get_peak_memory = noted
    with counter or nullcontext():
        tuner.run_exp(load_recipe(run/'recipe.yaml'), callbacks=[leave_out_host(counter, Trainer, TrainerCallback)]
                      if counter else [])

# --- around the child

def environment(case, run, cpu):
    "What the child's environment has beside ours: one card, and what LLaMA-Factory's launcher or torchrun sets."
    env = dict(RECORD_VRAM='1', HF_DATASETS_CACHE=str(run/'cache'),
               PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
               CUDA_VISIBLE_DEVICES='' if cpu else os.environ.get('CUDA_VISIBLE_DEVICES', '0').split(',')[0])
    if cpu: env |= dict(DS_ACCELERATOR='cpu')
    if case['zero'] != 'none':
        env |= dict(PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True', TORCH_NCCL_AVOID_RECORD_STREAMS='1')
    if case['ranks'] > 1:
        ranks = str(case['ranks'])
        env |= dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_ADDR='127.0.0.1',
                    MASTER_PORT='29999')
    return {k: v for k,v in os.environ.items() if k not in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')} | env

def measure(case, recipe, run, cpu):
    "Run a case in a child; its figures, or empty ones where the card was too small."
    write_data(run/'data', case)
    save_recipe(recipe, run/'recipe.yaml')
    before = 0 if cpu else in_use()  # what others hold of the card
    (run/'asked.json').write_text(json.dumps(dict(ranks=case['ranks'], cpu=cpu, before=before)))
    # torchrun itself, as `llamafactory-cli train` starts it with FORCE_TORCHRUN=1 and NPROC_PER_NODE=1
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '1']
    command = [sys.executable, *(torchrun if case['how'] == 'trainer' and case['zero'] != 'none' else []), __file__,
               '--train', run]
    done = subprocess.run(command, env=environment(case, run, cpu), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, errors='replace')
    if done.returncode == 0: return json.loads((run/'figures.json').read_text())
    if 'CUDA out of memory' in done.stdout: return dict(allocated='', reserved='', context='')
    raise RuntimeError(f'exit status {done.returncode}\n{done.stdout[-4000:]}')

def predicted(case, recipe, cpu):
    "What `predict_memory` says of a case."
    from qwen2vl_nb.memory.estimate import predict_memory
    return predict_memory(recipe, None, case['ranks'], not cpu,
                          {'tokens': case['tokens'], 'pictures': [case['image_tokens']],
                           'padded': case['tokens'] % 8 > 0})

def is_measured(out, row):
    "Whether the file has a line for this case on this card."
    if not out.exists(): return False
    with open(out, newline='') as f:
        return any(all(line[k] == str(row[k]) for k in ASKED + ['card']) for line in csv.DictReader(f))

def append(out, row):
    "Add a line to the file, which is begun with its header."
    columns, is_new = ASKED + MEASURED + ['card', 'driver'] + PACKAGES, not out.exists()
    with open(out, 'a', newline='') as f:
        writer = csv.DictWriter(f, columns, extrasaction='ignore', lineterminator='\n')
        if is_new: writer.writeheader()
        writer.writerow(row)

def measure_all(out, chosen, cpu):
    "Measure what is not in the file yet, a line at a time; the number of cases that failed."
    here, failed = machine(cpu), 0
    with tempfile.TemporaryDirectory() as work:
        for case in chosen:
            name = ' '.join(str(case[k]) for k in ASKED)
            if is_measured(out, case | here): print(f'{name}: already measured', flush=True); continue
            run = Path(tempfile.mkdtemp(dir=work))
            recipe = recipe_of(case, model_folder(Path(work), case['model']), run, cpu)
            guess = predicted(case, recipe, cpu)
            if not cpu and guess.peak > gpus()[0].total:
                print(f'{name}: left out, needs {guess.peak/GiB:.0f} GiB', flush=True); continue
            try: row = case | here | measure(case, recipe, run, cpu) | {'predicted': guess.tensors}
            except RuntimeError as e: failed += 1; print(f'{name}: failed, {e}', flush=True); continue
            append(out, row)
            print(f"{name}: {row['allocated']/2**20:,.0f} MiB" if row['allocated'] else f'{name}: out of memory',
                  flush=True)
    return failed

def calibrate(rows):
    """Fit `reserved = offset + factor*predicted` and `context` on every second row; the relative error of their sum
    on the others."""
    import numpy as np
    rows = rows.dropna(subset=['reserved', 'context', 'predicted'])
    if len(rows) < 6: raise ValueError(f'{len(rows)} rows have figures of a GPU; at least 6 are needed.')
    fitted, others = rows[::2], rows[1::2]
    # weighted, so that the error is relative: small runs count as much as large ones
    factor, offset = np.polyfit(fitted.predicted.astype(float), fitted.reserved.astype(float), 1, w=1/fitted.reserved)
    context, taken = fitted.context.mean(), others.reserved + others.context
    error = (offset + factor*others.predicted + context)/taken - 1
    return dict(factor=float(factor), offset=float(offset), context=float(context), fitted=len(fitted),
                tested=len(others),
                mean_error=float(error.abs().mean()), worst_under=float(max(0, -error.min())))

def main():
    if sys.argv[1:2] == ['--build']: return build(*sys.argv[2:])
    if sys.argv[1:2] == ['--train']: return train(sys.argv[2])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', type=Path, help='CSV file; lines are added to it')
    parser.add_argument('--models', nargs='+', choices=['tiny', *SIZES], help='only rows with these models')
    parser.add_argument('--rows', nargs='+', type=int, help='only these rows of the table, from 0')
    parser.add_argument('--cpu', action='store_true', help='small models on the CPU')
    asked = parser.parse_args()
    if not asked.cpu and not gpus(): sys.exit('There is no NVIDIA GPU here; --cpu tries the script on small models.')
    table = list(cases(ON_CPU if asked.cpu else ON_GPU))
    chosen = [c for i,c in enumerate(table) if (asked.rows is None or i in asked.rows)
              and (not asked.models or c['model'] in asked.models)]
    if not chosen:
        sys.exit(f'No row was chosen; there are {len(table)}, of '
                 f'{", ".join(dict.fromkeys(c["model"] for c in table))}.')
    sys.exit(1 if measure_all(asked.out, chosen, asked.cpu) else 0)

if __name__ == '__main__': main()
