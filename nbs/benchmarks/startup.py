"""The start of a training taken apart: python startup.py recipe.yaml OUT.json

The same steps as `llamafactory-cli train` takes, in one process; the time of each is written to OUT.json at the first
step."""
import json, sys, time
from contextlib import contextmanager

BEGAN = time.perf_counter()
took = {}

@contextmanager
def timed(what):
    "Add the seconds of a block to those of `what`."
    start = time.perf_counter()
    yield
    took[what] = took.get(what, 0) + time.perf_counter() - start

def timed_call(what, function):
    "A function whose calls are timed."
    def call(*args, **kwargs):
        with timed(what): return function(*args, **kwargs)
    return call

def main(out):
    with timed('import torch'): import torch # noqa: F401
    with timed('import transformers, datasets, peft, trl'): import transformers, datasets, peft, trl # noqa: F401, E401
    with timed('import the rest of LLaMA-Factory'):
        from llamafactory.train import tuner
        from llamafactory.train.sft import workflow
    tuner.get_train_args = timed_call('read the recipe', tuner.get_train_args)
    workflow.load_tokenizer = timed_call('tokenizer and processor', workflow.load_tokenizer)
    workflow.get_dataset = timed_call('data', workflow.get_dataset)
    workflow.load_model = timed_call('model', workflow.load_model)

    class FirstStep(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs): self.began = time.perf_counter()
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step > 1: return
            took['first step'] = time.perf_counter() - self.began
            took['all'] = time.perf_counter() - BEGAN
            with open(out, 'w') as f: json.dump(took, f)

    tuner.run_exp(callbacks=[FirstStep()])

if __name__ == '__main__': main(sys.argv.pop())
