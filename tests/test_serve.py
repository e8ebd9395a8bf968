"A model that stays loaded: the same answers as other predictions, found again, asked by whoever has its key and by nobody else, and gone when it should be."
import http.client, io, json, re, shutil, socket, subprocess, sys, threading, warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import PATIENCE, small_disk, until
from qwen2vl_nb.data.registry import Registry, dataset_samples
from qwen2vl_nb.prediction.client import MOST_BYTES, ServerGone, request
from qwen2vl_nb.prediction.engines import predict
from qwen2vl_nb.prediction.predictions import Predictions
from qwen2vl_nb.prediction.serve import Served, serve
from qwen2vl_nb.processes import marked
from qwen2vl_nb.recipe import load_recipe, predict_recipe
from qwen2vl_nb.run.folder import state_or_empty
from qwen2vl_nb.run.start import attach

ASK = ['What is this?', 'Name the item.', 'Make a list.', 'Say it in two words.', 'Write the item as JSON.', 'Name the color.']

@pytest.fixture(scope='module')
def ask(tiny, data):
    "A recipe for the test set; keywords change it."
    def make(folder, **changes): return predict_recipe(tiny, 'car_item_test', folder, **dict(dataset_dir=str(data), max_new_tokens=24, use_cpu=True) | changes)
    return make

@pytest.fixture(scope='module')
def served(tiny, tmp_path_factory):
    found = serve(tiny, tmp_path_factory.mktemp('served')/'model', use_cpu=True, max_new_tokens=24)
    yield found
    found.stop()

@pytest.fixture(scope='module')
def picture(data): return str(data/'car_item'/'images'/'0001.png')

@pytest.fixture
def other(tiny, tmp_path):
    "A model of a test's own, which may come to harm."
    found = serve(tiny, tmp_path/'other', use_cpu=True, idle=60)
    yield found
    found.stop()

@pytest.fixture(scope='module')
def mixed(data):
    "Samples with a picture, several, none, a clip, a dialogue; one whose picture is missing, and one that is no regular file."
    rows, clip = dataset_samples(Registry(data), 'car_item_test')[:6], str(next((data/'car_video').rglob('*.mp4')))
    pictures = [row['images'][0] for row in rows]
    turns = [{'role': role, 'content': text} for role, text in (('user', '<image>What is this?'), ('assistant', 'A car.'), ('user', '<video>Where to?'))]
    return [{'images': pictures[:1], 'instruction': '<image>What is this?'}, {'images': pictures[:3], 'instruction': '<image><image><image>Alike?', 'system': 'Be brief.'},
            {'images': [], 'instruction': 'What is this?'}, {'videos': [clip], 'instruction': '<video>Where to?'}, {'images': ['/nowhere.png'], 'instruction': '<image>?'},
            {'images': ['/dev/zero'], 'instruction': '<image>?'}, {'images': pictures[:1], 'videos': [clip], 'messages': turns},
            {'images': [], 'instruction': '<image>A tag without a picture'}]

def _lines(p): return [json.dumps(row, sort_keys=True) for row in p]

def _child(served): return psutil.Process(state_or_empty(served, 'server.json')['pid'])

def _gone(*processes): return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)

