"""A model that is a name: from a hub on this machine that `huggingface_hub` really downloads from, from its cache, and where nobody listens."""
import hashlib, json, os, subprocess, sys
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest

from conftest import COMMIT, HubHandler, PATIENCE, until
from qwen2vl_nb.model_faults import hub_findings
from qwen2vl_nb.run.start import launch

@pytest.fixture
def hub(tiny, tmp_path):
    "A hub with one model, `me/tiny`: its address, what it was asked, how to end it, and the event after which it sends the weights."
    asked, sent = [], Event()
    sent.set()
    class Hub(HubHandler):
        def before_body(self):
            if self.path.endswith('.safetensors'): sent.wait(PATIENCE)
        def do_GET(self):
            asked.append(f'{self.command} {self.path}')
            parts = self.path.partition('?')[0].strip('/').split('/')
            files = [p for p in tiny.iterdir() if p.is_file()]
            if parts[:3] == ['api', 'models', 'me']:
                about = {'id': 'me/tiny', 'sha': COMMIT, 'siblings': [{'rfilename': p.name} for p in files]}
                tree = [{'type': 'file', 'path': p.name, 'size': p.stat().st_size, 'oid': '0'*40} for p in files]
                if 'tree' in parts and not parts[-1] in ('main', COMMIT): return self.answer(404, X_Error_Code='EntryNotFound')
                return self.answer(200, json.dumps(tree if 'tree' in parts else about).encode(), Content_Type='application/json')
            if parts[:3] != ['me', 'tiny', 'resolve']: return self.answer(404, X_Error_Code='RepoNotFound')
            file = tiny/parts[-1]
            if not file.is_file(): return self.answer(404, X_Error_Code='EntryNotFound')
            body = file.read_bytes()
            self.answer(200, body, ETag=f'"{hashlib.sha256(body).hexdigest()}"')
        do_HEAD = do_GET
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    def close():
        server.shutdown()
        server.server_close()
    yield {'HF_ENDPOINT': f'http://127.0.0.1:{server.server_port}', 'HF_HOME': str(tmp_path/'hf'), 'HF_HUB_OFFLINE': '0', 'HF_HUB_DISABLE_XET': '1'}, asked, close, sent
    close()

def test_a_model_is_trained_from_the_hub_and_later_from_its_cache(hub, few_steps):
    env, asked, close, sent = hub
    sent.clear()
    recipe = few_steps(model_name_or_path='me/tiny', max_steps=1, save_strategy='no')
    run = launch(recipe, env=env)
    until(lambda: 'starting, downloading model.safetensors: 0 of ' in str(run.progress) or not run.is_running)
    assert run.is_running, run.failure
    sent.set()
    assert run.wait().status == 'done'
    assert 'GET /me/tiny/resolve/main/model.safetensors' in ' '.join(asked) or f'GET /me/tiny/resolve/{COMMIT}/model.safetensors' in ' '.join(asked)
    before = len(asked)
    close()
    for offline in '01': assert hub_findings(recipe, env | {'HF_HUB_OFFLINE': offline}) == []  # all of it is here
    weights, = Path(env['HF_HOME']).rglob('snapshots/*/model.safetensors')
    weights.unlink()
    found, = hub_findings(recipe, env)
    assert 'cannot be reached' in found.what and 'In the cache it is not complete' in found.what and 'model.safetensors' in found.what and len(asked) == before

def test_a_hub_that_cannot_be_reached_is_said_before_the_start(few_steps, tmp_path):
    env = {'HF_ENDPOINT': 'http://127.0.0.1:9', 'HF_HOME': str(tmp_path/'hf'), 'HF_HUB_OFFLINE': '0'}
    with pytest.raises(ValueError, match='the hub http://127.0.0.1:9 cannot be reached') as e: launch(few_steps(model_name_or_path='me/tiny'), env=env)
    assert all(cure in str(e.value) for cure in ('HF_ENDPOINT', 'USE_MODELSCOPE_HUB=1', 'pass the folder')) and not (tmp_path/'run').exists()

@pytest.mark.soak
def test_llamafactory_fails_of_a_hub_that_cannot_be_reached(few_steps, tmp_path):
    "After a minute and a half of trying again."
    env = {'HF_ENDPOINT': 'http://127.0.0.1:9', 'HF_HOME': str(tmp_path/'hf'), 'HF_HUB_OFFLINE': '0'}
    with pytest.raises(RuntimeError), pytest.warns(UserWarning): launch(few_steps(model_name_or_path='me/tiny'), env=env, force=True).wait()

def test_a_data_set_on_a_hub_that_refuses_connections_is_told_at_the_first_attempt(tmp_path):
    "In a process of its own: `datasets` reads the address when it is imported. It alone would try six times, and say so."
    code = "from qwen2vl_nb.data.sources import read_samples; read_samples('me/cars')"
    env = os.environ | {'HF_ENDPOINT': 'http://127.0.0.1:9', 'HF_HOME': str(tmp_path/'hf'), 'HF_HUB_OFFLINE': '0'}
    done = subprocess.run([sys.executable, '-c', code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert 'FileNotFoundError: There is no file or folder me/cars here' in done.stderr and 'at the first attempt' in done.stderr and 'Retrying' not in done.stderr

def test_a_name_that_the_hub_does_not_have_is_said_before_the_start(hub, few_steps, tmp_path):
    env, asked, *_ = hub
    with pytest.raises(ValueError, match="does not provide 'me/huge'"): launch(few_steps(model_name_or_path='me/huge'), env=env)
    assert asked == ['HEAD /me/huge/resolve/main/config.json'] and not (tmp_path/'run').exists()
    with pytest.raises(RuntimeError), pytest.warns(UserWarning): launch(few_steps(model_name_or_path='me/huge'), env=env, force=True).wait()
