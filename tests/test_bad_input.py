"What people get wrong, and the words they get for it; nothing is started, nothing on disk is lost."
import json, shutil

import pytest

from qwen2vl_nb.recipe import load_recipe, predict_recipe, save_recipe, train_recipe
from qwen2vl_nb.zero import zero_config
from qwen2vl_nb.data.check import check_samples
from qwen2vl_nb.data.registry import Registry
from qwen2vl_nb.data.sources import read_samples
from qwen2vl_nb.data.split import split_samples
from qwen2vl_nb.memory.estimate import predict_memory
from qwen2vl_nb.memory.plan import pick_zero, zero_table
from qwen2vl_nb.prediction.engines import predict
from qwen2vl_nb.prediction.predictions import Predictions
from qwen2vl_nb.prediction.scores import score
from qwen2vl_nb.run.loss import plot_loss
from qwen2vl_nb.run.start import attach, launch

def _recipe(tiny, data, tmp_path, **changes):
    return train_recipe(tiny, 'car_item', tmp_path/'run', dataset_dir=str(data), bf16=None, use_cpu=True) | changes

def _csv(folder, text, name='labels.csv', encoding='utf-8'):
    (folder/name).write_bytes(text.encode(encoding))
    return folder/name

READING = {
    'no such file': (lambda f: f/'gone.csv', 'There is no file'),
    'a kind that is not read': (lambda f: _csv(f, 'x', 'labels.docx'), 'cannot read .docx'),
    'an empty file': (lambda f: _csv(f, ''), 'not a CSV file'),
    'a header alone': (lambda f: _csv(f, 'image,output\n'), 'has no rows'),
    'a column misnamed': (lambda f: _csv(f, 'imag,output\na.png,b\n'), "no column 'image' for the picture; did you mean 'imag'"),
    'ragged rows': (lambda f: _csv(f, 'image,output\na.png,b\nc.png,d,e,f\n'), 'line 3'),
    'JSON cut off': (lambda f: _csv(f, '[{"image": "a.png"},\n{"ima', 'labels.json'), 'line 2, column 2'),
    'JSON of another shape': (lambda f: _csv(f, '{"rows": []}', 'labels.json'), 'it should be a list of rows'),
    'JSON rows that are no rows': (lambda f: _csv(f, '[1, {}, "x"]', 'labels.json'), r'row\(s\) 0, 2 are'),
    'broken lines': (lambda f: _csv(f, '{}\n{a}\n{}\n{b}\n', 'labels.jsonl'), 'line 2.*line 4'),
}

@pytest.mark.parametrize('source,words', READING.values(), ids=READING.keys())
def test_reading(source, words, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=words): read_samples(source(tmp_path), prompt='What is this?')

LAUNCHING = {
    'an unknown data set': (dict(dataset='car_itme'), "did you mean 'car_item'"),
    'no registry': (dict(dataset_dir='/nowhere'), 'There is no /nowhere/dataset_info.json'),
    'no model': (dict(model_name_or_path='/nowhere/model_7b'), 'There is no folder /nowhere/model_7b'),
    'a cutoff inside a picture': (dict(cutoff_len=10), r'300 row\(s\) of car_item have more tokens than cutoff_len 10; row 0 has 53, 12 of them for pictures'),
    'an adapter for full fine-tuning': (dict(adapter_name_or_path='/nowhere', finetuning_type='full'), 'An adapter is refused unless'),
    'a ZeRO file that does not exist': (dict(deepspeed='examples/deepspeed/ds_z3_config.json', use_cpu=None), 'ships its ZeRO configs in its repository'),
    'use_cpu with ZeRO-3': (dict(deepspeed=zero_config('z3')), 'sees a single process'),
    'bf16 without a GPU': (dict(bf16=True, use_cpu=None), 'refuses bf16 on the CPU'),
    'bf16 ranks without a GPU': (dict(bf16=True, use_cpu=None, deepspeed=zero_config('z2')), 'refuses bf16 on the CPU'),
}

@pytest.mark.parametrize('changes,words', LAUNCHING.values(), ids=LAUNCHING.keys())
def test_launching(changes, words, tiny, data, tmp_path, monkeypatch):
    monkeypatch.setattr('qwen2vl_nb.run.start._check_seconds', 60)  # on a busy machine, too, the rows are counted before the start
    with pytest.raises(ValueError, match=words): launch(_recipe(tiny, data, tmp_path, **changes), nproc=2 if changes.get('deepspeed') else 1)
    assert not (tmp_path/'run').exists(), 'nothing was started'

