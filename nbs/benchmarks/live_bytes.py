"""What training keeps in memory on the CPU, counted: `python nbs/benchmarks/live_bytes.py JOBS.json`, or by torchrun.

JOBS.json has recipes by name. They are run one after another in this process by LLaMA-Factory's own `run_exp`, while
the bytes of all live tensors are counted. Next to the file each rank writes NAME.RANK.json: the most bytes that lived
in a step after the first (in which the optimizer's state is made), the batches of that step, and versions. A recipe
with ZeRO-3 comes last, since DeepSpeed changes torch's own modules for it."""
import gc, importlib.metadata, json, os, sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from qwen2vl_nb.frozen import spare_frozen
from qwen2vl_nb.run.rank import blocking
from qwen2vl_nb.memory.simulate import LiveBytes

PACKAGES = ['torch', 'transformers', 'peft', 'deepspeed', 'llamafactory']

def shape_of(batch):
    "Rows and tokens of a batch, the patches of its pictures and clips, and whether it has padding."
    grids = [grid for part in ('image', 'video') for grid in batch.get(f'{part}_grid_thw', torch.empty(0)).tolist()]
    return {'tokens': list(batch['input_ids'].shape), 'grids': grids,
            'padded': not batch['attention_mask'].all().item()}

@contextmanager
def counted_inputs(live, batches):
    """The trainer's batches are counted as they are handed over, not what the data loader does to make them; noted
    in `batches`."""
    from transformers import Trainer
    fetch = Trainer.get_batch_samples
    def get_batch_samples(*args, **kwargs):
        with _disable_current_modes(): got = fetch(*args, **kwargs)
        for leaf in tree_leaves([dict(b) for b in got[0]]): live.add(leaf)
        batches[:] = map(shape_of, got[0])
        return got
    Trainer.get_batch_samples = get_batch_samples
    try: yield
    finally: Trainer.get_batch_samples = fetch

def steps_of(live, batches, steps):
    "A callback that adds each step to `steps`: its peak in bytes and its batches."
    from transformers import TrainerCallback
    class Steps(TrainerCallback):
        def on_step_begin(self, *args, model, **kwargs):
            for tensor in [*model.parameters(), *model.buffers()]:
                live.add(tensor) # transformers 5 loads in threads, unseen
            gc.collect()
            live.peak = {}
        def on_step_end(self, *args, **kwargs):
            steps.append({'peak': sum(live.peak.values()), 'batches': list(batches)})
    return Steps()

@contextmanager
def counted_answers(live, steps):
    "Each batch of a prediction is added to `steps`, with what it takes to answer it."
    from transformers import Seq2SeqTrainer
    answer = Seq2SeqTrainer.prediction_step
    def prediction_step(self, model, inputs, *args, **kwargs):
        for tensor in [*model.parameters(), *model.buffers(), *inputs.values()]: live.add(tensor)
        gc.collect()
        live.peak, shape = {}, shape_of(inputs)
        answered = answer(self, model, inputs, *args, **kwargs)
        steps.append({'peak': sum(live.peak.values()), 'batches': [shape]})
        return answered
    Seq2SeqTrainer.prediction_step = prediction_step
    try: yield
    finally: Seq2SeqTrainer.prediction_step = answer

def count(recipe):
    """Run a recipe; its step with the most live bytes, after the first; of a prediction the last batch, beside which
    no next one waits."""
    from llamafactory.train.tuner import run_exp
    live, batches, steps = LiveBytes('cpu'), [], []
    spare_frozen(recipe)
    with counted_inputs(live, batches), counted_answers(live, steps), live:
        run_exp(recipe, callbacks=[steps_of(live, batches, steps)])
    return steps[-1] if recipe.get('do_predict') else max(steps[1:], key=lambda step: step['peak'])

def forget():
    "Let go of what accelerate and transformers keep of the last run; the process group stays."
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config
    AcceleratorState._reset_state(True)
    unset_hf_deepspeed_config()
    gc.collect()

def set_device(state):
    "A rank's device. Accelerate calls it `cpu:0`, for which torch copies each batch; on a GPU none is copied."
    state.device = torch.device('cpu')

def main(file):
    from accelerate.state import PartialState
    from deepspeed.runtime.zero import partition_parameters
    from transformers import training_args
    PartialState.set_device = set_device
    partition_parameters.dist.all_gather_into_tensor = blocking(partition_parameters.dist.all_gather_into_tensor)
    training_args.is_torch_bf16_gpu_available = lambda: True # else bf16 is refused for DeepSpeed's ranks without a GPU
    torch.distributed.destroy_process_group = lambda: None # as `run_exp` would; all recipes share the ranks' group
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    environment, rank = dict(os.environ), os.environ.get('RANK', 0)
    for name, recipe in json.loads(Path(file).read_text()).items():
        found = count(recipe) | versions
        Path(file).with_name(f'{name}.{rank}.json').write_text(json.dumps(found))
        forget()
        os.environ.clear()
        os.environ.update(environment) # precision is kept there too

if __name__ == '__main__': main(sys.argv[1])
