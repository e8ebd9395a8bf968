"vLLM in an environment of its own: the answers are those of transformers. `VLLM_PYTHON` names its interpreter."
import base64, os, random, shlex, shutil
from pathlib import Path

import httpx
import pytest
from PIL import Image

from conftest import PATIENCE, float32, free_ports, serving
from qwen2vl_nb.model import family_of
from qwen2vl_nb.prediction.engines import predict
from qwen2vl_nb.recipe import predict_recipe
from qwen2vl_nb.data.registry import Registry, dataset_samples
from qwen2vl_nb.processes import marked
from qwen2vl_nb.run.folder import state_or_empty
from qwen2vl_nb.run.merge import export
from qwen2vl_nb.run.start import launch
from qwen2vl_nb.tiny import tiny_model
from qwen2vl_nb.tuning.hand_over import serving_lines
from boxes import draw_boxes, teach_boxes

__test__ = 'VLLM_PYTHON' in os.environ  # without the other environment there is nothing to collect

def _by_vllm(recipe, samples, media='data'):
    p = predict(recipe, samples, engine='vllm', python=os.environ['VLLM_PYTHON'], media=media)
    assert not marked(state_or_empty(p, 'run.json')['id']), 'nothing is left of it'
    assert {row['engine'] for row in p} == {'vllm'}
    return p

def _told(predictions):
    return [(row['predict'], row['prompt_tokens'], row['finish_reason']) for row in predictions]

@pytest.fixture(scope='module')
def samples(data): return dataset_samples(Registry(data), 'car_item_test')

@pytest.fixture(scope='module')
def ask(tiny):
    def make(folder, model=tiny, adapter=None):
        return predict_recipe(model, None, folder, adapter, max_new_tokens=24, use_cpu=True)
    return make

@pytest.fixture
def train(few_steps):
    "An adapter that has learnt what it is asked."
    def make(**changes):
        taught = dict(max_steps=60, max_samples=None, per_device_train_batch_size=16, learning_rate=2e-3)
        return launch(few_steps(**taught, **changes), nproc=1).wait()
    return make

def test_answers_are_those_of_transformers(ask, samples, tmp_path):
    ours, theirs = _by_vllm(ask(tmp_path/'my vllm 店'), samples), predict(ask(tmp_path/'hf'), samples)
    assert len(ours) == 100 and not ours.failed and _told(ours) == _told(theirs)

def test_so_they_are_with_an_adapter_of_rank_32_and_pictures_by_their_path(ask, samples, train, tmp_path):
    adapter = train(lora_rank=32)
    ours = _by_vllm(ask(tmp_path/'vllm', adapter=adapter), samples, 'file')
    assert _told(ours) == _told(predict(ask(tmp_path/'hf', adapter=adapter), samples))
    assert sum(row['predict'] == row['label'] for row in ours) >= 90, 'without the adapter none is right'

def test_boxes_come_back_with_their_marks(ask, tiny, tmp_path):
    taught, boxes = teach_boxes(tiny, tmp_path/'taught'), draw_boxes(tmp_path/'boxes', 40, 1)
    recipe = ask(tmp_path/'vllm', taught) | {'max_new_tokens': 48}
    ours = _by_vllm(recipe, boxes)
    assert _told(ours) == _told(predict(recipe | {'output_dir': str(tmp_path/'hf')}, boxes))
    assert sum(row['predict'] == row['label'] for row in ours) >= 36

def test_an_export_is_served_by_the_line_of_its_run(ask, samples, train, tmp_path):
    "What `serving_lines` says, with the interpreter of vLLM's environment and a free port; a question by plain HTTP, and rows."
    run = train(lora_rank=32)
    merged, (port,) = export(run, tmp_path/'export'), free_ports(1)
    program, verb, model, *options = shlex.split(serving_lines(run, merged)['vllm'])
    assert (program, verb, model) == ('vllm', 'serve', str(merged))
    command = [os.environ['VLLM_PYTHON'], '-m', 'vllm.entrypoints.openai.api_server', '--model', model, *options, '--port', str(port), '--enforce-eager']
    with open(tmp_path/'log', 'w') as log, serving(command, port, stderr=log, env=os.environ | {'VLLM_CPU_KVCACHE_SPACE': '1', 'PYTHONPATH': ''}) as url:
        picture = base64.b64encode(Path(samples[0]['images'][0]).read_bytes()).decode()
        parts = [{'type': 'image_url', 'image_url': {'url': f'data:image/png;base64,{picture}'}}, {'type': 'text', 'text': samples[0]['instruction'].removeprefix('<image>')}]
        body = {'model': model, 'messages': [{'role': 'user', 'content': parts}], 'temperature': 0, 'max_tokens': 24}
        said = httpx.post(f'{url}/chat/completions', json=body, timeout=PATIENCE).json()
        served = predict(ask(tmp_path/'served', merged), samples, engine='openai', base_url=url)
    theirs = predict(ask(tmp_path/'hf', merged), samples)
    assert said['choices'][0]['message']['content'] == theirs[0]['predict']
    assert _told(served) == _told(theirs) and sum(row['predict'] == row['label'] for row in served) >= 90