def _post(served, body, headers=None, path='/v1/chat/completions'):
    "What a raw client is told: status and text."
    place = state_or_empty(served, 'server.json')
    connection = http.client.HTTPConnection('127.0.0.1', place['port'], timeout=PATIENCE)
    key = {'Authorization': f"Bearer {place['key']}"}
    connection.request('POST', path, body, key if headers is None else headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()

def _question(text='What is this?', **more): return json.dumps({'messages': [{'role': 'user', 'content': text}]} | more).encode()

@pytest.fixture(scope='module')
def once(ask, tmp_path_factory):
    "The test set, answered by `hf`."
    return predict(ask(tmp_path_factory.mktemp('once')/'out'))

def test_answers_are_those_of_hf(ask, served, once, mixed, tmp_path):
    "Row by row, also with clips and sampled, and with rows that fail; and the folders have the same files."
    sampled = dict(do_sample=True, temperature=.9, seed=7)
    theirs = predict(ask(tmp_path/'theirs', **sampled), mixed)
    for name, samples, changes, expected in (('test set', None, {}, once), ('mixed', mixed, sampled, theirs)):
        ours = predict(ask(tmp_path/name, **changes), samples, engine=served)
        assert _lines(ours) == _lines(expected) and len(ours) == len(samples or range(100))
        files = [sorted(p.name for p in found.output_dir.iterdir()) for found in (ours, expected)]
        assert files[0] == files[1]
    assert [row['row'] for row in Predictions(tmp_path/'mixed').failed] == [4, 5, 7]

def test_a_prediction_that_hf_has_begun_goes_on(ask, served, once, tmp_path):
    shutil.copytree(once.output_dir, tmp_path/'begun')
    path = tmp_path/'begun'/'predictions.jsonl'
    path.write_text(''.join(path.read_text().splitlines(keepends=True)[::3]))
    assert _lines(predict(ask(tmp_path/'begun'), engine=served)) == _lines(once)

def test_asked_by_hand(served, picture, data, capsys):
    first = served.ask(picture, 'What is this?')
    assert capsys.readouterr().out == f'{first}\n' and first.startswith('The ') and first.finish_reason == 'stop'
    im = Image.open(picture)
    assert served.ask(im, 'What is this?') == served.ask(np.asarray(im.convert('RGB')), 'What is this?') == served.ask([Path(picture)], '<image>What is this?') == first
    clip = next((data/'car_video').rglob('*.mp4'))
    assert all(served.ask(media, 'What?').tokens for media in ([picture, picture], clip, [clip, picture], None))
    assert served.ask(picture, 'What is this?', max_new_tokens=1).finish_reason == 'length'
    wild = dict(do_sample=True, temperature=5., top_p=1., top_k=0, max_new_tokens=60, seed=3)
    at_once = json.loads(_post(served, _question('What is this?', **wild))[1])['choices'][0]['message']['content']
    assert served.ask(None, 'What is this?', **wild) == at_once
    broken = io.BytesIO(b'no picture at all')
    for media, why in (('/nowhere.png', 'There is no file'), ('/dev/zero', 'not a regular file'), (str(data), 'not a regular file'), (broken, 'array of uint8')):
        with pytest.raises((OSError, ValueError), match=why): served.ask(media, 'What is this?')

@pytest.mark.parametrize('settings,words', [({'max_new_tokens': '16'}, "max_new_tokens is '16': give numbers"), ({'temperature': None, 'seed': 1}, 'temperature is None'), ({'temp': 1}, 'no setting temp')])
def test_settings_of_the_wrong_kind_are_said_before_anything_is_asked(settings, words, tmp_path):
    with pytest.raises(TypeError, match=words): Served(tmp_path).ask(None, 'What?', **settings)

def test_other_programs_can_ask(ask, served, picture, tmp_path, monkeypatch):
    "An OpenAI client finds what it expects, and so does our own engine for such servers."
    headers = {'Authorization': f'Bearer {served.key}'}
    assert httpx.get(f'{served.base_url}/models', headers=headers).json()['data'][0]['id'] == 'tiny_qwen2vl'
    monkeypatch.setenv('OPENAI_API_KEY', served.key)
    samples = [{'images': [picture], 'instruction': f'<image>{text}'} for text in ASK]
    ours, theirs = predict(ask(tmp_path/'ours'), samples, engine=served), predict(ask(tmp_path/'theirs'), samples, engine='openai', base_url=served.base_url)
    same = 'predict', 'finish_reason', 'prompt_tokens', 'tokens'
    assert [[row[k] for k in same] for row in ours] == [[row[k] for k in same] for row in theirs]

def test_what_is_served_must_be_what_is_asked(ask, served, tiny, tmp_path):
    "Said before anything starts, all at once."
    model = shutil.copytree(tiny, tmp_path/'model')
    for changes, said in (({'template': 'qwen3_vl', 'image_max_pixels': 5000}, ["template: 'qwen3_vl'", 'image_max_pixels: 5000']), ({'infer_dtype': 'float32'}, ['infer_dtype']),
                          ({'model_name_or_path': str(model)}, ['model_name_or_path'])):
        with pytest.raises(ValueError, match='not the one that the recipe asks for') as e: predict(ask(tmp_path/'out', **changes), engine=served)
        assert all(text in str(e.value) for text in said)
    assert not (tmp_path/'out').exists()
    assert len(predict(ask(tmp_path/'shorter', max_new_tokens=2, cutoff_len=999, max_samples=3), engine=served)) == 3

def test_settings_that_stay_are_named(served, tiny):
    "A second call finds the model as it was loaded, and says what it does not change; what is misspelt is refused first."
    with pytest.warns(UserWarning, match='max_new_tokens: 24 stays, not 500\\n- idle: 1800 stays, not 5'):
        assert serve(tiny, served.output_dir, idle=5, use_cpu=True, max_new_tokens=500).key == served.key
    with warnings.catch_warnings(action='error'): serve(tiny, served.output_dir, use_cpu=True, max_new_tokens=24)
    for idle in ('x', -1, float('nan'), None, True):
        with pytest.raises(ValueError, match='give a number of seconds'): serve(tiny, served.output_dir, idle=idle)
    with pytest.raises(ValueError, match="did you mean 'max_new_tokens'"): serve(tiny, served.output_dir, max_new_token=8)

def test_listens_only_here_and_tells_nobody_its_key(served, ask, picture, tmp_path):
    place, key = state_or_empty(served, 'server.json'), served.key
    assert (served.output_dir/'server.json').stat().st_mode & 0o777 == 0o600
    listening = [c.laddr for p in marked(state_or_empty(served, 'run.json')['id']) for c in p.net_connections(kind='inet') if c.status == psutil.CONN_LISTEN]
    assert {(a.ip, a.port) for a in listening} == {('127.0.0.1', place['port'])}
    predict(ask(tmp_path/'out', max_samples=2), engine=served)
    _post(served, _question(), {'Authorization': 'Bearer wrong'})
    written = [p for folder in (served.output_dir, tmp_path/'out') for p in folder.rglob('*') if p.is_file() and p.name != 'server.json']
    assert len(written) > 8 and not any(key.encode() in p.read_bytes() for p in written)
    processes = [p.info for p in psutil.process_iter(['cmdline', 'environ'])]
    assert not any(key in ' '.join([*(p['cmdline'] or []), *(p['environ'] or {}).values()]) for p in processes) and key not in repr(served)

HOSTILE = {  # body, headers besides the key, status, what is said
    'no key': (_question(), None, 401, 'key is missing or wrong'),
    'a wrong key': (_question(), {'Authorization': 'Bearer x'}, 401, 'key is missing or wrong'),
    'a key that is no ASCII': (_question(), {'Authorization': 'Bearer ä'}, 401, 'key is missing or wrong'),
    'no JSON': (b'{"messages": [', {}, 400, 'not JSON'),
    'nested deeply': (b'['*10**6, {}, 400, 'nested too deeply'),
    'a list': (b'[]', {}, 400, 'JSON dict'),
    'nothing': (b'', {}, 400, 'not JSON'),
    'no length': (None, {'Transfer-Encoding': 'chunked'}, 411, 'Content-Length'),
    'no number': (b'', {'Content-Length': '-7'}, 411, 'Content-Length'),
    'a huge body': (b'', {'Content-Length': str(MOST_BYTES + 1)}, 413, 'bytes are accepted'),
    'a device': (_question([{'type': 'image_url', 'image_url': {'url': 'file:///dev/zero'}}]), {}, 400, 'not a regular file'),
    'a clip that is a device': (_question([{'type': 'video_url', 'video_url': {'url': 'file:///dev/zero'}}]), {}, 400, 'not a regular file'),
    'an address': (_question([{'type': 'image_url', 'image_url': {'url': 'http://127.0.0.1:9/a.png'}}]), {}, 400, 'file: or data:'),
    'a picture that is none': (_question([{'type': 'image_url', 'image_url': {'url': 'data:image/png;base64,YWJj'}}]), {}, 400, 'cannot identify image'),
    'a picture too many': (_question('<image>Look'), {}, 400, 'ValueError'),
    'settings of another kind': (_question(max_tokens='many'), {}, 400, 'Error'),
    'a mark of the model': (_question('<|image_pad|>'), {}, 400, 'Error'),
}

@pytest.mark.parametrize('kind', HOSTILE)
def test_hostile_requests_are_refused(served, kind):
    body, headers, status, said = HOSTILE[kind]
    key = {'Authorization': f'Bearer {served.key}'}
    found = _post(served, body, {k: v.encode() for k, v in ({} if headers is None else key | headers).items()})
    assert found[0] == status and said in found[1], found
    assert served.ask(None, 'What is this?', max_new_tokens=1) is not None

def test_slow_and_silent_clients_keep_nobody_waiting(served):
    port, held = state_or_empty(served, 'server.json')['port'], []
    for sent in (b'', b'POST /v1/chat/completions HTTP/1.1\r\nX', b'POST /rows HTTP/1.1\r\nAuthorization: Bearer ' + served.key.encode() + b'\r\nContent-Length: 99\r\n\r\n{"fo'):
        for _ in range(10):
            held.append(socket.create_connection(('127.0.0.1', port)))
            held[-1].sendall(sent)
    assert served.ask(None, 'What is this?')
    for s in held: s.close()

@pytest.fixture
def endless(tiny, tmp_path):
    "A model that never ends its answers: the logits of its end tokens are 0."
    model = shutil.copytree(tiny, tmp_path/'endless')
    weights = load_file(model/'model.safetensors')
    table, = (name for name in weights if name.endswith('embed_tokens.weight'))
    weights[table][json.loads((model/'generation_config.json').read_text())['eos_token_id']] = 0
    save_file(weights, model/'model.safetensors', {'format': 'pt'})
    found = serve(model, tmp_path/'out', use_cpu=True)
    yield found
    found.stop()

def _stream(served):
    "A connection on which an answer without end is being streamed; its first piece has arrived."
    place = state_or_empty(served, 'server.json')
    connection = http.client.HTTPConnection('127.0.0.1', place['port'], timeout=PATIENCE)
    connection.request('POST', '/v1/chat/completions', _question(stream=True, max_tokens=10**6), {'Authorization': f"Bearer {place['key']}"})
    answer = connection.getresponse()
    assert answer.readline().startswith(b'data: ')
    return connection, answer

def test_an_answer_that_nobody_waits_for_ends_and_so_does_a_process_without_a_folder(endless, picture):
    "The second of two clients is answered when the first has left."
    connection, answer = _stream(endless)
    answers = []
    second = threading.Thread(target=lambda: answers.append(endless.ask(picture, 'What is this?', max_new_tokens=3)))
    second.start()
    second.join(1)
    assert not answers, 'the first is being answered'
    answer.close()
    connection.close()
    second.join(PATIENCE)
    assert answers[0].finish_reason == 'length'
    processes = [_child(endless), *_child(endless).children(recursive=True), psutil.Process(state_or_empty(endless, 'waiter.json')['pid'])]
    held = _stream(endless)
    shutil.rmtree(endless.output_dir)
    until(lambda: _gone(*processes))
    assert not endless.output_dir.exists() and held

def test_two_at_once(ask, served, picture, tmp_path):
    "Two predictions and a question at the same time, each with its own answers."
    alone = predict(ask(tmp_path/'alone'), engine=served)
    both = [threading.Thread(target=predict, args=(ask(tmp_path/str(i)),), kwargs={'engine': served}) for i in range(2)]
    for thread in both: thread.start()
    assert served.ask(picture, 'What is this?').startswith('The ')
    for thread in both: thread.join(PATIENCE)
    assert all(_lines(Predictions(tmp_path/str(i))) == _lines(alone) for i in range(2))

def test_found_again_from_another_kernel(served, picture):
    code = f'from qwen2vl_nb.all import *\nimport sys\nserved = attach({str(served.output_dir)!r})\nserved.ask({picture!r}, "What is this?")\nprint(type(served).__name__, "torch" in sys.modules)'
    kernel = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, start_new_session=True)
    assert kernel.stdout.splitlines()[1:] == ['Served False'] and kernel.stdout.startswith('The '), kernel
    assert served.is_running and serve(served.recipe['model_name_or_path'], served.output_dir, use_cpu=True, max_new_tokens=9).key == served.key
    with pytest.raises(ValueError, match='use_cpu'): serve(served.recipe['model_name_or_path'], served.output_dir)

