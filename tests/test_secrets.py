"""What is secret is written nowhere: arguments of LLaMA-Factory by their names, and passwords in the addresses of servers."""
import base64, dataclasses, json, re

import pytest

from conftest import free_ports
from qwen2vl_nb.hidden import apart, is_secret
from qwen2vl_nb.prediction.engines import predict
from qwen2vl_nb.recipe import predict_recipe
from test_served import loopback # noqa: F401, a fixture

def test_the_arguments_of_llamafactory_that_hold_secrets_are_those_that_are_not_written_down():
    "What an argument holds is asked of its own help."
    from llamafactory import hparams
    classes = [c for c in vars(hparams).values() if dataclasses.is_dataclass(c)]
    helps = {f.name: str(f.metadata.get('help')) for c in classes for f in dataclasses.fields(c)}
    secret = {name for name, text in helps.items() if re.search(r'(?i)\b(auth|api.key|secret|password|credential|log ?in|webhook|token to use)\b', text)}
    assert {'hf_hub_token', 'ms_hub_token', 'om_hub_token', 'swanlab_api_key', 'swanlab_lark_secret', 'swanlab_lark_webhook_url', 'hub_token'} <= secret
    texts = {f.name for c in classes for f in dataclasses.fields(c) if 'str' in str(f.type) or 'dict' in str(f.type)}
    assert {name for name in texts if is_secret(name, 'x')} == secret and len(helps) > 300

def test_a_secret_within_an_argument_is_a_secret():
    recipe = {'ray_init_kwargs': {'address': 'auto', '_redis_password': 'x'}, 'kwargs': [{'headers': {'Authorization': 'x'}}], 'fine': {'max_new_tokens': 5, 'names': ['a']}}
    assert [*apart(recipe)[0]] == ['ray_init_kwargs', 'kwargs'] and [*apart(recipe)[1]] == ['fine']

PASSWORD = 'pw_secret'
BASIC = base64.b64encode(f'bob:{PASSWORD}'.encode()).decode()

def told(folder):
    "Files that hold the password, in one of its forms."
    return [p for p in folder.rglob('*') if p.is_file() and re.search(f'{PASSWORD}|{BASIC}'.encode(), p.read_bytes())]

def test_a_password_in_the_address_of_a_server_is_written_nowhere(loopback, tiny, tmp_path): # noqa: F811
    "Beside the server is an address at which none is. The server tells what it was sent to whom it refuses."
    def behave(handler, asked, n):
        sent = handler.headers['Authorization'] or ''
        if sent != f'Basic {BASIC}': return handler.reply(401, {'detail': 'Who are you?'}) or True
        refused = 'Is it 3?' in json.dumps(asked) and n == 1
        return refused and (handler.reply(400, {'detail': f'Not for {sent} of http://bob:{PASSWORD}@here/v1'}) or True)
    server = loopback(behave)
    address = server.url.replace('//', f'//bob:{PASSWORD}@')
    urls = [f'http://bob:{PASSWORD}@127.0.0.1:{free_ports(1)[0]}/v1', address]
    samples, recipe = [{'instruction': f'Is it {i}?', 'images': []} for i in range(9)], predict_recipe(tiny, output_dir=tmp_path/'out')
    with pytest.warns(UserWarning, match='1 of 9 rows have no answer') as found: p = predict(recipe, samples, engine='openai', base_url=urls)
    assert [row['row'] for row in p.failed] == [3] and 'Not for Basic … of http://***@here' in p.failed[0]['error']
    assert 'is not reachable' in (tmp_path/'out'/'run.log').read_text() and not told(tmp_path)
    assert not [w for w in found if PASSWORD in str(w.message)]
    again = predict(recipe, samples, engine='openai', base_url=urls)
    assert [json.loads(row['predict'])['user'] for row in again] == [[f'Is it {i}?'] for i in range(9)] and not told(tmp_path)

@pytest.mark.parametrize('how', ['refused', 'nobody there'])
def test_a_run_that_fails_does_not_tell_the_password(how, loopback, tiny, tmp_path): # noqa: F811
    server = loopback(lambda handler, *_: handler.reply(401, {}) or True)
    url = server.url if how == 'refused' else f"http://127.0.0.1:{free_ports(1)[0]}/v1"
    url = url.replace('//', f'//bob:{PASSWORD}@')
    options = {'model': 'm'} if how == 'refused' else {'patience': 1}
    with pytest.raises(RuntimeError) as raised:
        predict(predict_recipe(tiny, output_dir=tmp_path/'out'), [{'instruction': 'Is it?', 'images': []}], engine='openai', base_url=url, **options)
    assert PASSWORD not in str(raised.value) and '127.0.0.1' in str(raised.value) and not told(tmp_path)
