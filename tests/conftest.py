"""The tests run on the package as it is installed from a built wheel, beside the same stack, not on the sources.

The wheel is built once, before any test module imports the package; child processes get it through PYTHONPATH."""
import importlib.metadata, json, os, shutil, socket, subprocess, sys, tempfile, time
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT/'test-artefacts' # What was to be seen in the browser
BROWSERS = 'chromium', 'chromium-browser', 'google-chrome' # As in the Makefile
AS_ROOT = 'This test needs root; `make test` gives it a namespace in which it is root, where the kernel lets users have one.'

def _install_wheel():
    "Build the wheel from a copy of what goes into it, and install it without its dependencies."
    work = Path(tempfile.mkdtemp(prefix='wheel-'))
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'README.md', 'LICENSE', 'qwen2vl_nb', 'data', 'nbs/tutorials'):
        copy = shutil.copytree if (ROOT/name).is_dir() else shutil.copy
        copy(ROOT/name, work/name)
    pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
    subprocess.run([*pip, 'wheel', '--no-deps', '--no-build-isolation', '--wheel-dir', work/'dist', work], check=True)
    subprocess.run([*pip, 'install', '--no-deps', '--no-index', '--target', work/'site', *(work/'dist').glob('*.whl')], check=True)
    return work

# The workers of pytest-xdist use what the first process built
WORK = Path(os.environ.get('TESTED_WHEEL') or _install_wheel())
os.environ['TESTED_WHEEL'] = str(WORK)
SITE = str(WORK/'site')
sys.path.insert(0, SITE)
os.environ['PYTHONPATH'] = SITE
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ['CUDA_VISIBLE_DEVICES'] = ''  # the same on a machine with GPUs
os.environ['XDG_DATA_HOME'] = str(WORK/os.environ.get('PYTEST_XDIST_WORKER', 'data'))  # where the files that were written and the runs that were started are noted
os.environ['QWEN2VL_NB_TOKENIZED'] = str(WORK/os.environ.get('PYTEST_XDIST_WORKER', 'data')/'tokenized')

PATIENCE = 900 # Seconds. It ends a test that hangs; a machine that has other work to do is never so slow

def until(condition, what='what was waited for'):
    "Wait until something is so, and return it. How long it takes is no part of any test."
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, f'It did not come about: {what}'
        time.sleep(.05)
    return found

def write_clip(path, frames, rate, size, codec='libx264'):
    "A black clip, in the container of the path's ending."
    import av
    from PIL import Image
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=rate, options={'preset': 'ultrafast'} if codec == 'libx264' else {})
        stream.width, stream.height, stream.pix_fmt = *size, 'yuv420p'
        for _ in range(frames): container.mux(stream.encode(av.VideoFrame.from_image(Image.new('RGB', size))))
        container.mux(stream.encode())

# Since transformers 5.3, stage `kto` fails or learns wrong positions (test_newest.py), and `check_recipe` says so
TRANSFORMERS = tuple(map(int, importlib.metadata.version('transformers').split('.')[:2]))
TRAINS_KTO = TRANSFORMERS < (5, 3)

COMMIT = '0123456789abcdef0123456789abcdef01234567'

class HubHandler(BaseHTTPRequestHandler):
    "How a hub of models or data sets answers; a test says what."
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass
    def before_body(self): pass
    def answer(self, status, body=b'', **headers):
        self.send_response(status)
        for name, value in {'Content-Length': len(body), 'X-Repo-Commit': COMMIT, **headers}.items(): self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command == 'HEAD': return
        self.before_body()
        self.wfile.write(body)

def free_ports(n):
    "Ports of this machine that the kernel says are free."
    with ExitStack() as stack: return [stack.enter_context(socket.create_server(('127.0.0.1', 0))).getsockname()[1] for _ in range(n)]

@contextmanager
def serving(command, port, **options):
    "A server that speaks OpenAI's protocol at a port, from when it lists its model until the end of the block; its output is dropped unless the options say otherwise."
    import psutil
    def is_up():
        assert server.poll() is None, command
        try: return urlopen(f'http://127.0.0.1:{port}/v1/models').status == 200
        except OSError: return False
    with subprocess.Popen(command, **dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) | options) as server:
        try:
            until(is_up, 'the server lists its model')
            yield f'http://127.0.0.1:{port}/v1'
        finally:
            for process in (*psutil.Process(server.pid).children(recursive=True), server): process.terminate()

def float32(folder):
    "A model folder, with its weights in float32 from now on."
    from safetensors.torch import load_file, save_file
    weights = {name: w.float() for name, w in load_file(folder/'model.safetensors').items()}
    save_file(weights, folder/'model.safetensors', {'format': 'pt'})
    config = json.loads((folder/'config.json').read_text())
    (folder/'config.json').write_text(json.dumps(config | {'dtype': 'float32'}))
    return folder