def test_two_calls_at_once_find_the_same_process(tiny, tmp_path):
    "Both see at first that nothing is served; the one that comes second waits for what the first has started."
    with ThreadPoolExecutor(2) as pool: one, other = [call.result() for call in [pool.submit(serve, tiny, tmp_path/'out', use_cpu=True) for _ in range(2)]]
    assert one.key == other.key and not (tmp_path/'out'/'earlier').exists()
    one.stop()

def test_killed_in_the_middle_of_a_prediction(ask, served, other, data, tmp_path):
    "The reason is told, no row is lost, and calling again continues, with another process."
    rows = dataset_samples(Registry(data), 'car_item_test')
    many = [row | {'instruction': f'<image>{text}', 'output': ''} for text in ASK for row in rows]
    recipe, errors = ask(tmp_path/'out'), []
    def call():
        try: predict(recipe, many, engine=other)
        except RuntimeError as error: errors.append(str(error))
    caller = threading.Thread(target=call)
    caller.start()
    until(lambda: (tmp_path/'out'/'predictions.jsonl').exists())
    child = _child(other)
    child.kill()
    caller.join(PATIENCE)
    assert 'ended meanwhile' in errors[0] and re.search(r'\d+ of 600 rows are done and kept', errors[0])
    kept = (tmp_path/'out'/'predictions.jsonl').read_text()
    with pytest.raises(RuntimeError, match='has ended'): predict(recipe, many, engine=other)
    until(lambda: not other.is_running)
    assert other.status == 'failed' and 'SIGKILL' in str(other.failure)
    assert 0 < len(kept.splitlines()) < 600
    p = predict(recipe, many, engine=served)
    assert [row['row'] for row in p] == list(range(600)) and not p.failed and len(p.path.read_text().splitlines()) == 600
    assert {*kept.splitlines()} <= {*p.path.read_text().splitlines()}

