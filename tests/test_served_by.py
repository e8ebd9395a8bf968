"Servers that a run has for itself: whatever they do, the run says so, and leaves none of them behind."
import json, os, re, signal, subprocess, sys

import psutil
import pytest

from conftest import PATIENCE, until
from qwen2vl_nb.prediction import openai as served, servers
from qwen2vl_nb.prediction.rows import Answers
from qwen2vl_nb.boot import script
from qwen2vl_nb.prediction.engines import _start_workers
from qwen2vl_nb.prediction.predictions import Predictions
from qwen2vl_nb.prediction.question import asked_row
from qwen2vl_nb.recipe import predict_recipe
from qwen2vl_nb.processes import end_children, marked
from qwen2vl_nb.run.folder import state_or_empty
from qwen2vl_nb.run.start import describe_start
from qwen2vl_nb.prediction.vllm import _free_ports

# Ready when a file is there, with a process of its own below it; ends after so many rows, or answers only so many
SERVER = '''
import json, os, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
port, how = int(sys.argv[1]), json.loads(sys.argv[2])
subprocess.Popen(['sleep', '600'])
print('hello from', os.environ['SERVER_NAME'], flush=True)
while not os.path.exists(how.get('ready', '/')): time.sleep(.02)
if 'says' in how: sys.exit(how['says'])
rows = 0
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def reply(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self): self.reply({'data': [{'id': 'tiny'}]})
    def do_POST(self):
        global rows
        self.rfile.read(int(self.headers['Content-Length']))
        rows += 1
        if rows > how.get('rows', 1000): os._exit(3)
        while rows > how.get('answers', 1000): time.sleep(.02)
        self.reply({'choices': [{'message': {'content': os.environ['SERVER_NAME']}, 'finish_reason': 'stop'}],
                    'usage': {'prompt_tokens': 1, 'completion_tokens': 1}})
ThreadingHTTPServer(('127.0.0.1', port), Handler).serve_forever()
'''

@pytest.fixture
def begin(tiny, tmp_path):
    "Start a run with servers that behave as the given dicts say, and let it be."
    runs = []
    def start(*hows, n=40):
        folder = tmp_path/'my run 预测'
        ports = _free_ports(len(hows))
        servers = [{'command': [sys.executable, '-c', SERVER, str(port), json.dumps(how)],
                    'env': {'SERVER_NAME': f'server {i}'}, 'url': f'http://127.0.0.1:{port}/v1',
                    'log': f'server-{i}.log', 'seconds': how.get('seconds', PATIENCE)}
                   for i, (port, how) in enumerate(zip(ports, hows))]
        folder.mkdir()
        Answers(folder/'asked.jsonl').add([asked_row(i, {'instruction': f'Row {i}?'}) for i in range(n)])
        about = describe_start(1)
        options = served.server_options([s['url'] for s in servers], concurrency=2)
        about |= {'servers': servers, 'options': options}
        worker = {'command': [about['python'], *script('prediction.openai')], 'env': {}}
        runs.append(_start_workers(predict_recipe(tiny, None, folder), folder, about, [worker]))
        return runs[-1]
    yield start
    for run in runs: run.stop(patience=0)

_until = until

def _ended(run):
    "Wait for the end; nothing of the run may be left."
    _until(lambda: not run.is_running)
    assert not marked(state_or_empty(run, 'run.json')['id'])
    return run.status

def _answers(run): return [row['predict'] for row in Predictions(run)]

def test_they_are_started_waited_for_asked_and_ended(begin, tmp_path):
    run = begin({'ready': str(tmp_path/'ready')}, {})
    _until(lambda: run.progress.steps)
    assert (run.progress.step, run.progress.steps) == (0, 40), 'before a server is ready'
    assert not (run.output_dir/'predictions.jsonl').exists()
    (tmp_path/'ready').touch()
    assert _ended(run) == 'done' and set(_answers(run)) == {'server 0', 'server 1'}
    assert len(_answers(run)) == 40 and run.progress.step == 40
    assert (run.output_dir/'server-1.log').read_text() == 'hello from server 1\n'

def test_one_that_ends_before_it_is_ready_ends_the_run_with_the_first_cause(begin):
    log = ('(Worker pid=1) ERROR [a.py:1] ValueError: too few heads\n  File "x"\n'
           'RuntimeError: Engine failed. See above.')
    run = begin({}, {'says': log})
    assert _ended(run) == 'failed'
    said = run.failure.what
    url = state_or_empty(run, 'run.json')['servers'][1]['url']
    assert f'The server {url} ended with exit status 1 before the work began' in said
    assert 'It said: ValueError: too few heads / RuntimeError: Engine failed.' in said
    assert str(run.output_dir/'server-1.log') in said and not (run.output_dir/'predictions.jsonl').exists()

def test_one_that_is_not_ready_in_time_ends_the_run(begin):
    run = begin({'ready': '/never', 'seconds': 1})
    assert _ended(run) == 'failed'
    assert re.search('was not ready within 1 s. It said: (hello from server 0|nothing)', run.failure.what)

def test_one_without_an_exception_is_told_by_its_last_lines(begin):
    run = begin({'says': 'usage: api_server\nerror: unknown option'})
    assert _ended(run) == 'failed'
    assert 'It said: hello from server 0 / usage: api_server / error: unknown option' in run.failure.what

def test_when_none_is_left_the_worker_is_ended_and_what_is_done_kept(begin):
    run = begin({'rows': 7}, {'rows': 5})
    assert _ended(run) == 'failed'
    assert 'ended with exit status 3 while answering requests' in run.failure.what
    assert 0 < len(_answers(run)) <= 12 and run.progress.step == len(_answers(run))

def test_one_of_several_that_dies_costs_no_row(begin):
    run = begin({'rows': 5}, {})
    assert _ended(run) == 'done'
    assert len(_answers(run)) == 40 and 0 < _answers(run).count('server 0') <= 5 and not Predictions(run).failed

@pytest.mark.parametrize('how', ['as they start', 'while they are asked'])
def test_a_run_that_is_stopped_takes_them_along(begin, how):
    run = begin({'ready': '/never'} if how == 'as they start' else {'answers': 5}, n=400)
    _until(lambda: run.progress.step if how == 'while they are asked' else run.progress.steps)
    run.stop()
    assert _ended(run) == 'stopped'

def test_one_that_does_not_go_is_ended_by_force_with_what_is_below_it():
    stubborn = ('import signal, subprocess, time; signal.signal(15, signal.SIG_IGN)\n'
                'print(subprocess.Popen(["sleep", "99"]).pid, flush=True); time.sleep(99)')
    process = subprocess.Popen([sys.executable, '-c', stubborn], stdout=subprocess.PIPE, text=True)
    below = int(process.stdout.readline())
    end_children([process], grace=.5)
    assert process.returncode == -signal.SIGKILL
    _until(lambda: not psutil.pid_exists(below) or psutil.Process(below).status() == psutil.STATUS_ZOMBIE)

def test_no_proxy_is_asked_for_them(monkeypatch):
    monkeypatch.setitem(os.environ, 'http_proxy', 'http://127.0.0.1:9')
    monkeypatch.setitem(os.environ, 'no_proxy', '')
    port, = _free_ports(1)
    command = [sys.executable, '-c', SERVER, str(port), '{}']
    server = subprocess.Popen(command, env=os.environ | {'SERVER_NAME': 'x'})
    try: _until(lambda: servers._lists_models(f'http://127.0.0.1:{port}/v1'))
    finally: end_children([server])