@contextmanager
def small_disk(folder, size):
    "A disk of its own at a folder; what it gives makes it larger."
    def mount(options):
        done = subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', folder], capture_output=True, text=True)
        assert not done.returncode, f'A small disk cannot be mounted here: {done.stderr.strip()} {AS_ROOT}'
    folder.mkdir()
    mount(f'size={size}')
    try: yield lambda size: mount(f'remount,size={size}')
    finally: subprocess.run(['umount', '--lazy', folder], check=True)  # a process may still be at work in it, or a failed test have a file of it open

def pytest_addoption(parser): parser.addoption('--soak', action='store_true', help='run what is longer, too')

def pytest_collection_modifyitems(config, items):
    "Tests marked `soak` run under `make soak` only."
    if not config.getoption('--soak'): items[:] = [i for i in items if not i.get_closest_marker('soak')]

def pytest_configure(config): config.addinivalue_line('markers', 'soak: longer; runs under `make soak`')

def pytest_unconfigure(config):
    if 'PYTEST_XDIST_WORKER' not in os.environ: shutil.rmtree(WORK, ignore_errors=True)

@pytest.fixture(scope='session')
def tiny(): return ROOT/'data'/'tiny_qwen2vl'

@pytest.fixture(scope='session')
def data(): return ROOT/'data'

@pytest.fixture
def tiny_fp32(tiny, tmp_path): return float32(Path(shutil.copytree(tiny, tmp_path/'tiny fp32')))

@pytest.fixture
def few_steps(tiny, data, tmp_path):
    "A training recipe that takes seconds on a CPU; keywords change it."
    from qwen2vl_nb.recipe import train_recipe
    def make(**changes):
        return train_recipe(tiny, 'car_item', changes.pop('output_dir', tmp_path/'run'), **dict(dataset_dir=str(data), max_steps=4, max_samples=16, logging_steps=1,
            bf16=None, use_cpu=True, gradient_accumulation_steps=1, preprocessing_num_workers=None) | changes)
    return make

@pytest.fixture(scope='session')
def plugin():
    "LLaMA-Factory's own steps on pictures and clips."
    from llamafactory.data.mm_plugin import get_mm_plugin
    return get_mm_plugin(name='qwen2_vl', image_token='<|image_pad|>', video_token='<|video_pad|>')

@pytest.fixture(scope='session')
def processor(tiny):
    from transformers import AutoProcessor
    return AutoProcessor.from_pretrained(tiny)

@pytest.fixture(scope='session')
def factory(tiny):
    "LLaMA-Factory's own loading: `load` gives the rows of a registered data set as its converter makes them, `encode` as a stage trains on them, `prepare` batches of tensors."
    from types import SimpleNamespace
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_template_and_fix_tokenizer
    from llamafactory.data.loader import _get_merged_dataset, get_dataset
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer
    def arguments(folder, name, **changes):
        recipe = dict(model_name_or_path=str(tiny), stage='sft', do_train=True, dataset=name, dataset_dir=str(folder), template='qwen2_vl', overwrite_cache=True,
                      output_dir=str(Path(folder)/'out'), use_cpu=True, report_to='none', cache_dir=str(Path(folder)/'.cache'))
        return get_train_args(recipe | changes)[:3]
    def load(folder, name, stage='sft', **changes): return list(_get_merged_dataset([name], *arguments(folder, name, **changes), stage))
    def encode(folder, name, stage, **changes):
        "(rows of token ids and labels, the tokenizer)"
        model_args, data_args, training_args = arguments(folder, name, **changes)
        loaded = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(loaded['tokenizer'], data_args)
        return list(get_dataset(template, model_args, data_args, training_args, stage, **loaded)['train_dataset']), loaded['tokenizer']
    def prepare(folder, name, **changes):
        "(token ids of each row, batches of two as the model gets them)"
        model_args, data_args, training_args = arguments(folder, name, **changes)
        loaded = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(loaded['tokenizer'], data_args)
        rows = get_dataset(template, model_args, data_args, training_args, 'sft', **loaded)['train_dataset']
        collate = SFTDataCollatorWith4DAttentionMask(template=template, model=None, **loaded)
        return rows['input_ids'], [collate([rows[i] for i in range(start, min(start+2, len(rows)))]) for start in range(0, len(rows), 2)]
    return SimpleNamespace(load=load, encode=encode, prepare=prepare)

@pytest.fixture(scope='session')
def chromium():
    "The browser that `make browser` finds or installs."
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    return found or pytest.fail(f'There is no browser here, under none of the names {", ".join(BROWSERS)}: `make browser` installs one.')

@pytest.fixture
def page(chromium):
    "A page of a headless browser; what the last one showed is kept where a test fails."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        page = browser.new_page(viewport=dict(width=1300, height=1100))
        page.set_default_timeout(PATIENCE*1000)
        KEPT.mkdir(exist_ok=True)
        yield page
        page.screenshot(path=KEPT/'last.png')
        browser.close()