def test_a_prediction_that_is_stopped_leaves_the_model_at_rest(ask, served, data, tmp_path):
    rows = dataset_samples(Registry(data), 'car_item_test')
    many = [row | {'instruction': '<image>Make a list.', 'output': ''} for row in rows*9]
    caller = threading.Thread(target=lambda: pytest.raises(RuntimeError, predict, ask(tmp_path/'out'), many, engine=served))
    caller.start()
    until(lambda: (tmp_path/'out'/'predictions.jsonl').exists())
    attach(tmp_path/'out').stop()
    caller.join(PATIENCE)
    n = len((tmp_path/'out'/'predictions.jsonl').read_text().splitlines())
    assert n < 900 and served.ask(None, 'What is this?')
    assert len((tmp_path/'out'/'predictions.jsonl').read_text().splitlines()) == n, 'nothing is written for a prediction that was stopped'

def test_it_ends_when_nobody_asks(tiny, few_steps, tmp_path):
    "And a run is served as it was trained."
    from qwen2vl_nb.run.start import launch
    run = launch(few_steps(image_max_pixels=5000)).wait()
    found = serve(run, use_cpu=True, idle=1)
    assert found.output_dir == Path(f'{run.output_dir}-served')
    recipe = load_recipe(found.output_dir/'recipe.yaml')
    assert (recipe['adapter_name_or_path'], recipe['image_max_pixels'], recipe['template']) == (str(run.output_dir), 5000, 'qwen2_vl')
    until(lambda: not found.is_running)
    assert found.status == 'done'
    with pytest.raises(RuntimeError, match='nobody had asked anything for a while'): found.ask(None, 'Who?')