def test_several_faults_come_together(tiny, data, tmp_path):
    with pytest.raises(ValueError) as e: launch(_recipe(tiny, data, tmp_path, dataset='car_itme,alpaka_en', template='x', bf16=True, use_cpu=None))
    assert all(w in str(e.value) for w in ("'car_item'", "'alpaca_en'", 'bf16'))

def test_a_finished_run_is_not_written_over(tiny, data, tmp_path):
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'train_results.json').write_text('{}')
    with pytest.raises(ValueError, match='contains a finished run'): launch(_recipe(tiny, data, tmp_path))

def test_a_torn_model_is_seen(tiny, data, tmp_path):
    model = shutil.copytree(tiny, tmp_path/'model')
    weights = (model/'model.safetensors').read_bytes()
    (model/'model.safetensors').write_bytes(weights[:len(weights)//2])
    with pytest.raises(ValueError, match='cut off or damaged'): launch(_recipe(model, data, tmp_path))

def test_a_model_of_another_kind(tiny, data, tmp_path):
    model = shutil.copytree(tiny, tmp_path/'model')
    (model/'config.json').write_text(json.dumps(json.loads((model/'config.json').read_text()) | {'model_type': 'llama'}))
    with pytest.raises(ValueError, match='contains a llama model'): launch(_recipe(model, data, tmp_path))
    with pytest.raises(ValueError, match='supported are Qwen2-VL'): predict_memory(_recipe(model, data, tmp_path))

def test_a_broken_registry_is_left_alone(tmp_path):
    (tmp_path/'dataset_info.json').write_text('{"a": {}, b}')
    with pytest.raises(ValueError, match='line 1, column 11'): Registry(tmp_path).add('b', [{'images': [], 'instruction': 'x', 'output': 'y'}])
    assert (tmp_path/'dataset_info.json').read_text() == '{"a": {}, b}'

OTHERS = {
    'a batch of none': (lambda t: train_recipe('m', 'd', per_device_eval_batch_size=0), 'at least 1'),
    'a recipe as .json': (lambda t: save_recipe({}, t/'r.json'), 'must end in .yaml'),
    'a recipe that is none': (lambda t: load_recipe(_csv(t, 'just words', 'r.yaml')), 'contains no recipe'),
    'no adapter there': (lambda t: predict_recipe('m', 'd', adapter=t), 'There is no adapter'),
    'no run there': (lambda t: attach(t), 'No run was launched'),
    'no predictions there': (lambda t: Predictions(t), 'nothing was predicted here'),
    'no log there': (lambda t: plot_loss(t), 'has logged nothing yet'),
    'an unknown config': (lambda t: zero_config('z5'), 'choose one of z0'),
    'an unknown engine': (lambda t: predict(predict_recipe('m', 'd'), engine='abacus'), 'no engine'),
    'no GPUs': (lambda t: zero_table(train_recipe('model_7b', 'd')), 'No GPU is visible: say which GPUs the run will have'),
    'a model of unknown size': (lambda t: zero_table(train_recipe('my_model', 'd'), gpus=1, gpu_gib=80), 'none of the sizes of Qwen2-VL: 2B, 7B, 72B'),
    'a prediction with ZeRO': (lambda t: pick_zero(predict_recipe('model_7b', 'd', t/'out'), gpus=1, gpu_gib=8), 'Only training needs'),
    'nothing to score': (lambda t: score([]), 'no predictions'),
    'a file to register': (lambda t: Registry(t).add('x', 'labels.csv'), 'give the samples that .read_samples. returns'),
    'a row that JSON has no words for': (lambda t: Registry(t).add('x', [{'images': [], 'instruction': 'a', 'output': 'b', 'n': float('nan')}]), 'Row 0 cannot be written'),
    'a file to check': (lambda t: check_samples('labels.csv'), 'Samples are checked, not files'),
    'nothing to split': (lambda t: split_samples([{'images': ['a']}]), 'both splits need some'),
}

@pytest.mark.parametrize('act,words', OTHERS.values(), ids=OTHERS.keys())
def test_others(act, words, tmp_path):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=words): act(tmp_path)
    assert not list(tmp_path.glob('*.json')), 'nothing was written'

def test_checking_samples_never_raises():
    strange = [None, 7, [], {}, {'image': None}, {'images': [None, 3.5, '', '/nowhere.png'], 'instruction': 5, 'output': ['x']}, {'image': 'x'*5000, 'instruction': '', 'output': ''}]
    assert set(check_samples(strange).row) == set(range(len(strange)))
