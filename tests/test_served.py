"Servers that misbehave, for real: whatever they do, every row ends with its answer or with an error that says what was."
import base64, gzip, hashlib, io, json, math, os, re, signal, subprocess, sys, sysconfig, threading, time, warnings, zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import httpx
import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from conftest import PATIENCE, free_ports, until
from qwen2vl_nb.prediction.rows import Answers
from qwen2vl_nb.boot import script
from qwen2vl_nb.files import whole_lines
from qwen2vl_nb.prediction.engines import predict
from qwen2vl_nb.prediction.predictions import Predictions
from qwen2vl_nb.prediction.question import asked_row
from qwen2vl_nb.recipe import predict_recipe
from qwen2vl_nb.prediction.scores import score
from qwen2vl_nb.prediction.show import show_predictions

GREEDY = {'template': 'qwen2_vl', 'do_sample': False, 'max_new_tokens': 8}

def _row(i, text, *images, system=''):
    return asked_row(i, {'instruction': '<image>'*len(images) + text, 'images': [str(p) for p in images], 'system': system})

def _begin(folder, rows, base_url, recipe=GREEDY, env={}, **options):
    "The coordinator at work on rows in a folder."
    folder.mkdir(exist_ok=True)
    if not (folder/'asked.jsonl').exists(): Answers(folder/'asked.jsonl').add(rows)
    (folder/'recipe.yaml').write_text(yaml.safe_dump(recipe))
    workers = [{'command': [sys.executable, *script('prediction.openai')], 'env': {}}]
    (folder/'run.json').write_text(json.dumps({'workers': workers, 'options': {'base_url': base_url} | options}))
    return subprocess.Popen([sys.executable, *script('prediction.coordinator')], cwd=folder, env=os.environ | env)

def _run(*args, **kwargs): return _begin(*args, **kwargs).wait(timeout=PATIENCE)

def _lines(folder): return [json.loads(line) for _, line in whole_lines(folder/'predictions.jsonl')]

def _failure(folder): return json.loads((folder/'failure-0.json').read_text())['message']

def _rows(folder, n):
    "The rows of a folder, each of which must be there once and in order."
    rows = _lines(folder)
    assert [row['row'] for row in rows] == list(range(n))
    return rows

_until = until

def _echo(asked):
    "What a server saw, as its answer."
    system, *_, user = asked['messages']
    parts = user['content'] if isinstance(user['content'], list) else [{'type': 'text', 'text': user['content']}]
    seen = [part.get('text') or hashlib.sha256(_bytes(part['image_url']['url'])).hexdigest() for part in parts]
    return json.dumps({'model': asked['model'], 'system': system['content'], 'user': seen})

def _bytes(uri): return base64.b64decode(uri.partition(';base64,')[2])

def _completion(text, reason='stop'):
    return {'choices': [{'message': {'role': 'assistant', 'content': text}, 'finish_reason': reason}],
            'usage': {'prompt_tokens': 11, 'completion_tokens': 3}}

class Loopback(ThreadingHTTPServer):
    "A server that does what `behave(handler, asked, n)` does at the n-th time that a row is asked; otherwise an echo."
    daemon_threads, request_queue_size = True, 64
    def __init__(self, behave=lambda *_: False, port=0, most_rows=math.inf):
        self.behave, self.asked, self.times, self.at_once, self.most = behave, [], Counter(), 0, 0
        self.lock, self.most_rows, self.goes_on = threading.Lock(), most_rows, threading.Event() # Beyond so many rows none is answered until it goes on
        super().__init__(('127.0.0.1', port), _Handler)
        self.url = f'http://127.0.0.1:{self.server_port}/v1'
        threading.Thread(target=self.serve_forever, kwargs={'poll_interval': .05}, daemon=True).start()

    def handle_error(self, *_): pass  # who was asked to go away has gone