def test_stopped(served):
    processes = [_child(served), *_child(served).children(recursive=True)]
    served.stop()
    assert served.status == 'stopped' and _gone(*processes)
    with pytest.raises(ServerGone):
        with request(served, '/v1/chat/completions', {}): pass

def test_a_model_that_can_not_be_loaded(tiny, tmp_path):
    with pytest.raises(ValueError, match='There is no folder'): serve(tmp_path/'nothing', tmp_path/'out')
    assert not (tmp_path/'out').exists()
    broken = shutil.copytree(tiny, tmp_path/'broken')
    config = json.loads((broken/'config.json').read_text())
    config['text_config']['intermediate_size'] *= 2
    (broken/'config.json').write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match='mismatch'): serve(broken, tmp_path/'out', use_cpu=True)
    assert attach(tmp_path/'out').status == 'failed'

def test_a_disk_without_room_for_a_reason_is_the_reason(tiny, tmp_path):
    "The start is written down, and then nothing more; calling again as before works when there is room."
    with small_disk(tmp_path/'disk', '32k') as enlarge:
        with pytest.raises(RuntimeError, match=r'has ended: The disk is full\. Why the run ended could not be written down\. serve'): serve(tiny, tmp_path/'disk'/'out', use_cpu=True)
        enlarge('16m')
        serve(tiny, tmp_path/'disk'/'out', use_cpu=True).stop()
