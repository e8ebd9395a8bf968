"""A run is handed over: its card, and what of it arrives at a hub on this machine to which the real `huggingface_hub` uploads."""
import base64, hashlib, json, os, re, shutil, subprocess, sys
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import COMMIT, HubHandler, free_ports, serving
from qwen2vl_nb.data.registry import Registry, dataset_samples
from qwen2vl_nb.model import chat_template
from qwen2vl_nb.prediction.engines import predict
from qwen2vl_nb.prediction.predictions import Predictions
from qwen2vl_nb.recipe import answering_recipe, load_recipe, predict_recipe, save_recipe, train_recipe
from qwen2vl_nb.run.merge import export
from qwen2vl_nb.run.start import Run, launch
from qwen2vl_nb.tuning.hand_over import model_card, push_to_hub, serving_lines

TOKEN = 'hf_secretOfThisTest'

class Hub(ThreadingHTTPServer):
    "A hub to which models are uploaded: `repos` name → whether it is private and its files, `asked` what it was asked."
    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.url, self.repos, self.blobs, self.asked = f'http://127.0.0.1:{self.server_port}', {}, {}, []

class Handler(HubHandler):
    "Small files go into the commit, weights into the large file storage, as at the real hub."
    def say(self, value, status=200, **headers): self.answer(status, json.dumps(value).encode(), Content_Type='application/json', **headers)
    def received(self):
        if 'chunked' not in self.headers.get('Transfer-Encoding', ''): return self.rfile.read(int(self.headers.get('Content-Length') or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(parts)
    def handle_one(self):
        path, hub = self.path.partition('?')[0], self.server
        body = self.received()
        hub.asked.append((self.command, path, self.headers.get('Authorization')))
        if refused := re.search(r'/me/status-(\d+)', path): return self.say({'error': 'no'}, int(refused[1]))
        if path == '/api/validate-yaml': return self.say({'errors': [], 'warnings': []})
        if path == '/api/repos/create': return self.create(json.loads(body))
        if path.startswith('/blobs/'): return self.store(path.rpartition('/')[2], body)
        name = re.search(r'/([^/]+/[^/]+?)(?:\.git/|/preupload/|/commit/|$)', path.removeprefix('/api/models'))[1]
        if path.endswith('/objects/batch'): return self.batch(json.loads(body))
        if name not in hub.repos: return self.say({'error': 'Repository not found'}, 404, X_Error_Code='RepoNotFound')
        if '/preupload/' in path:
            return self.say({'files': [{'path': f['path'], 'shouldIgnore': False, 'uploadMode': 'lfs' if f['path'].endswith('.safetensors') else 'regular'}
                                       for f in json.loads(body)['files']]})
        if '/commit/' in path: return self.commit(name, [json.loads(line) for line in body.splitlines()])
        repo = hub.repos[name]
        self.say({'id': name, 'sha': COMMIT, 'private': repo['private'], 'siblings': [{'rfilename': f} for f in repo['files']]})
    do_GET = do_POST = do_PUT = handle_one
    def create(self, asked):
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.server.repos: return self.say({'error': 'You already created this model repo', 'url': f'{self.server.url}/{name}'}, 409)
        self.server.repos[name] = {'private': asked['private'], 'files': {}}
        self.say({'url': f'{self.server.url}/{name}'})
    def batch(self, asked):
        upload = lambda oid: {'upload': {'href': f'{self.server.url}/blobs/{oid}'}}
        self.say({'transfer': 'basic', 'objects': [o | {'actions': upload(o['oid'])} for o in asked['objects']]})
    def store(self, oid, body):
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.blobs[oid] = body
        self.say({})
    def commit(self, name, lines):
        for line in lines[1:]:
            value = line['value']
            content = base64.b64decode(value['content']) if line['key'] == 'file' else self.server.blobs[value['oid']]
            self.server.repos[name]['files'][value['path']] = content
        self.say({'commitUrl': f'{self.server.url}/{name}/commit/{COMMIT}', 'commitOid': COMMIT})

@pytest.fixture
def hub():
    server = Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()

CHILD = """
import io, json, sys
from contextlib import redirect_stdout
from qwen2vl_nb.tuning.hand_over import push_to_hub
from qwen2vl_nb.prediction.predictions import Predictions
run, told = sys.argv[1], []
for options in json.loads(sys.argv[2]):
    if 'predictions' in options: options['predictions'] = Predictions(options['predictions'])
    with redirect_stdout(io.StringIO()) as said:
        try:
            print(done := push_to_hub(run, options.pop('name', 'me/cars'), **options))
            why = done.url
        except Exception as e: why = f'{type(e).__name__}: {e}'
    told.append((said.getvalue(), why))
print(json.dumps(told))
"""

def push(endpoint, run, *calls, token=TOKEN, offline='0'):
    "Upload in a process of its own, since huggingface_hub reads its variables when it is imported: for each call, what it printed, and the address or the refusal."
    env = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING'))}
    env |= {'HF_ENDPOINT': endpoint, 'HF_HOME': str(Path(run).parent/'hf'), 'HF_HUB_OFFLINE': offline, 'HF_HUB_DISABLE_XET': '1'} | ({'HF_TOKEN': token} if token else {})
    done = subprocess.run([sys.executable, '-c', CHILD, str(run.output_dir), json.dumps(calls)], env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)

@pytest.fixture(scope='module')
def trained(tiny, data, tmp_path_factory):
    "A run, the folder of its export, and its answers."
    folder = tmp_path_factory.mktemp('runs 店')
    base = folder/'my base'
    base.mkdir()
    for file in tiny.iterdir(): (base/file.name).symlink_to(file)
    (base/'README.md').write_text('---\nlicense: apache-2.0\n---\n')
    recipe = train_recipe(base, 'car_item', folder/'cars', dataset_dir=str(data), max_steps=3, max_samples=16, logging_steps=1, bf16=None, use_cpu=True, save_steps=2,
                          gradient_accumulation_steps=1, preprocessing_num_workers=None)
    run = launch(recipe, env={'WANDB_API_KEY': 'wandb_secret'}).wait()
    merged = export(run, folder/'export')
    asked = dataset_samples(Registry(data), 'car_item_test')[:12]
    answers = predict(predict_recipe(base, None, folder/'answers', adapter=run, max_new_tokens=16, use_cpu=True), asked)
    return run, merged, answers

def assert_nothing_private(files, run):
    "No path of this machine, no secret, in any file."
    for name, content in files.items():
        for word in (str(run.output_dir.parent), str(Path.home())+'/', str(Path(__file__).parent.parent), TOKEN, 'wandb_secret'):
            assert word.encode() not in content, (name, word)

def test_an_adapter_arrives_with_its_card_and_nothing_else_does(hub, trained):
    run, _, answers = trained
    (said, url), = push(hub.url, run, {'predictions': str(answers.output_dir)})
    assert url.startswith(f'{hub.url}/me/cars/commit/')
    files, here = hub.repos['me/cars']['files'], run.output_dir
    assert hub.repos['me/cars']['private'] and 'adapter_model.safetensors' in said and 'run.json' in said.partition('Not uploaded: ')[2]
    changed = {'README.md', 'adapter_config.json', 'chat_template.jinja'}
    assert {name for name in files if name not in changed and files[name] != (here/name).read_bytes()} == set()
    assert {'adapter_model.safetensors', 'tokenizer.json', 'preprocessor_config.json', *changed} <= {*files}
    assert not [name for name in files if re.search(r'run|recipe|trainer|optim|checkpoint|predict|all_results|training_args|\.log|yaml', name)]
    assert {'run.json', 'recipe.yaml', 'trainer_log.jsonl', 'training_args.bin', 'checkpoint-2'} <= {*os.listdir(here)}, 'there was something to leave out'
    theirs, ours = (json.loads(text) for text in ((here/'adapter_config.json').read_text(), files['adapter_config.json']))
    assert ours == theirs | {'base_model_name_or_path': 'my base'} and os.path.isabs(theirs['base_model_name_or_path'])
    assert files['chat_template.jinja'].decode() == chat_template(run.recipe['model_name_or_path'])
    assert_nothing_private(files, run)
    assert files['README.md'].decode() == str(model_card(run, answers, name='me/cars'))
    sent = {auth for _, path, auth in hub.asked if not path.startswith('/blobs/')}
    assert sent == {f'Bearer {TOKEN}'}
    for path in run.output_dir.parent.rglob('*'):
        if path.is_file(): assert TOKEN.encode() not in path.read_bytes(), f'the token is in {path}'

def test_the_card_says_what_the_run_was(trained):
    run, merged, answers = trained
    card = model_card(run, answers, name='me/cars')
    assert '| car_item | training | 16 |' in card.text and 'The trainer counted 16 examples' in card.text and '| steps | 3 of 3 |' in card.text
    assert card.data.license == 'apache-2.0' and 'Its licence: apache-2.0.' in card.text and '| torch | ' in card.text
    assert {r.metric_type for r in card.data.eval_results} >= {'exact_match', 'bleu', 'rouge'} and '12 rows' in card.text
    assert model_card(run, merged=merged).data.library_name == 'transformers'

def test_answers_of_another_model_are_refused(trained, tmp_path):
    run, merged, answers = trained
    folder = Path(shutil.copytree(answers.output_dir, tmp_path/'before'))
    recipe = load_recipe(folder/'recipe.yaml')
    save_recipe({k: v for k, v in recipe.items() if k != 'adapter_name_or_path'}, folder/'recipe.yaml')
    before = Predictions(folder)
    with pytest.raises(ValueError, match='is not the model of'): model_card(run, before)
    with pytest.raises(ValueError, match='is not the model of'): push_to_hub(run, 'me/cars', before, dry_run=True)

def test_a_run_that_was_moved_keeps_its_answers(trained, tmp_path):
    "It is known by its id: the answers of another run that has taken its old place are refused."
    run, merged, answers = trained
    moved = Run(shutil.copytree(run.output_dir, tmp_path/'moved'))
    assert '12 rows' in model_card(moved, answers).text
    other = json.loads((moved.output_dir/'run.json').read_text()) | {'id': 'another'}
    (moved.output_dir/'run.json').write_text(json.dumps(other))
    with pytest.raises(ValueError, match='is not the model of'): model_card(moved, answers)

def test_lines_for_an_export_that_is_missing_or_incomplete_are_refused(trained, tmp_path):
    run, merged, _ = trained
    (half := tmp_path/'half').mkdir()
    shutil.copy(merged/'config.json', half)
    for folder, words in ((tmp_path/'gone', 'There is no folder'), (half, 'There is no complete model in')):
        for call in (serving_lines, lambda run, merged: model_card(run, merged=merged), lambda run, merged: push_to_hub(run, 'me/cars', merged=merged, dry_run=True)):
            with pytest.raises(ValueError, match=words): call(run, folder)

@pytest.mark.parametrize('folder, name', [('my cars 1', 'user/my-cars-1'), ('车辆 v2', 'user/v2'), ('车辆', 'user/model')])
def test_a_card_without_a_name_has_lines_that_can_be_copied(folder, name, trained, tmp_path):
    text = model_card(shutil.copytree(trained[0].output_dir, tmp_path/folder)).text
    assert text.lstrip().startswith(f'# {folder}\n') and f'\nhf download {name} chat_template.jinja ' in text and f"from_pretrained(model, '{name}')" in text

def test_a_dry_run_is_shown_once(trained, capsys):
    would = push_to_hub(trained[0], 'me/cars', dry_run=True)
    assert not capsys.readouterr().out and 'adapter_model.safetensors' in str(would)

def test_an_export_arrives_and_a_name_that_is_taken_is_refused(hub, trained):
    run, merged, _ = trained
    whole, hub.repos['me/public'] = {'merged': str(merged)}, {'private': False, 'files': {}}
    told = push(hub.url, run, whole, whole, {}, {'overwrite': True}, whole | {'overwrite': True}, whole | {'name': 'me/public'}, whole | {'name': 'me/public', 'private': False})
    refusals = [why for _, why in told if not why.startswith('http')]
    for why, words in zip(refusals, ['pass overwrite=True', 'contains a complete model, another kind', 'contains a complete model, another kind', 'exists and is public'], strict=True):
        assert words in why
    for name in ('me/cars', 'me/public'):
        files = hub.repos[name]['files']
        assert {'model.safetensors', 'config.json', 'tokenizer.json', 'preprocessor_config.json', 'chat_template.jinja', 'README.md'} <= {*files}
        assert {n for n in files if not (merged/n).is_file() or files[n] != (merged/n).read_bytes()} == {'README.md'}
        assert_nothing_private(files, run)
    assert sum(path == '/api/models/me/cars/commit/main' for _, path, _ in hub.asked) == 2

def test_an_adapter_on_another_one_is_exported_and_served_with_it(tiny_fp32, few_steps, tmp_path):
    "As before DPO: the first adapter is merged, and a second one is trained, which means nothing without the first. The first also has tokens that were added."
    kept = dict(model_name_or_path=str(tiny_fp32), learning_rate=1e-2, plot_loss=None, add_tokens='<car>', save_strategy='no')
    first = launch(few_steps(output_dir=tmp_path/'first', max_steps=2, **kept)).wait()
    again = few_steps(output_dir=tmp_path/'second', max_steps=2, adapter_name_or_path=str(first.output_dir), create_new_adapter=True, seed=7, **kept)
    second = launch(again).wait()
    both = f'{first.output_dir},{second.output_dir}'
    assert both in serving_lines(second)['api'] and answering_recipe(second.recipe, second)['adapter_name_or_path'] == both
    with pytest.raises(ValueError, match='several adapters.*pass merged=folder'): push_to_hub(second, 'me/cars', dry_run=True)
    merged, name = load_file(export(second, tmp_path/'merged')/'model.safetensors'), 'layers.0.mlp.up_proj'
    def change(run):
        weights = load_file(run.output_dir/'adapter_model.safetensors')
        a, b = (next(v for k, v in weights.items() if k.endswith(f'{name}.lora_{side}.weight')).float() for side in 'AB')
        return 2*(b @ a)  # lora_alpha is twice the rank
    base = load_file(tiny_fp32/'model.safetensors')[f'model.{name}.weight']
    assert push_to_hub(second, 'me/cars', merged=tmp_path/'merged', dry_run=True).files['model.safetensors']
    made, both = (merged[f'model.{name}.weight'].float() - base), change(first) + change(second)
    assert torch.allclose(made, both, atol=float(both.abs().max())/20) and not torch.allclose(made, change(second), atol=float(both.abs().max())/20)

def test_refusals_in_plain_words(hub, trained):
    run, *_ = trained
    (_, why), (said, url) = push(hub.url, run, {}, {'dry_run': True}, token=None)
    assert 'There is no token for the hub: log in' in why and url is None and 'not uploaded' in said and not hub.asked
    calls = [{'name': f'me/status-{status}'} for status in (401, 403, 500)]
    for (_, why), words in zip(push(hub.url, run, *calls), ('does not accept the token', 'may not write to me/status-403', 'refused the upload to me/status-500')):
        assert words in why and TOKEN not in why
    assert not hub.repos
    assert 'cannot be reached' in push(f'http://127.0.0.1:{free_ports(1)[0]}', run, {})[0][1]
    assert 'HF_HUB_OFFLINE=1 forbids' in push(hub.url, run, {}, offline='1')[0][1]

def test_the_lines_that_load_the_model_do(trained):
    "The card's own Python, with the folders in place of the names."
    run, merged, _ = trained
    places = {'me/cars': str(merged)}, {'me/cars': str(run.output_dir), 'path/to/my base': run.recipe['model_name_or_path']}
    for card, names in zip((model_card(run, merged=merged, name='me/cars'), model_card(run, name='me/cars')), places):
        code = re.search(r'```python\n(.*?)```', card.text, re.S)[1]
        for name, folder in names.items(): code = code.replace(repr(name), repr(folder))
        made = {}
        exec(code, made)
        assert 'Qwen2VL' in str(type(made['model'].base_model)) or 'Lora' in str(type(made['model'].base_model))
        _, height, width = made['processor'].image_processor(Image.new('RGB', (2000, 1500)), return_tensors='pt')['image_grid_thw'][0]
        assert .9*768*768 < height*width*14*14 <= 768*768

@pytest.mark.soak
def test_llamafactory_serves_with_the_line_of_the_run(trained, data):
    "The export and the adapter give the answers that were predicted."
    run, merged, answers = trained
    asked = dataset_samples(Registry(data), 'car_item_test')[:12]
    for line in (serving_lines(run, merged)['api'], serving_lines(run)['api']):
        port, = free_ports(1)
        line = line.replace('API_PORT=8000', f'API_PORT={port}').replace('llamafactory-cli', f'{sys.executable} -m llamafactory.cli')
        with serving(line, port, shell=True) as url:
            recipe = predict_recipe(run.recipe['model_name_or_path'], None, run.output_dir.parent/f'served-{port}', max_new_tokens=16)
            served = predict(recipe, asked, engine='openai', base_url=url)
            assert [row['predict'] for row in served] == [row['predict'] for row in answers]
