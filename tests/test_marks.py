"A model that is taught Qwen2-VL's own form of boxes gives them back, marks and all, whatever engine asks it."
import json, os, shutil, subprocess, sysconfig
from pathlib import Path

import httpx
import pytest
import yaml

from qwen2vl_nb.recipe import load_recipe, predict_recipe
from qwen2vl_nb.prediction.engines import predict
from qwen2vl_nb.prediction.scores import score
from qwen2vl_nb.prediction.show import show_predictions
from qwen2vl_nb.prediction.vllm import _free_ports
from boxes import draw_boxes, teach_boxes
from conftest import until

@pytest.fixture(scope='module')
def boxes(tmp_path_factory): return draw_boxes(tmp_path_factory.mktemp('boxes'), 40, 1)

@pytest.fixture(scope='module')
def taught(tiny, tmp_path_factory): return teach_boxes(tiny, tmp_path_factory.mktemp('taught'))

@pytest.fixture(scope='module')
def ask(taught):
    def make(folder, **changes):
        return predict_recipe(taught, None, folder, **dict(max_new_tokens=48, use_cpu=True, per_device_eval_batch_size=20, preprocessing_num_workers=1) | changes)
    return make

@pytest.fixture(scope='module')
def by_hf(ask, boxes, tmp_path_factory): return predict(ask(tmp_path_factory.mktemp('hf')/'out'), boxes)

def _told(predictions): return [(row['predict'], row['finish_reason'], row['prompt_tokens'], row['tokens'], row['label']) for row in predictions]

def test_boxes_come_back(by_hf, boxes):
    found = score(by_hf)
    assert found['rows'] == 40 and found['exact'] >= 90
    assert found['boxes.parsed'] == 100 and found['boxes.iou'] >= found['exact'] and found.boxes.support['(all)'] == 40
    assert {row['finish_reason'] for row in by_hf} == {'stop'} and [row['label'] for row in by_hf] == [s['output'] for s in boxes]
    assert not any('<|im_end|>' in row['predict'] for row in by_hf), 'the end token is no part of an answer'
    assert 'special tokens' not in repr(found)

def test_they_are_shown_as_text(by_hf):
    shown = show_predictions(by_hf)._repr_html_()
    assert '&lt;|box_start|&gt;' in shown and '<|' not in shown
    assert shown.count('data:image/svg+xml') == 8, 'and drawn'

def test_answers_of_a_version_that_cut_them_off_are_another_question(by_hf, ask, boxes, tmp_path):
    before = Path(shutil.copytree(by_hf.output_dir, tmp_path/'before'))
    question = json.loads((before/'question.json').read_text())
    assert question['recipe'].pop('skip_special_tokens') is False
    (before/'question.json').write_text(json.dumps(question))
    with pytest.raises(ValueError, match='skip_special_tokens: None before, False now'): predict(ask(before), boxes)

def test_llamafactorys_own_prediction_warns_that_it_cuts_them_off(ask, boxes, tmp_path):
    with pytest.warns(UserWarning, match=r'40 of 40 labels have special tokens, such as <\|object_ref_start\|>.*cut off or empty'):
        own = predict(ask(tmp_path/'own'), boxes, engine='llamafactory')
    assert [row['predict'] for row in own] == ['']*40, 'or the warning is wrong'
    assert '40 labels have special tokens such as <|object_ref_start|>, and none of their answers has any' in repr(score(own))

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

def test_llamafactorys_server_gives_them_where_it_was_started_to_keep_them(server, ask, by_hf, boxes, tmp_path):
    asked = predict(ask(tmp_path/'served'), boxes[:16], engine='openai', base_url=server, concurrency=2)
    assert _told(asked) == _told(by_hf)[:16]

def test_without_labels_they_are_kept_too(server, ask, by_hf, boxes, tmp_path):
    unlabelled = [{key: value for key, value in sample.items() if key != 'output'} for sample in boxes[:4]]
    asked = predict(ask(tmp_path/'out'), unlabelled, engine='openai', base_url=server)
    assert [row['predict'] for row in asked] == [row['predict'] for row in by_hf][:4]
    assert load_recipe(tmp_path/'out'/'recipe.yaml')['skip_special_tokens'] is False, 'the engine is told to'
    question = json.loads((tmp_path/'out'/'question.json').read_text())
    assert 'skip_special_tokens' not in question['recipe'], 'a folder of an earlier version can be resumed'

def test_llamafactorys_server_cannot_be_asked_to_keep_them():
    "Once it can, the prose about it is wrong."
    from llamafactory.api.protocol import ChatCompletionRequest
    assert 'skip_special_tokens' not in ChatCompletionRequest.model_fields