class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass

    def reply(self, status, value, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({'Content_Type': 'application/json', 'Content_Length': str(len(body))} | headers).items():
            self.send_header(name.replace('_', '-'), text)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self): self.reply(200, {'object': 'list', 'data': [{'id': 'tiny'}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        text = json.dumps(asked['messages'])
        with self.server.lock:
            self.server.asked.append(asked)
            self.server.times[text] += 1
            self.server.at_once += 1
            self.server.most = max(self.server.most, self.server.at_once)
            waits = len(self.server.asked) > self.server.most_rows
        try:
            if waits: self.server.goes_on.wait()
            if not self.server.behave(self, asked, self.server.times[text]):
                self.reply(200, _completion(_echo(asked)))
        finally:
            with self.server.lock: self.server.at_once -= 1

@pytest.fixture
def loopback():
    servers = []
    def start(*args, **kwargs):
        servers.append(Loopback(*args, **kwargs))
        return servers[-1]
    yield start
    for server in servers:
        server.goes_on.set()
        server.shutdown()
        server.server_close()

@pytest.fixture
def pictures(tmp_path):
    "Pictures in a folder with a space and Chinese characters."
    folder = tmp_path/'my shop 店'
    folder.mkdir()
    rng = np.random.default_rng(0)
    def make(name, width, height, mode='RGB', **kwargs):
        im = Image.fromarray(rng.integers(0, 255, (height, width, 3), 'uint8')).convert(mode)
        im.save(folder/name, **kwargs)
        return str(folder/name)
    return make

def _torn(handler):
    handler.send_response(200)
    handler.send_header('Content-Length', '1000')
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True

def _silent(handler):
    "No answer for as long as somebody waits for one."
    handler.connection.recv(1)
    handler.close_connection = True

def _is_answered(handler):
    "Whether some row has its answer."
    return any(row['predict'] is not None for row in _lines(handler.server.folder))

def _gone(handler):
    "A refusal that comes after an answer has."
    _until(lambda: _is_answered(handler))
    handler.reply(404, {'detail': 'No such file.'})

# What a server may do, and what the row's error then says
FAILS = {
    '500': (lambda h: h.reply(500, {'error': {'message': 'CUDA error'}}), '500 Internal Server Error: CUDA error'),
    '503': (lambda h: h.reply(503, b'<html>down</html>'), '503 Service Unavailable: <html>down</html>'),
    'closes in the middle': (_torn, 'RemoteProtocolError'),
    'rubbish': (lambda h: h.reply(200, b'\xff\x00 rubbish'), 'not a chat completion'),
    'a page': (lambda h: h.reply(200, b'<html>Welcome</html>', Content_Type='text/html'), 'Welcome'),
    'no choices': (lambda h: h.reply(200, {'choices': []}), 'not a chat completion'),
    'an error as an answer': (lambda h: h.reply(200, {'error': 'overloaded'}), 'overloaded'),
}
REFUSES = {
    'too large': (lambda h: h.reply(413, {'detail': 'A large one.'}), '413 .*: A large one. Lower image_max_pixels'),
    'too long': (lambda h: h.reply(400, {'message': 'At most 512.'}), '400 Bad Request: At most 512.'),
    'unclear': (lambda h: h.reply(422, {'detail': [{'msg': 'x'*1000}]}), '422 Unprocessable'),
    'no text': (lambda h: h.reply(200, _completion(None, 'tool_calls')), "no text .*'tool_calls'"),
    'not found': (_gone, '404 Not Found: No such file.'),
}

def _said(asked):
    "The text of a row."
    content = asked['messages'][-1]['content']
    return content if isinstance(content, str) else content[-1]['text']

def test_whatever_a_server_does_every_row_has_its_answer_or_its_error(loopback, tmp_path, pictures):
    "Each failure once and always, each refusal, a server that is busy for two seconds, and good answers between."
    busy_since = {}
    def behave(handler, asked, n):
        often, how = _said(asked).split(': ')[1:]
        if how == 'is busy' and time.monotonic() - busy_since.setdefault(_said(asked), time.monotonic()) < 2:
            return handler.reply(429, b'', Retry_After='2') or True
        if how == 'has its own type':
            return handler.reply(200, _completion(_echo(asked)), Content_Type='text/plain') or True
        if how not in FAILS | REFUSES or often == 'once' and n > 1: return False
        (FAILS | REFUSES)[how][0](handler)
        return True
    server, picture = loopback(behave), pictures('a.png', 112, 84)
    server.folder = tmp_path/'run'
    kinds = [('once', how) for how in FAILS] + [('always', how) for how in FAILS | REFUSES]
    kinds = [('', 'good'), *kinds, ('', 'is busy'), ('', 'has its own type')]*4
    def row(i, often, how): return _row(i, f'{i}: {often}: {how}', *[picture]*(i % 2), system='简短。' if i % 3 else '')
    rows = [row(i, *kind) for i, kind in enumerate(kinds)]
    assert _run(tmp_path/'run', rows, server.url, concurrency=32, tries=2) == 0
    for row, asked, (often, how) in zip(_rows(tmp_path/'run', len(rows)), rows, kinds):
        fails = often == 'always'
        assert ('error' in row) == fails, row
        assert all(row[key] == asked[key] for key in ('id', 'images', 'prompt', 'label'))
        assert 'asked' not in row and row['engine'] == 'openai'
        if fails:
            assert re.search((FAILS | REFUSES)[how][1], row['error']) and len(row['error']) < 500, row['error']
            assert row['error'].endswith('(asked 2 times)') == (how in FAILS)
            assert row['predict'] is row['finish_reason'] is None
        else:
            assert (row['finish_reason'], row['prompt_tokens'], row['tokens']) == ('stop', 11, 3)
            digest = [hashlib.sha256(Path(picture).read_bytes()).hexdigest()]*len(row['images'])
            system = asked['asked']['system'] or 'You are a helpful assistant.'
            user = digest + [row['prompt'].removeprefix('<image>')]
            assert json.loads(row['predict']) == {'model': 'tiny', 'system': system, 'user': user}

def test_a_server_that_says_nothing_is_not_waited_for(loopback, tmp_path):
    "Every other row is answered when it is asked again."
    server = loopback(lambda handler, asked, n: (n == 1 or int(_said(asked)) % 2) and (_silent(handler) or True))
    assert _run(tmp_path/'run', [_row(i, f'{i}') for i in range(8)], server.url, timeout=4, tries=3) == 0
    for row in _rows(tmp_path/'run', 8):
        if row['row'] % 2: assert row['predict'] is None and re.search(r'No answer within 4 s.*\(asked 3 times\)$', row['error']), row
        else: assert 'error' not in row and row['predict']

def test_a_server_that_fails_all_the_time_takes_no_row_from_one_that_does_not(loopback, tmp_path):
    good, bad = loopback(), loopback(lambda handler, *_: handler.reply(500, {'error': 'broken'}) or True)
    assert _run(tmp_path/'run', [_row(i, f'{i}') for i in range(60)], [bad.url, good.url], concurrency=2) == 0
    assert not [row for row in _rows(tmp_path/'run', 60) if 'error' in row] and bad.asked

def test_a_row_goes_to_another_server_than_the_one_that_failed_to_answer_it(loopback, tmp_path):
    "The server that fails is the faster one, and a row that it gets twice is lost."
    good = loopback(lambda *_: time.sleep(.3))
    def fails(handler, *_):
        _until(lambda: len(good.asked) > 2)  # of two at once, one is answered
        return handler.reply(500, {'error': 'broken'}) or True
    bad = loopback(fails)
    assert _run(tmp_path/'run', [_row(i, f'{i}') for i in range(30)], [bad.url, good.url], concurrency=2, tries=2) == 0
    assert not [row for row in _rows(tmp_path/'run', 30) if 'error' in row] and len(bad.asked) > 2

def test_servers_that_answer_no_row_at_all_end_the_run(loopback, tmp_path):
    bad = loopback(lambda handler, *_: handler.reply(500, {'error': 'broken'}) or True)
    assert _run(tmp_path/'run', [_row(i, f'{i}') for i in range(200)], bad.url, concurrency=64, tries=1) == 1
    assert re.search('5[0-9] rows were given up and none was answered.*500 Internal Server Error: broken', _failure(tmp_path/'run'))
    assert 50 <= len(_lines(tmp_path/'run')) < 200

def test_servers_share_the_rows_and_none_gets_more_at_once_than_it_may(loopback, tmp_path):
    def together(handler, *_): _until(lambda: handler.server.most >= 3)
    servers, rows = [loopback(together), loopback(together)], [_row(i, f'{i}') for i in range(80)]
    assert _run(tmp_path/'run', rows, [s.url for s in servers], concurrency=3, model='mine') == 0
    _rows(tmp_path/'run', 80)
    assert sum(len(s.asked) for s in servers) == 80 and all(s.asked and s.most == 3 for s in servers)
    assert {asked['model'] for s in servers for asked in s.asked} == {'mine'}

@pytest.fixture
def server_process():
    "Starts a server as a process of its own, which can be killed; beyond so many rows it answers none."
    started = []
    def start(port, most_rows=math.inf):
        started.append(subprocess.Popen([sys.executable, __file__, str(port), str(most_rows)], stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == 'ready\n'
        return started[-1]
    yield start
    for process in started:
        process.kill()
        process.wait()

def test_a_server_that_is_killed_and_comes_back_costs_no_row(server_process, tmp_path):
    port, = free_ports(1)
    server = server_process(port, 40)
    run = _begin(tmp_path/'run', [_row(i, f'{i}') for i in range(120)], f'http://127.0.0.1:{port}/v1', concurrency=4)
    _until(lambda: len(_lines(tmp_path/'run')) > 20)
    server.kill()
    server.wait()
    assert len(_lines(tmp_path/'run')) <= 40
    server_process(port)
    assert run.wait(timeout=PATIENCE) == 0
    assert not [row for row in _rows(tmp_path/'run', 120) if 'error' in row]

def test_a_server_that_dies_for_good_leaves_its_rows_to_the_other(server_process, loopback, tmp_path):
    (port,), other = free_ports(1), loopback(most_rows=20)
    dying, rows = server_process(port, 20), [_row(i, f'{i}') for i in range(120)]
    run = _begin(tmp_path/'run', rows, [f'http://127.0.0.1:{port}/v1', other.url], concurrency=2)
    _until(lambda: len(_lines(tmp_path/'run')) > 20)
    dying.kill()
    other.goes_on.set()
    assert run.wait(timeout=PATIENCE) == 0
    assert not [row for row in _rows(tmp_path/'run', 120) if 'error' in row] and 100 <= len(other.asked) < 120

def test_a_worker_that_is_killed_goes_on_where_it_was(loopback, tmp_path):
    server = loopback(most_rows=40)
    run = _begin(tmp_path/'run', [_row(i, f'{i}') for i in range(100)], server.url, concurrency=4)
    _until(lambda: len(_lines(tmp_path/'run')) > 20)
    worker, = psutil.Process(run.pid).children()
    worker.kill()
    assert run.wait(timeout=PATIENCE) == -9
    server.goes_on.set()
    done = {row['prompt'] for row in _lines(tmp_path/'run')}
    assert 20 < len(done) <= 40
    assert _run(tmp_path/'run', None, server.url) == 0
    assert not [row for row in _rows(tmp_path/'run', 100) if 'error' in row]
    times = Counter(_said(asked) for asked in server.asked)
    assert all(times[prompt] == 1 for prompt in done)

def test_a_worker_that_is_told_to_stop_writes_what_has_come_in(loopback, tmp_path):
    "Twenty rows are answered in less time than the worker lets pass between two writings; the others hang."
    def behave(handler, asked, n):
        if int(_said(asked)) >= 20: _silent(handler)
    server = loopback(behave)
    run = _begin(tmp_path/'run', [_row(i, f'{i}') for i in range(40)], server.url, concurrency=40)
    _until(lambda: len(server.asked) == 40 and server.at_once == 20)
    (tmp_path/'run'/'stop').write_text('0')
    assert run.wait(timeout=PATIENCE) == signal.SIGTERM
    assert [row['row'] for row in _lines(tmp_path/'run')] == list(range(20))
    assert not (tmp_path/'run'/'failure-0.json').exists()

# Name, size, mode, and how it is saved
PICTURES = [('large.jpg', 1600, 1200, 'RGB', {}), ('large.png', 1001, 999, 'P', {}), ('clear.png', 1000, 900, 'RGBA', {}),
    ('small clear.png', 90, 60, 'RGBA', {}), ('palette.png', 90, 60, 'P', {}), ('holes.png', 90, 60, 'P', {'transparency': 3}),
    ('grey.jpg', 90, 60, 'L', {}), ('print.jpg', 90, 60, 'CMYK', {}), ('bits.png', 1200, 900, '1', {}),
    ('a.webp', 90, 60, 'RGB', {}), ('a.tiff', 90, 60, 'RGB', {}), ('a.gif', 900, 800, 'P', {}), ('a.bmp', 90, 60, 'RGB', {}),
    ('turned.jpg', 90, 60, 'RGB', {'exif': 6}), ('turned.png', 90, 60, 'RGB', {'exif': 3}), ('dot.png', 5, 5, 'RGB', {}),
    ('low.png', 300, 20, 'P', {}), ('long.png', 9000, 30, 'RGB', {}), ('high.png', 30, 9000, 'RGB', {}),
    ('plain.png', 112, 84, 'RGB', {}), ('车.jpg', 112, 84, 'RGB', {})]

def _orientation(number):
    tags = Image.Exif()
    tags[0x0112] = number
    return {'exif': tags}

@pytest.mark.parametrize('most', [768*768, 5000])
def test_pictures_arrive_with_the_pixels_that_llamafactory_makes_of_them(loopback, tmp_path, pictures, plugin, most):
    paths = [pictures(*about, **(_orientation(how['exif']) if 'exif' in how else how)) for *about, how in PICTURES]
    server, recipe = loopback(), GREEDY | ({'image_max_pixels': most} if most != 768*768 else {})
    assert _run(tmp_path/'run', [_row(i, f'{i}', path) for i, path in enumerate(paths)], server.url, recipe) == 0
    assert not [row for row in _rows(tmp_path/'run', len(paths)) if 'error' in row]
    arrived = {int(_said(asked)): asked['messages'][-1]['content'][0]['image_url']['url'] for asked in server.asked}
    as_it_is = {'plain.png', '车.jpg'} if most == 768*768 else set()
    for i, path in enumerate(paths):
        uri, name = arrived[i], Path(path).name
        assert re.match(r'data:image/(png|jpeg);base64,', uri)
        im = Image.open(io.BytesIO(_bytes(uri)))
        wanted = plugin._preprocess_image(Image.open(path), image_max_pixels=most, image_min_pixels=32*32)
        assert im.mode == 'RGB' and im.getexif().get(0x0112, 1) == 1, name
        assert np.array_equal(np.asarray(im), np.asarray(wanted)), name
        # LLaMA-Factory's own server does all this once more
        again = plugin._preprocess_image(im, image_max_pixels=768*768, image_min_pixels=32*32)
        assert np.array_equal(np.asarray(again), np.asarray(wanted)), name
        assert (_bytes(uri) == Path(path).read_bytes()) == (name in as_it_is), name

def test_a_picture_that_is_not_sound_is_the_error_of_its_row(loopback, tmp_path, pictures):
    paths = [pictures(f'{i}.png', 112, 84) for i in range(5)]
    Path(paths[1]).write_bytes(Path(paths[1]).read_bytes()[:200])
    Path(paths[2]).unlink()
    Path(paths[3]).write_text('<!doctype html>')
    assert _run(tmp_path/'run', [_row(i, f'{i}', path) for i, path in enumerate(paths)], loopback().url) == 0
    rows = _rows(tmp_path/'run', 5)
    assert [row['row'] for row in rows if 'error' in row] == [1, 2, 3]
    assert all(paths[i] in rows[i]['error'] and rows[i]['predict'] is None for i in (1, 2, 3))

def test_files_that_the_server_can_read_are_named_and_clips_are_sent(loopback, tmp_path, pictures, data):
    clip = next((data/'car_video'/'videos').glob('*.mp4'))
    def film(i, video): return asked_row(i, {'instruction': '<video>What drives here?', 'videos': [video]})
    rows = [_row(0, '', pictures('a.png', 112, 84)), _row(1, '', pictures('b.jpg', 2000, 1000)), film(2, str(clip)),
            film(3, str(clip.with_suffix('.webm')))]
    server = loopback(lambda handler, *_: handler.reply(200, _completion('a car')) or True)
    assert _run(tmp_path/'run', rows, server.url, media='file', concurrency=1) == 0
    parts = [asked['messages'][-1]['content'][0] for asked in server.asked]
    scaled, *files = sorted(part[part['type']]['url'] for part in parts)
    assert scaled.startswith('data:image/png')
    assert sorted(map(unquote, files)) == sorted(f'file://{path}' for path in (rows[0]['images'][0], clip))
    found = _rows(tmp_path/'run', 4)
    assert [row['row'] for row in found if 'error' in row] == [3] and 'mp4' in found[3]['error']

def test_where_there_is_no_server_the_run_fails_and_says_so(tmp_path):
    urls = [f'http://127.0.0.1:{port}/v1' for port in free_ports(2)]
    assert _run(tmp_path/'run', [_row(0, 'Hi')], urls, patience=2, model='mine')
    said = _failure(tmp_path/'run')
    assert 'No server was reachable for 2 s' in said and all(url in said for url in urls)

def test_a_server_that_wants_a_key(loopback, tmp_path):
    def behave(handler, *_):
        if handler.headers['Authorization'] == 'Bearer sk-secret': return False
        return handler.reply(401, {'detail': 'Not sk-wrong.'}) or True
    server, run = loopback(behave), tmp_path/'run'
    assert _run(run, [_row(i, f'{i}') for i in range(9)], server.url, env={'OPENAI_API_KEY': 'sk-wrong'})
    assert '401 Unauthorized: Not ….' in _failure(run) and 'Set the environment variable OPENAI_API_KEY' in _failure(run)
    assert not (run/'predictions.jsonl').exists()
    # a proxy of the environment is not for servers of this machine
    proxy = {'HTTP_PROXY': 'http://127.0.0.1:9', 'ALL_PROXY': 'http://127.0.0.1:9'}
    assert _run(run, None, server.url, env={'OPENAI_API_KEY': 'sk-secret\n'} | proxy) == 0
    assert len(_rows(run, 9)) == 9
    assert not [path for path in run.rglob('*') if path.is_file() and re.search(b'sk-(secret|wrong)', path.read_bytes())]

def test_a_key_that_is_given_to_predict_is_not_written_down(loopback, tiny, tmp_path):
    server = loopback(lambda handler, *_: handler.headers['Authorization'] != 'Bearer sk-secret' and (handler.reply(401, {}) or True))
    samples = [{'instruction': f'Is it {i}?', 'images': []} for i in range(9)]
    p = predict(predict_recipe(tiny, output_dir=tmp_path/'out'), samples, engine='openai', base_url=server.url, env={'OPENAI_API_KEY': 'sk-secret'})
    assert [json.loads(row['predict'])['user'] for row in p] == [[f'Is it {i}?'] for i in range(9)]
    assert not [path for path in tmp_path.rglob('*') if path.is_file() and b'sk-secret' in path.read_bytes()]

def test_a_wrong_path_or_model_ends_the_run_at_once(loopback, tmp_path):
    error = {'error': {'message': 'The model `cars` does not exist.'}}
    server = loopback(lambda handler, *_: handler.reply(404, error) or True)
    assert _run(tmp_path/'run', [_row(i, f'{i}') for i in range(50)], server.url, model='cars')
    assert re.search('The model `cars` does not exist.*base_url', _failure(tmp_path/'run'))
    assert len(server.asked) <= 16

@pytest.fixture(scope='module')
def factory_server(tiny, tmp_path_factory):
    "LLaMA-Factory's own server of the embedded model."
    folder, (port,) = tmp_path_factory.mktemp('api'), free_ports(1)
    args = {'model_name_or_path': str(tiny), 'template': 'qwen2_vl', 'infer_backend': 'huggingface'}
    (folder/'api.yaml').write_text(yaml.safe_dump(args))
    env = os.environ | {'API_HOST': '127.0.0.1', 'API_PORT': str(port)}
    command = [Path(sysconfig.get_path('scripts'))/'llamafactory-cli', 'api', folder/'api.yaml']
    with open(folder/'log', 'wb') as log: server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    url = f'http://127.0.0.1:{port}/v1'
    def is_there():
        assert server.poll() is None, (folder/'log').read_text()
        try: return httpx.get(f'{url}/models').status_code == 200
        except httpx.TransportError: return False
    try:
        _until(is_there)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=PATIENCE)

def test_llamafactorys_own_server_gives_the_answers_of_hf(factory_server, tiny, data, tmp_path):
    "All hundred rows, token for token: the same answers to prompts of the same length."
    recipe = predict_recipe(tiny, 'car_item_test', tmp_path/'hf', dataset_dir=str(data), max_new_tokens=24)
    asked = predict(recipe | {'output_dir': str(tmp_path/'run')}, engine='openai', base_url=factory_server, concurrency=2)
    own = predict(recipe, engine='hf')
    assert len(asked) == len(own) == 100 and {row['engine'] for row in asked} == {'openai'}
    for key in ('predict', 'prompt_tokens', 'tokens', 'finish_reason', 'id', 'label', 'images'):
        assert [row[key] for row in asked] == [row[key] for row in own], key

# Rubbish

def _raw(data):
    "Bytes in place of an HTTP answer."
    def reply(handler):
        handler.wfile.write(data if isinstance(data, bytes) else data.encode())
        handler.close_connection = True
    return reply

def _json(value, status=200, **headers): return lambda handler: handler.reply(status, value, **headers)
def _choice(choice, **more): return _json({'choices': [choice], **more})

def _without_end(start, part):
    "An answer whose parts go on until nobody listens any more."
    def reply(handler):
        handler.close_connection = True
        handler.wfile.write(start)
        try:
            while True: handler.wfile.write(part)
        except OSError: pass
    return reply

def _zeros(mebibytes):
    "So many MiB of zeros, packed by gzip: a thousandth of that."
    pack = zlib.compressobj(9, wbits=31)
    start = pack.compress(bytes(2**20)) + pack.flush(zlib.Z_FULL_FLUSH)
    again = zlib.compressobj(9, wbits=-15)
    block = again.compress(bytes(2**20)) + again.flush(zlib.Z_FULL_FLUSH)
    return start + block*(mebibytes - 1) + b'\x03\x00' + bytes(8)

OK, CHUNKED = b'HTTP/1.1 200 OK\r\n', b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n'
GOOD = json.dumps(_completion('fine')).encode()
LENGTH = f'Content-Length: {len(GOOD)}\r\n'.encode()

RUBBISH = {
    'nested lists': _json(b'['*100_000), 'nested dicts': _json(b'{"choices":'*100_000), 'nested in a text': _choice({'message': {'content': json.loads('['*900 + ']'*900)}}),
    'nested in an error': _json(b'{"error": ' + b'['*900 + b']'*900 + b'}', 400), 'deep, of status 500': _json(b'['*100_000, 500),
    'a long number': _json(b'{"choices": ' + b'9'*10_000 + b'}'), 'NaN': _json(b'NaN'), 'Infinity': _json({'choices': float('inf')}), 'a number': _json(7), 'null': _json(None),
    'true': _json(True), 'a text': _json('choices'), 'a list': _json([]), 'nothing': _json(b''), 'spaces': _json(b' '*1000), 'NUL': _json(bytes(1000)), 'UTF-16': _json(GOOD.decode().encode('utf-16')),
    'a mark before': _json(b'\xef\xbb\xbf' + GOOD), 'two answers': _json(GOOD*2), 'half an answer': _json(GOOD[:40]), 'not UTF-8': _json(GOOD.replace(b'fine', b'\xff\xfe')),
    'choices is null': _json({'choices': None}), 'choices is a dict': _json({'choices': {'0': 1}}), 'choices is a text': _json({'choices': 'abc'}), 'choices of null': _choice(None),
    'no message': _choice({}), 'message is null': _choice({'message': None}), 'message is a list': _choice({'message': ['content']}), 'message is a text': _choice({'message': 'content'}),
    'content is null': _choice({'message': {'content': None}}), 'content is a number': _choice({'message': {'content': 7}}), 'content is a list': _choice({'message': {'content': ['a']}}),
    'content is a dict': _choice({'message': {'content': {'text': 'a'}}}), 'no content, half a surrogate': _choice({'message': {'content': None}, 'finish_reason': '\udc80'}),
    'an error with half a surrogate': _json({'error': {'message': '\ud800'}}, 400), 'an error of a terminal': _json({'error': '\x1b[2J\x07\x00'}, 422), 'an error of all types': _json({'error': [{'detail': {'message': 7}}]}, 400),
    'packed as brotli': _json(GOOD, Content_Encoding='br'), 'packed by nobody knows what': _json(GOOD, Content_Encoding='車, \xff'), 'not packed': _json(GOOD, Content_Encoding='gzip'),
    'packed and cut': _json(gzip.compress(GOOD)[:20], Content_Encoding='gzip'), 'a bomb of 1.5 GB': _json(_zeros(1500), Content_Encoding='gzip'), 'a bomb as an error': _json(_zeros(1500), 500, Content_Encoding='gzip'),
    'an answer of 17 MB': _json(b'"' + b'a'*17_000_000 + b'"'), 'chunks without end': _without_end(CHUNKED, b'10000\r\n' + b' '*2**16 + b'\r\n'), 'content without end': _without_end(OK + b'\r\n', b' '*2**16),
    'headers without end': _without_end(OK, b'X-More: yes\r\n'), 'a header without end': _without_end(OK + b'X-More: ', b'x'*2**16),
    'a wrong chunk': _raw(CHUNKED + b'zz\r\nabc\r\n'), 'a chunk too short': _raw(CHUNKED + b'ffff\r\nabc'), 'longer than it says': _json(GOOD, Content_Length='10'), 'shorter than it says': _raw(OK + b'Content-Length: 9999\r\n\r\n' + GOOD),
    'a length that is none': _raw(OK + b'Content-Length: many\r\n\r\n' + GOOD), 'a length below 0': _raw(OK + b'Content-Length: -1\r\n\r\n' + GOOD), 'two lengths': _raw(OK + LENGTH + b'Content-Length: 7\r\n\r\n' + GOOD),
    'a header that is none': _raw(OK + b'no colon\r\n\r\n' + GOOD), 'a header with NUL': _raw(OK + b'X: a\0b\r\n\r\n' + GOOD), 'no HTTP': _raw(b'\x16\x03\x01\x02\x00\x01'), 'another protocol': _raw(b'SSH-2.0-OpenSSH_9\r\n'),
    'HTTP/0.9': _raw(GOOD), 'a status that is none': _raw(b'HTTP/1.1 abc OK\r\n\r\n'), 'status 999': _raw(b'HTTP/1.1 999 \xff\xfe\r\nContent-Length: 0\r\n\r\n'),
    'status 101': _raw(b'HTTP/1.1 101 Switching\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n'), 'status 204': _json(b'', 204), 'status 206': _json(GOOD, 206), 'status 300': _json(GOOD, 300),
    'a loop': _json(b'', 303, Location='/v1/chat/completions'), 'to a file': _json(b'', 303, Location='file:///etc/passwd'), 'to nowhere': _json(b'', 303, Location='http://[::1'), 'to a strange port': _json(b'', 303, Location='http://a:99999999/'),
    'busy for ever': _json(b'', 429, Retry_After='nan'), 'busy until a date': _json(b'', 503, Retry_After='Tue, 24 Nov 2099 00:00:00 GMT'), 'busy below 0': _json(b'', 429, Retry_After='-inf'), 'closed': _raw(b''),
}
ODD = { # What is an answer all the same
    'a charset that is no text': _json(GOOD, Content_Type='application/json; charset=hex'), 'an unknown charset': _json(GOOD, Content_Type='application/json; charset=klingon'),
    'half a surrogate as reason': _choice({'message': {'content': 'fine'}, 'finish_reason': '\ud800'}), 'half a surrogate as text': _choice({'message': {'content': 'fine\ud800'}}), 'NUL as text': _choice({'message': {'content': 'fine\0'}}),
    'a reason of a strange type': _choice({'message': {'content': 'fine'}, 'finish_reason': {'type': 'stop'}}), 'usage is a list': _choice({'message': {'content': 'fine'}}, usage=[1]), 'usage of texts': _choice({'message': {'content': 'fine'}}, usage={'prompt_tokens': 'many', 'completion_tokens': -1}),
    'usage without end': _choice({'message': {'content': 'fine'}}, usage={'prompt_tokens': float('inf'), 'completion_tokens': float('nan')}), 'keys of ours': _json(json.loads(GOOD) | {'row': 99, 'error': 'no', 'predict': 7}),
    'packed though not asked': _json(gzip.compress(GOOD), Content_Encoding='gzip'), 'cookies': _json(GOOD, Set_Cookie='\xff=;;;Expires=never; Max-Age=1e999'), 'many headers': _json(GOOD, **{f'X_{i}': 'y'*100 for i in range(90)}), 'HTTP/9.9': _raw(b'HTTP/9.9 200 OK\r\n\r\n' + GOOD), 'no length': _raw(OK + b'\r\n' + GOOD),
}

def test_whatever_an_answer_is_it_is_that_of_one_row(loopback, tmp_path):
    "Some ninety kinds of rubbish, with a good row after each."
    kinds = [kind for name in RUBBISH | ODD for kind in (name, 'good')]
    def behave(handler, asked, n):
        number, kind = _said(asked).split(': ')
        if kind == 'good': return False
        _until(lambda: _is_answered(handler))
        (RUBBISH | ODD)[kind](handler)
        return True
    server, run = loopback(behave), tmp_path/'run'
    server.folder = run
    _run(run, [_row(i, f'{i}: {kind}') for i, kind in enumerate(kinds)], server.url, concurrency=16, timeout=PATIENCE, tries=2)
    rows = _rows(run, len(kinds))
    told = {kind: row for kind, row in zip(kinds, rows)}
    assert not (run/'failure-0.json').exists()
    assert not [(row['row'], row['error']) for kind, row in zip(kinds, rows) if kind == 'good' and row['predict'] is None]
    assert not [kind for kind in RUBBISH if told[kind]['predict'] is not None or not told[kind]['error'].isprintable() or len(told[kind]['error']) > 500]
    assert not [(kind, told[kind]) for kind in ODD if told[kind]['predict'] is None or not told[kind]['predict'].startswith('fine')]
    assert all(type(told[kind][key]) in (int, type(None)) for kind in ODD for key in ('prompt_tokens', 'tokens'))
    (run/'predictions.jsonl').read_bytes().decode()

def test_what_follows_an_answer_is_not_that_of_the_next_row(loopback, tmp_path):
    server = loopback(lambda handler, asked, n: handler.reply(200, GOOD + OK + LENGTH + b'\r\n' + GOOD.replace(b'fine', b'evil'), Content_Length=str(len(GOOD))) or True)
    assert _run(tmp_path/'run', [_row(i, f'{i}') for i in range(20)], server.url, concurrency=4, tries=2) == 0
    assert {(row['predict'], row.get('error')) for row in _rows(tmp_path/'run', 20)} == {('fine', None)} and len(server.asked) == 20

def test_what_only_time_ends_takes_no_row_from_those_after_it(loopback, tmp_path):
    kinds = {'late': _silent, 'continue without end': _without_end(b'', b'HTTP/1.1 100 Continue\r\n\r\n')}
    server = loopback(lambda handler, asked, n: _said(asked) in kinds and (kinds[_said(asked)](handler) or True))
    assert _run(tmp_path/'run', [_row(i, kind) for i, kind in enumerate([*kinds, *'abcd'])], server.url, concurrency=2, timeout=8, tries=1) == 0
    *late, a, b, c, d = _rows(tmp_path/'run', 6)
    assert all(row['predict'] is None and 'No answer within 8 s' in row['error'] for row in late), late
    assert all(row['predict'] for row in (a, b, c, d))

MEASURED = 'import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)'

def test_answers_that_are_bombs_take_little_memory(loopback, tmp_path):
    bombs = ['a bomb of 1.5 GB', 'chunks without end', 'a bomb as an error', 'an answer of 17 MB']*4
    def behave(handler, asked, n):
        _until(lambda: _said(asked) == '0' or _is_answered(handler))
        return _said(asked) != '0' and (RUBBISH[bombs[int(_said(asked)) - 1]](handler) or True)
    run = tmp_path/'run'
    run.mkdir()
    server = loopback(behave)
    server.folder = run
    _begin(run, [_row(i, f'{i}') for i in range(17)], server.url, concurrency=4, tries=1).kill()
    said = subprocess.run([sys.executable, '-c', MEASURED, sys.executable, *script('prediction.coordinator')], cwd=run, capture_output=True, text=True)
    first, *rows = _rows(run, 17)
    assert not first.get('error') and all('larger than 16,777,216 bytes' in row['error'] for row in rows), rows
    assert int(said.stdout.splitlines()[-1]) < 400_000, 'KiB'

COLUMNS = ['row', 'id', 'prompt', 'label', 'asked', 'predict', 'finish_reason', 'prompt_tokens', 'tokens', 'engine', 'error', 'column.error', 'camera', 'budget', 'options']

@pytest.mark.parametrize('value', [7, ['a.mp4'], {'a': None}], ids=str)
def test_columns_that_are_called_like_keys_of_a_row_are_columns(loopback, tiny, tmp_path, value):
    "Each row is asked once; each column is there under its name, with `column.` before it where the name is taken."
    server = loopback()
    samples = [{'instruction': f'Row {i}?', 'output': 'x', 'images': []} | {name: ('a', value)[i % 2] for name in COLUMNS if name != 'id'} | {'id': f'n{i}'} for i in range(6)]
    recipe = predict_recipe(tiny, output_dir=tmp_path/'out')
    p = predict(recipe, samples, engine='openai', base_url=server.url)
    assert not p.failed and [row['id'] for row in p] == [s['id'] for s in samples] and len(server.asked) == 6
    assert [(row['row'], row['prompt'], row['label'], row['engine'], row['tokens']) for row in p] == [(i, f'Row {i}?', 'x', 'openai', 3) for i in range(6)]
    assert list(predict(recipe, samples, engine='openai', base_url=server.url)) == list(p) and len(server.asked) == 6
    s, table = score(p), p.to_pandas()
    for name in set(COLUMNS) - {'id'}:
        key = name if name in ('camera', 'budget', 'options') else f'column.{name}'
        assert [row[key] for row in p] == [sample[name] for sample in samples], name
        assert key in table and s.by(key)['rows'].tolist() == [3, 3], name
    assert 'Row 1' in repr(show_predictions(p)) and 'error' not in table and not any(row.get('videos') for row in p)

def test_a_folder_of_the_version_before_goes_on(loopback, tiny, tmp_path):
    "There the columns had their own names: an answered row with a column `error` counted as failed."
    samples = [{'instruction': f'Row {i}?', 'output': 'x', 'images': [], 'error': f'E{i}', 'camera': 'left'} for i in range(6)]
    recipe, server = predict_recipe(tiny, output_dir=tmp_path/'out'), loopback()
    p = predict(recipe, samples, engine='openai', base_url=server.url)
    answers, folder = list(p), tmp_path/'out'
    old = lambda row: {key.removeprefix('column.'): value for key, value in row.items()}
    asked = ''.join(json.dumps(old(json.loads(line))) + '\n' for line in (folder/'asked.jsonl').read_text().splitlines())
    (folder/'asked.jsonl').write_text(asked)
    question = json.loads((folder/'question.json').read_text()) | {'rows': hashlib.sha256(asked.encode()).hexdigest(), 'budget': 7}
    (folder/'question.json').write_text(json.dumps(question))
    failed = answers[2] | {'predict': None, 'error': 'ValueError: no'}
    del failed['column.error']
    (folder/'predictions.jsonl').write_text(''.join(json.dumps(old(row)) + '\n' for row in [*answers[:2], failed, *answers[3:5]]))
    with pytest.warns(UserWarning, match='5 of 6 rows'): before = Predictions(folder)
    assert [row['row'] for row in before.failed] == [2] and before[1] == answers[1]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        again = predict(recipe, samples, engine='openai', base_url=server.url)
    assert list(again) == answers and len(server.asked) == 8, 'two rows were asked again'
    assert json.loads((folder/'question.json').read_text())['budget'] == 7
    assert (folder/'question.json').stat().st_mode & 0o777 == 0o600

if __name__ == '__main__':
    server = Loopback(port=int(sys.argv[1]), most_rows=float(sys.argv[2]))
    print('ready', flush=True)
    threading.Event().wait()
