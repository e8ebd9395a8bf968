"A model that is taught Qwen2-VL's own form of boxes gives them back, marks and all, whatever engine asks it."
import json, os, random, shutil, subprocess, sysconfig
from pathlib import Path

import httpx
import pytest
import yaml
from PIL import Image

from qwen2vl_nb.all import Registry, launch, predict, predict_recipe, score, show_predictions, train_recipe
from qwen2vl_nb.tiny import SIZE, draw_vehicle
from qwen2vl_nb.vllm_server import _free_ports
from conftest import until

COLORS = {'car': 'red', 'truck': 'yellow', 'bus': 'blue'}
BOXES = ['(50,240),(450,760)', '(550,240),(950,760)'] # In the left half of a picture, in the right half

def _draw(folder, name, n, seed):
    "Pictures of a vehicle on the left or on the right, with the box as their label."
    chance, samples = random.Random(seed), []
    for i in range(n):
        item, right = list(COLORS)[i % 3], i//3 % 2
        picture = Image.new('RGB', (2*SIZE[0], SIZE[1]), (120, 150, 120))
        picture.paste(draw_vehicle(item, COLORS[item], chance).convert('RGB'), (right*SIZE[0], 0))
        picture.save(folder/f'{name}-{i}.png')
        answer = f'<|object_ref_start|>{item}<|object_ref_end|><|box_start|>{BOXES[right]}<|box_end|>'
        samples.append({'instruction': '<image>Name the item.', 'input': '', 'output': answer, 'image': [str(folder/f'{name}-{i}.png')]})
    return samples

@pytest.fixture(scope='module')
def test_set(tmp_path_factory): return _draw(tmp_path_factory.mktemp('test'), 'test', 40, 1)

@pytest.fixture(scope='module')
def taught(tiny, tmp_path_factory):
    "The embedded model, fine-tuned to say where a vehicle is: a model folder."
    folder = tmp_path_factory.mktemp('taught')
    Registry(folder/'data').add('boxes', _draw(folder, 'train', 240, 0))
    recipe = train_recipe(tiny, 'boxes', folder/'run', dataset_dir=str(folder/'data'), finetuning_type='full', max_steps=70, learning_rate=2e-3, use_cpu=True,
        per_device_train_batch_size=16, gradient_accumulation_steps=1, bf16=None, preprocessing_num_workers=None, save_strategy='no', plot_loss=False)
    return launch(recipe).wait().output_dir

@pytest.fixture(scope='module')
def ask(taught):
    def make(folder, **changes):
        return predict_recipe(taught, None, folder, **dict(max_new_tokens=48, use_cpu=True, per_device_eval_batch_size=20, preprocessing_num_workers=1) | changes)
    return make

@pytest.fixture(scope='module')
def by_hf(ask, test_set, tmp_path_factory): return predict(ask(tmp_path_factory.mktemp('hf')/'out'), test_set)

def _told(predictions): return [(row['predict'], row['finish_reason'], row['prompt_tokens'], row['tokens'], row['label']) for row in predictions]

def test_boxes_come_back(by_hf, test_set):
    found = score(by_hf)
    assert found['rows'] == 40 and found['exact'] >= 90
    assert {row['finish_reason'] for row in by_hf} == {'stop'} and [row['label'] for row in by_hf] == [s['output'] for s in test_set]
    assert all(row['predict'].endswith('<|box_end|>') for row in by_hf), 'the end token is no part of an answer'
    assert 'special tokens' not in repr(found)

def test_they_are_shown_as_text(by_hf):
    shown = show_predictions(by_hf)._repr_html_()
    assert '&lt;|box_start|&gt;' in shown and '<|' not in shown

def test_answers_of_a_version_that_cut_them_off_are_another_question(by_hf, ask, test_set, tmp_path):
    before = Path(shutil.copytree(by_hf.output_dir, tmp_path/'before'))
    question = json.loads((before/'question.json').read_text())
    assert question['recipe'].pop('skip_special_tokens') is False
    (before/'question.json').write_text(json.dumps(question))
    with pytest.raises(ValueError, match='skip_special_tokens: None before, False now'): predict(ask(before), test_set)

def test_without_labels_they_are_kept_too(by_hf, ask, test_set, tmp_path):
    unlabelled = predict(ask(tmp_path/'out'), [{k: v for k, v in s.items() if k != 'output'} for s in test_set[:4]])
    assert [row['predict'] for row in unlabelled] == [row['predict'] for row in by_hf][:4]
    assert 'skip_special_tokens' not in json.loads((tmp_path/'out'/'question.json').read_text())['recipe'], 'so folders of an earlier version can be resumed'

def test_llamafactorys_own_prediction_warns_that_it_cuts_them_off(ask, test_set, tmp_path):
    with pytest.warns(UserWarning, match=r'40 of 40 labels have special tokens, such as <\|object_ref_start\|>.*cut off or empty'):
        own = predict(ask(tmp_path/'own'), test_set, engine='llamafactory')
    assert [row['predict'] for row in own] == ['']*40, 'or the warning is wrong'
    assert '40 labels have special tokens such as <|object_ref_start|>, and none of their answers has any' in repr(score(own))
    kept = predict(ask(tmp_path/'kept', skip_special_tokens=False), test_set[:4], engine='llamafactory')
    assert [row['predict'] for row in kept] == ['<|object_ref_start|>']*4, 'it ends there even so'

@pytest.fixture(scope='module')
def server(taught, tmp_path_factory):
    "LLaMA-Factory's own server, started so that it keeps special tokens."
    folder, port = tmp_path_factory.mktemp('api'), _free_ports(1)[0]
    args = {'model_name_or_path': str(taught), 'template': 'qwen2_vl', 'infer_backend': 'huggingface', 'skip_special_tokens': False}
    (folder/'api.yaml').write_text(yaml.safe_dump(args))
    env = os.environ | {'API_HOST': '127.0.0.1', 'API_PORT': str(port)}
    command = [Path(sysconfig.get_path('scripts'))/'llamafactory-cli', 'api', folder/'api.yaml']
    with open(folder/'log', 'wb') as log: process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    def is_ready():
        assert process.poll() is None, (folder/'log').read_text()
        try: return httpx.get(f'http://127.0.0.1:{port}/v1/models').status_code == 200
        except httpx.TransportError: return False
    try:
        until(is_ready)
        yield f'http://127.0.0.1:{port}/v1'
    finally:
        process.terminate()
        process.wait(timeout=30)

def test_llamafactorys_server_gives_them_where_it_was_started_to_keep_them(server, ask, by_hf, test_set, tmp_path):
    asked = predict(ask(tmp_path/'served'), test_set[:16], engine='openai', base_url=server, concurrency=2)
    assert _told(asked) == _told(by_hf)[:16]

def test_llamafactorys_server_cannot_be_asked_to_keep_them():
    "Once it can, the prose about it is wrong."
    from llamafactory.api.protocol import ChatCompletionRequest
    assert 'skip_special_tokens' not in ChatCompletionRequest.model_fields
