"Tokenized data that is kept for the next start: the same training to the bit, and nothing that a killed, foreign or full folder could spoil."
import json, shutil, signal, subprocess, sys
from pathlib import Path

import pytest

from conftest import small_disk, until
from qwen2vl_nb.recipe import argument_names
from qwen2vl_nb.run.loss import read_log
from qwen2vl_nb.run.start import launch
from qwen2vl_nb.run.tokenized import TOKENIZED, clear_tokens, describe_tokens, find_tokens, kept_tokens, tokens_key

@pytest.fixture
def tokens(tmp_path, monkeypatch):
    "A folder for tokenized data."
    monkeypatch.setenv(TOKENIZED, str(tmp_path/'tokens'))
    return tmp_path/'tokens'

@pytest.fixture
def sampled(data, tmp_path):
    "A data set of which a start draws rows at random."
    entry = json.loads((data/'dataset_info.json').read_text())['car_item']
    (tmp_path/'dataset_info.json').write_text(json.dumps({'car_item': entry | {'file_name': str(data/entry['file_name']), 'num_samples': 24}}))
    return {'dataset_dir': str(tmp_path), 'media_dir': str(data), 'max_samples': None}

def test_the_second_start_trains_the_same(few_steps, sampled, tokens, tmp_path):
    """Two ranks, with rows drawn at random, others split off for evaluation, and grouping by length. The second run takes the tokens of the first, is stopped, and resumed
    after they were removed."""
    grouping = {'group_by_length': True} if 'group_by_length' in argument_names() else {}
    recipe = lambda name: few_steps(output_dir=tmp_path/name, max_steps=60, val_size=.25, eval_strategy='steps', eval_steps=20, plot_loss=None, lora_dropout=.1, **grouping, **sampled)
    one = launch(recipe('one'), nproc=2)
    one.wait()
    assert one.status == 'done', one.failure
    assert 'is kept for later runs' in one.log(0) and len(kept_tokens()) == 1 and kept_tokens().rows[0] == 24
    two = launch(recipe('two'), nproc=2)
    until(lambda: two.progress.step or not two.is_running, 'the first step')
    assert not clear_tokens(), 'they were removed while a run uses them'
    two.stop()
    assert 'of an earlier run is used' in two.log(0) and 'Running tokenizer' not in two.log(0) + two.log(1)
    assert clear_tokens() and kept_tokens().empty
    if two.status == 'stopped': two.resume().wait()
    assert two.status == 'done', two.failure
    logs = [log[log.loss.notna() | (log.current_steps % 20 == 0)] for log in map(read_log, (one, two))]  # a run that is stopped evaluates once more
    assert len({log[['current_steps', 'loss', 'eval_loss']].to_csv(index=False) for log in logs}) == 1
    assert len({(run.output_dir/'adapter_model.safetensors').read_bytes() for run in (one, two)}) == 1
    assert not any('token' in (run.output_dir/'recipe.yaml').read_text() for run in (one, two))

@pytest.fixture(scope='module')
def described(tiny, data, tmp_path_factory):
    "What LLaMA-Factory's tokens depend on, of a copy of data and model that a test may change."
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer
    folder = tmp_path_factory.mktemp('described')
    model = Path(shutil.copytree(tiny, folder/'model'))
    (folder/'rows.json').write_text(json.dumps([{'instruction': 'What?', 'input': '', 'output': 'A car.'}]))
    (folder/'dataset_info.json').write_text(json.dumps({'rows': {'file_name': 'rows.json'}}))
    def describe():
        recipe = dict(model_name_or_path=str(model), stage='sft', do_train=True, dataset='rows', dataset_dir=str(folder), template='qwen2_vl', use_cpu=True, report_to='none',
                      output_dir=str(folder/'out'))
        model_args, data_args, training_args, *_ = get_train_args(recipe)
        return describe_tokens(data_args, training_args, 'sft', **load_tokenizer(model_args))
    describe.folder = folder
    return describe

CHANGES = {
    'a row': ('rows.json', 'A car.', 'A bus.'),
    'an entry of the registry': ('dataset_info.json', '"rows.json"', '"rows.json", "columns": {"prompt": "output", "response": "instruction"}'),
    'a token': ('model/tokenizer_config.json', '"<|box_start|>"', '"<|box_begin|>"'),
    'the chat template': ('model/chat_template.jinja', '', ' '),
    'a limit of the processor': ('model/preprocessor_config.json', '"merge_size": 2', '"merge_size": 4'),
}

@pytest.mark.parametrize('name', CHANGES)
def test_a_change_gives_other_tokens(name, described):
    file, old, new = CHANGES[name]
    before, path = tokens_key(described()), described.folder/file
    assert tokens_key(described()) == before
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new) if old else new + text)
    assert tokens_key(described()) != before
    path.write_text(text)
    assert tokens_key(described()) == before

KEEP = '''
import os, signal, sys, time
from pathlib import Path
from datasets import Dataset, DatasetDict
from qwen2vl_nb.run import tokenized
class Killed(DatasetDict):
    def save_to_disk(self, folder):
        super().save_to_disk(folder)
        if sys.argv[2] == 'killed': os.kill(os.getpid(), signal.SIGKILL)
data = Killed(train=Dataset.from_dict({'input_ids': [[1, 2], [3]], 'images': [None, None]}))
print(tokenized.keep_tokens(Path(sys.argv[1]), {'a': 1}, data, time.time()), flush=True)
'''

def _keep(folder, how='whole'): return subprocess.run([sys.executable, '-c', KEEP, folder, how], capture_output=True, text=True)

def test_a_writer_that_is_killed_leaves_nothing_to_take(tokens):
    "Killed when all data is written and only its record is missing; the next writer removes what it left."
    assert _keep(tokens, 'killed').returncode == -signal.SIGKILL
    left, = tokens.iterdir()
    assert left.name.startswith('new-') and (left/'data'/'dataset_dict.json').exists()
    assert find_tokens(tokens, {'a': 1}) is None and left.exists()
    assert 'is kept' in _keep(tokens).stdout
    assert not left.exists() and find_tokens(tokens, {'a': 1})

def test_a_full_disk_is_not_filled_further(tmp_path):
    "Tokens are kept only if there is enough room besides."
    with small_disk(tmp_path/'disk', '64m'):
        assert 'not enough room' in _keep(tmp_path/'disk'/'tokens').stdout
        assert not [*(tmp_path/'disk'/'tokens').iterdir()]