def _of_all_kinds(samples, folder):
    "Rows with several pictures and none, of sizes that are scaled, with a system prompt, with several turns."
    chance, sized = random.Random(0), []
    for i, (width, height) in enumerate([(100, 75), (30, 300), (1600, 1200), (20, 20)]):
        sized.append(str(folder/f'{i}.png'))
        Image.frombytes('RGB', (width, height), chance.randbytes(3*width*height)).save(sized[-1])
    one, two = (s['images'][0] for s in samples[:2])
    turns = '<image>What is this?', 'A car.', 'And <image>?', 'A bus.', 'Sure?'
    roles = 'user', 'assistant', 'user', 'assistant', 'user'
    talk = [{'role': role, 'content': text} for role, text in zip(roles, turns)]
    return [
        {'instruction': 'First <image> then <image>.', 'input': 'Which <image>?', 'images': [one, two, one]},
        {'instruction': 'What is this?'},
        {'instruction': '<image>What is this?', 'system': 'Be brief. 简短。', 'images': [one]},
        {'messages': talk, 'images': [one, two]},
        {'instruction': 'And now <image>?', 'history': [['<image>What?', 'A car.']], 'images': [two, one]},
        *({'instruction': '<image>\nWhat is this?\n', 'images': [p]} for p in sized)]

def test_in_float32_no_answer_differs_whatever_is_asked(ask, samples, train, tiny_fp32, tmp_path):
    "Also where the model was never taught to answer, and with an adapter for the vision tower."
    adapter = train(lora_rank=100, freeze_vision_tower=False)
    forms = 'What is this?', 'Name the item.', 'Make a list.', 'Say it in two words.', 'Name the color.'
    asked = [s | {'instruction': f'<image>{form}'} for form in forms for s in samples]
    asked += _of_all_kinds(samples, tmp_path)
    ours = _by_vllm(ask(tmp_path/'vllm', tiny_fp32, adapter), asked)
    theirs = predict(ask(tmp_path/'hf', tiny_fp32, adapter), asked)
    assert len({row['predict'] for row in ours}) > 50, 'there is something to differ in'
    assert not ours.failed and _told(ours) == _told(theirs)

def test_one_that_cannot_start_says_why_and_leaves_nothing(ask, samples, tiny, tmp_path):
    broken = Path(shutil.copytree(tiny, tmp_path/'broken'))
    os.truncate(broken/'model.safetensors', 100_000)
    said = 'ended with exit status 1 before the work began.*SafetensorError'
    with pytest.raises(RuntimeError, match=said): _by_vllm(ask(tmp_path/'vllm', broken), samples)
    assert not marked(state_or_empty(tmp_path/'vllm', 'run.json')['id'])

@pytest.fixture(scope='module', params=['qwen2_5_vl', 'qwen3_vl'])
def other(request, tmp_path_factory):
    "A small model of another family in float32, with random weights."
    return float32(tiny_model(tmp_path_factory.mktemp('models')/request.param, family=request.param))

def test_other_families_see_the_same_tokens(other, samples, tmp_path):
    "Rows of all kinds, as many tokens as the server counts; the last template of a family is the one for models that think."
    thought = '<think>\nIt is red.\n</think>\n\n'
    thoughtful = [{'role': role, 'content': text} for role, text in (('user', '<image>What?'), ('assistant', thought + 'A car.'), ('user', 'Sure?'))]
    asked = [*_of_all_kinds(samples, tmp_path), *samples[:10], {'messages': thoughtful, 'images': samples[0]['images']}]
    recipe = predict_recipe(other, None, tmp_path/'vllm', template=family_of(other).templates[-1], max_new_tokens=8, use_cpu=True)
    ours, theirs = _by_vllm(recipe, asked), predict(recipe | {'output_dir': str(tmp_path/'hf')}, asked)
    assert not ours.failed and [row['prompt_tokens'] for row in ours] == [row['prompt_tokens'] for row in theirs]
    whole = lambda predictions: [row['predict'].rstrip('\N{REPLACEMENT CHARACTER}') for row in predictions]  # vLLM leaves the half of a character out
    assert whole(ours) == whole(theirs) and len(set(whole(ours))) > 5
