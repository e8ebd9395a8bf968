"""What a notebook shows where something is refused: the line that was typed and the message, nothing of this package's inside."""
from contextlib import redirect_stdout
from io import StringIO
import os, warnings

import pytest
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell

import qwen2vl_nb.run.start
from qwen2vl_nb.recipe import complete_arguments, save_recipe

@pytest.fixture(scope='module')
def shell():
    yield InteractiveShell.instance(colors='nocolor')
    InteractiveShell.clear_instance()

def shown(shell, cell):
    "What is shown of the exception that a cell raises."
    with redirect_stdout(StringIO()) as text: assert not shell.run_cell(cell).success
    return text.getvalue()

REFUSED = {  # Cell → a part of the message
    'launch(recipe | {"dataset": "car_itme"}, nproc=1)': "did you mean 'car_item'",
    'launch(recipe, nproc=2, nnodes=2)': 'master=None',
    'launch(recipe, python="/no/python")': 'is not an interpreter',
    'launch(recipe, nproc=1, preview=-1)': 'from 0 (none)',
    'launch(recipe | {"output_dir": folder})': 'were not created by a run',
    'attach(folder)': 'No run was launched',
    'runs(folder + "/none")': 'There is no folder',
    'score_checkpoints(folder, "cars")': 'No run was launched',
    'Run(folder).resume()': 'There is nothing to resume',
    'Run(damaged).wait()': 'run.json',
    'export(Run(folder), folder)': 'already exists',
    'predict(recipe, [], engine="no")': "There is no engine 'no'",
    'predict(recipe | {"output_dir": folder}, [{"instruction": "?", "output": ""}])': 'another question',
    'Registry(folder).add("a,b", [{}])': 'cannot name a data set',
    'Registry(folder).add("cars", [{"instruction": "?", "output": "!"}])': 'overwrite=True',
    'Registry(folder)["cars"]': 'No data set',
    'read_samples(folder + "/labels.xlsx")': 'labels.xlsx',
    'write_samples([{"instruction": "?", "output": "!"}], folder + "/cars.json")': 'overwrite=True',
    'split_samples([], test=2)': 'test=2',
    'pick_zero(recipe, gpu_gib=80)': 'No GPU is visible',
    'zero_table(recipe)': 'No GPU is visible',
    'zero_table({}, gpus=2, gpu_gib=80)': 'names no model',
    'predict({})': 'names no folder',
    'predict(recipe, engine=Run(folder))': 'what `serve` returned',
    'serve(folder + "/no model", folder + "/served")': 'There is no folder',
    'Served(folder).ask(None, "?")': 'serve(…), called again',
    'Served(folder).ask("/no/picture.png", "?")': 'There is no file /no/picture.png',
    'zero_config("z4")': 'z4',
    'plot_loss(folder)': 'trainer_log.jsonl',
    'Predictions(damaged)': 'predictions.jsonl',
    'score([])': '',
    'compare(Run(folder), [])': 'A Run is not predictions',
    'check_samples(mend_samples([]))': 'samples, findings = mend_samples(samples)',
    'attach()': 'missing 1 required positional argument',
    'score([], tolerence=1)': "unexpected keyword argument 'tolerence'",
    'sweep(recipe, lora_rank=8)': 'not a list of values',
}

@pytest.fixture(scope='module')
def ready(shell, tiny, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('refused')
    for name in ('run.log', 'predictions.jsonl', 'cars.json'): (folder/name).write_text('mine')
    save_recipe({'model_name_or_path': str(tiny)}, folder/'recipe.yaml')
    (damaged := folder/'damaged').mkdir()
    (damaged/'run.json').write_text('{"id": ')
    os.utime(damaged/'run.json', (1e9, 1e9))
    shell.run_cell('from qwen2vl_nb.all import *')
    recipe = dict(model=tiny, dataset='car_item', output_dir=folder/'new', dataset_dir=str(data), bf16=None, use_cpu=True, max_steps=4, max_samples=16)
    shell.push({'folder': str(folder), 'damaged': str(damaged)})
    shell.push({'recipe': qwen2vl_nb.recipe.train_recipe(**recipe)})
    return shell

@pytest.mark.parametrize('cell', REFUSED)
def test_a_refusal_is_the_line_and_the_message(ready, cell):
    said = shown(ready, cell)
    assert REFUSED[cell] in said and cell in said
    assert 'qwen2vl_nb/' not in said and 'skipping' not in said, said

def test_a_fault_that_is_no_refusal_keeps_its_frames(ready):
    said = shown(ready, 'launch(7)')
    assert 'AttributeError' in said and 'qwen2vl_nb/' in said

def test_a_warning_names_the_line_that_was_typed(ready):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        ready.run_cell('launch(recipe | {"dataset": "car_itme"}, nproc=1, force=True).stop(patience=0)')
    assert {w.filename.startswith('/tmp/ipykernel') or '<ipython-input' in w.filename for w in found if 'car_itme' in str(w.message)} == {True}, found

COMPLETED = {"train_recipe('m', 'd', lora_r": ['lora_rank='], "r = train_recipe('m',\n    dict(a=1),\n    cutoff": ['cutoff_len='], 'predict_recipe(m, d, o, num_b': ['num_beams='],
             'print(lora_r': [], "train_recipe('m', 'd').get(lora_r": []}

@pytest.mark.parametrize('code', COMPLETED)
def test_tab_completes_the_arguments_of_recipes(shell, code):
    complete_arguments(shell)  # as importing the package in a notebook does
    with provisionalcompleter(): assert [c.text for c in shell.Completer.completions(code, len(code))] == COMPLETED[code]
