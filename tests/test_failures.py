"""Runs that fail, each provoked for real, and what `run.failure` says of them.

All cases are started before the first is looked at, two at a time; each is then a test of its own, so one that is wrong does not hide the others."""
import json, os, re, shutil, socket, signal, subprocess, sys, time, venv
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from PIL import Image

from conftest import free_ports, small_disk, until
from qwen2vl_nb.run import start as run_module
from qwen2vl_nb.checkpoint import checkpoints, is_whole
from qwen2vl_nb.run.folder import state_or_empty
from qwen2vl_nb.stack import GiB
from qwen2vl_nb.recipe import predict_recipe, save_recipe, train_recipe
from qwen2vl_nb.run.start import Run, attach, launch
from qwen2vl_nb.findings import Finding
from qwen2vl_nb.zero import zero_config

def over(run):
    "The run, when it has ended; if that takes too long it is stopped."
    try: until(lambda: not run.is_running)
    finally:
        if run.is_running: run.stop(patience=0)
    return run

def failure_of(run):
    "What a run says of its failure, when it has ended."
    assert over(run).status == 'failed', run
    return run.failure

def trains(run):
    "Whether a run is at its steps, or over."
    return (run.output_dir/'progress.json').exists() or not run.is_running

def rank(run, number=0):
    "The process of a rank, as soon as it is there."
    found = []
    def look():
        for p in psutil.Process(state_or_empty(run, 'waiter.json')['pid']).children(recursive=True):
            try: is_rank = p.environ().get('RANK', '0') == str(number) and p.cmdline()[-2] == 'run.rank' and '--nproc-per-node' not in p.cmdline()
            except (psutil.Error, IndexError): continue
            if is_rank: found.append(p)
        return found
    until(look)
    return found[0]

class Room:
    "Where a case takes place: a folder of its own, with a recipe, and with data and a model to spoil."
    def __init__(self, folder, tiny, data): self.folder, self.tiny, self.data = folder, tiny, data

    def start(self, nproc=None, env=None, python=None, nnodes=1, master=None, **changes):
        "Start a training of a few steps, whatever the checks say of it."
        model, dataset, out = (changes.pop(*k) for k in (('model', self.tiny), ('dataset', 'car_item'), ('output_dir', self.folder/'run')))
        short = dict(dataset_dir=str(self.data), max_steps=4, max_samples=16, logging_steps=1, gradient_accumulation_steps=1,
                     bf16=None, use_cpu=None if 'deepspeed' in changes else True, preprocessing_num_workers=None)
        return launch(train_recipe(model, dataset, out, **short | changes), nproc=nproc, nnodes=nnodes, master=master, env=env, python=python, force=True)

    def fail(self, *args, **kwargs): return failure_of(self.start(*args, **kwargs))

    def rows(self, rows, **entry):
        "A data set with sixteen pictures that may be spoilt: what a recipe says of it."
        shutil.copytree(self.data/'car_item'/'images', self.folder/'data'/'images', ignore=lambda folder, names: sorted(names)[20:])
        (self.folder/'data'/'rows.json').write_text(rows if isinstance(rows, str) else json.dumps(rows))
        columns = {'prompt': 'instruction', 'query': 'input', 'response': 'output', 'images': 'images'}
        (self.folder/'data'/'dataset_info.json').write_text(json.dumps({'rows': {'file_name': 'rows.json', 'columns': columns} | entry}))
        return {'dataset': 'rows', 'dataset_dir': str(self.folder/'data')}

    def picture(self, i): return self.folder/'data'/'images'/f'{i:04}.png'

    def model(self):
        "A copy of the model."
        return Path(shutil.copytree(self.tiny, self.folder/'model'))

good_rows = [{'instruction': '<image>What is this?', 'input': '', 'output': 'A car.', 'images': [f'images/{i:04}.png']} for i in range(1, 17)]

cases = {}

def case(where, *what, cure, soak=False):
    "A case, and patterns for its finding: rank and frame, words and exception; and a part of its cure."
    def add(provoke):
        cases[provoke.__name__] = provoke, where, what, cure, soak
        return provoke
    return add

# Signals

@case('^rank 0$', 'killed by SIGKILL', cure='resume()')
def killed(room):
    run = room.start()
    rank(run).kill()
    return failure_of(run)

@case('^rank 1$', 'killed by SIGKILL', cure='resume()')
def killed_rank(room):
    "The other rank says then, at length, that a connection was closed."
    run = room.start(2, deepspeed=zero_config('z0'), max_steps=100_000)
    until(lambda: trains(run))
    rank(run, 1).kill()
    return failure_of(run)

@case('^rank 1$', 'ended by SIGSEGV', cure='Compiled code crashed')
def segfault_of_a_rank(room):
    run = room.start(2, deepspeed=zero_config('z0'))
    rank(run, 1).send_signal(signal.SIGSEGV)
    return failure_of(run)

@case('^torchrun$', 'killed by SIGKILL', cure='resume()')
def killed_torchrun(room):
    "Nothing is left of its ranks."
    run = room.start(2, deepspeed=zero_config('z0'))
    orphan = rank(run, 1)
    psutil.Process(state_or_empty(run, 'waiter.json')['child']).kill()
    found = failure_of(run)
    assert not orphan.is_running()
    return found

@case('^rank 0$', 'ended by SIGTERM', cure='Something else ended it')
def terminated(room):
    run = room.start()
    rank(run).terminate()
    return failure_of(run)

@case(r'^run.log, api.py:\d+ in ', 'torchrun was asked to end. torch.*SignalException: .*got signal: 15', cure='Something else ended it')
def terminated_torchrun(room):
    run = room.start(2, deepspeed=zero_config('z0'))
    rank(run, 1)
    psutil.Process(state_or_empty(run, 'waiter.json')['child']).terminate()
    return failure_of(run)

# Recipes

@case(r'^rank 0, generic.py:\d+ in _missing_', 'refuses the recipe. ValueError: cosinus is not a valid SchedulerType', cure='check_recipe')
def scheduler(room): return room.fail(lr_scheduler_type='cosinus')

@case(r'^rank 0, generic.py:\d+ in _missing_', 'refuses the recipe. ValueError: adamw_tork is not a valid OptimizerNames', cure='check_recipe', soak=True)
def optimizer(room): return room.fail(optim='adamw_tork')

@case(r'^rank 0, hf_argparser.py:\d+ in parse_dict', "refuses the recipe. ValueError: .*HfArgumentParser: .*'learning_rat'", cure='check_recipe', soak=True)
def argument(room): return room.fail(learning_rat=1e-4)

@case(r'^rank 0, training_args.py:\d+ in __post_init__', "no GPU for bf16. ValueError: Your setup doesn't support bf16", cure='use_cpu')
def bf16_on_the_cpu(room): return room.fail(bf16=True, use_cpu=None)

@case(r'^rank 0, deepspeed.py:\d+ in trainer_config_finalize', 'contradict each other. ValueError: .*train_batch_size=7', cure='zero_config')
def batch_sizes_contradict(room): return room.fail(deepspeed=zero_config('z2') | {'train_batch_size': 7})

@case(r'^rank [01], config.py:\d+ in _batch_assertion', 'Check batch related parameters', cure='')
def use_cpu_with_zero3(room): return room.fail(2, deepspeed=zero_config('z3'), use_cpu=True)

@case(r'^rank 0, deepspeed.py:\d+ in __init__', 'no such ZeRO config. ValueError: .*ds_z9.json', cure='zero_config', soak=True)
def zero_file_missing(room): return room.fail(deepspeed='ds_z9.json')

@case(r'^rank 0, parser.py:\d+ in ', 'ZeRO-3 cannot generate. ValueError: ', cure='Remove the deepspeed key')
def zero3_generates(room):
    recipe = predict_recipe(room.tiny, 'car_item', room.folder/'run', dataset_dir=str(room.data), max_samples=4, deepspeed=zero_config('z3'))
    return failure_of(launch(recipe, nproc=1, force=True))

# Data

@case(r'^rank 0, parser.py:\d+ in get_dataset_list', 'not registered. ValueError: Undefined dataset car_itme', cure='Registry')
def not_registered(room): return room.fail(dataset='car_itme')

@case(r'^rank 0, parser.py:\d+ in get_dataset_list', 'not registered. ValueError: Cannot open .*dataset_info.json', cure='Registry', soak=True)
def no_registry(room): return room.fail(dataset_dir=str(room.folder))

@case(r'^rank 0, loader.py:\d+ in _load_single_dataset', 'not there. ValueError: File .*rows.json not found', cure='file_name', soak=True)
def no_data_file(room):
    changes = room.rows(good_rows)
    (room.folder/'data'/'rows.json').unlink()
    return room.fail(**changes)

@case(r'^rank 0, \S+:\d+ in ', 'not JSON. pyarrow.lib.ArrowInvalid: JSON parse error', cure='read_samples')
def not_json(room): return room.fail(**room.rows('[{"instruction": "<image>What'))

@case(r'^rank 0, loader.py:\d+ in _get_preprocessed_dataset', 'dropped every row. RuntimeError: Cannot find valid samples', cure='check_samples')
def no_valid_row(room):
    tags = {'role_tag': 'role', 'content_tag': 'content', 'user_tag': 'user', 'assistant_tag': 'assistant'}
    rows = [{'messages': [{'role': 'assistant', 'content': 'A car.'}, {'role': 'user', 'content': 'What?'}]}]*3
    return room.fail(**room.rows(rows, formatting='sharegpt', columns={'messages': 'messages'}, tags=tags))

@case(r'^rank 0, Image.py:\d+ in open', "missing. FileNotFoundError: .*'images/0007.png'", cure='check_samples')
def picture_missing(room):
    changes = room.rows(good_rows)
    room.picture(7).unlink()
    return room.fail(**changes)

@case(r'^rank 0, _binary.py:\d+ in ', 'A picture is broken. struct.error: ', cure='check_samples')
def picture_torn(room):
    changes = room.rows(good_rows)
    room.picture(7).write_bytes(room.picture(7).read_bytes()[:-200])
    return room.fail(**changes)

@case(r'^rank 0, Image.py:\d+ in open', 'A picture is broken. PIL.UnidentifiedImageError: cannot identify .*0007.png', cure='check_samples', soak=True)
def picture_is_a_web_page(room):
    changes = room.rows(good_rows)
    room.picture(7).write_text('<html>404</html>')
    return room.fail(**changes)

@case(r'^rank 0, mm_plugin.py:\d+ in _validate_messages', 'does not have as many tags as pictures.* ValueError: The number of images does not match', cure='check_samples')
def tag_without_picture_in_a_worker(room):
    "Two worker processes of `datasets`."
    rows = [row | {'instruction': '<image>'*(i == 9) + row['instruction']} for i,row in enumerate(good_rows)]
    return room.fail(**room.rows(rows), preprocessing_num_workers=2)

@case(r'^rank 0, Image.py:\d+ in open', r'missing. FileNotFoundError: \[Errno 2\] [^\n]*\.png.$', cure='moved after the launch', soak=True)
def pictures_gone_in_a_loader(room):
    "In a worker process of `DataLoader`, when training has begun."
    run = room.start(**room.rows(good_rows), max_steps=100_000, dataloader_num_workers=1)
    until(lambda: trains(run))
    shutil.rmtree(room.folder/'data'/'images')
    return failure_of(run)

def worker_of(process):
    "A worker process of a rank, as soon as it is there: a fork of it."
    until(lambda: [p for p in process.children() if p.cmdline() == process.cmdline()])
    return next(p for p in process.children() if p.cmdline() == process.cmdline())

@case(r'^rank 0, ', 'worker process .* was killed. RuntimeError: DataLoader worker .* killed by signal: Killed', cure='dataloader_num_workers', soak=True)
def killed_loader(room):
    run = room.start(max_steps=100_000, dataloader_num_workers=1)
    until(lambda: trains(run))
    worker_of(rank(run)).kill()
    return failure_of(run)

@case(r'^rank 0, modeling_qwen2_vl.py:\d+ in get_placeholder_mask', 'cut in two by cutoff_len. ValueError: Image features and image tokens do not match', cure='Raise cutoff_len')
def picture_cut_in_two(room): return room.fail(cutoff_len=16)

# Model

@case(r'^rank 0, modeling_utils.py:\d+ in from_pretrained', 'incomplete. .*SafetensorError: .*incomplete metadata', cure='Download')
def weights_torn(room):
    file = room.model()/'model.safetensors'
    file.write_bytes(file.read_bytes()[:-1000])
    return room.fail(model=file.parent)

@case(r'^rank 0, modeling_utils.py:\d+ in ', 'incomplete. OSError: Error no file named .*model.safetensors', cure='check_recipe', soak=True)
def weights_missing(room):
    (room.model()/'model.safetensors').unlink()
    return room.fail(model=room.folder/'model')

@case(r'^rank 0, configuration_auto.py:\d+ in from_pretrained', 'incomplete. ValueError: Unrecognized model in .* …$', cure='check_recipe', soak=True)
def config_missing(room):
    (room.model()/'config.json').unlink()
    return room.fail(model=room.folder/'model')

@case(r'^rank 0, configuration_auto.py:\d+ in from_pretrained', 'no Qwen2-VL. ValueError: .*qwen9_vl', cure='2B, 7B or 72B', soak=True)
def config_of_another_model(room):
    file = room.model()/'config.json'
    file.write_text(file.read_text().replace('"qwen2_vl"', '"qwen9_vl"'))
    return room.fail(model=file.parent)

@case(r'^rank 0, tokenization_auto.py:\d+ in from_pretrained', 'another version of transformers.* ValueError: Tokenizer class TokenizersBackend', cure='as they were published')
def tokenizer_of_a_newer_version(room):
    file = room.model()/'tokenizer_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | {'tokenizer_class': 'TokenizersBackend'}))
    return room.fail(model=file.parent)

@case(r'^rank 0, config.py:\d+ in ', "no adapter in this folder. ValueError: Can't find 'adapter_config.json'", cure='LoRA run', soak=True)
def no_adapter(room): return room.fail(adapter_name_or_path=str(room.folder/'adapter'))

# Environment

def other_version(room, name, version):
    "The environment as it would be if another version of a package were installed: LLaMA-Factory goes by the metadata."
    info = room.folder/'other'/f'{name}-{version}.dist-info'
    info.mkdir(parents=True)
    (info/'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
    return room.fail(env={'PYTHONPATH': os.pathsep.join([str(info.parent), os.environ['PYTHONPATH']])})

@case(r'^rank 0, loader.py:\d+ in load_model', 'do not work together. ValueError: Unsupported torch version .*Conv3D', cure='check_stack')
def torch_2_9(room): return other_version(room, 'torch', '2.9.1')

@case(r'^rank 0, versions.py:\d+ in ', 'do not work together. ImportError: transformers.* but found transformers==4.40.0', cure='check_stack')
def old_transformers(room): return other_version(room, 'transformers', '4.40.0')

@case(r'^rank 0, rank.py:\d+ in work', "missing. ModuleNotFoundError: No module named 'torch'", cure='python=')
def no_llamafactory(room):
    venv.create(room.folder/'bare', symlinks=True)
    return room.fail(python=str(room.folder/'bare'/'bin'/'python'))

@case(r'^rank 0, \S+:\d+ in ', "own memory ran out. .*([Mm]emory)", cure='Start fewer processes')
def host_memory(room):
    "Two pictures of two million pixels, and from the first step on no room for one."
    changes = room.rows(good_rows[:2])
    for i in (1, 2): Image.new('RGB', (1400, 1400), 'red').save(room.picture(i))
    run = room.start(**changes, max_steps=100, cutoff_len=4000, image_max_pixels=2_000_000)
    until(lambda: trains(run))
    p = rank(run)
    p.rlimit(psutil.RLIMIT_AS, (p.memory_info().vms + 2**20,)*2)
    return failure_of(run)

# Several machines

@contextmanager
def taken_port():
    with socket.socket() as s:
        s.bind(('', 0))
        s.listen()
        yield s.getsockname()[1]

@case(r'^run.log, static_tcp_rendezvous.py:\d+ in next_rendezvous', 'port is taken. torch.distributed.DistNetworkError: .*EADDRINUSE', cure='another port')
def port_taken(room):
    with taken_port() as port: return room.fail(nnodes=2, master=f'127.0.0.1:{port}')

@case(r'^run.log, static_tcp_rendezvous.py:\d+ in next_rendezvous', 'did not find each other. torch.distributed.DistStoreError: .*1/2 clients joined', cure='on all of them')
def other_machine_missing(room):
    return room.fail(nnodes=2, master=f'127.0.0.1:{free_ports(1)[0]}', env={'PET_RDZV_CONF': 'timeout=5'})

@case(r'^run.log, dynamic_rendezvous.py:\d+ in ', 'did not find each other. torch.*RendezvousTimeoutError', cure='on all of them', soak=True)
def other_machine_missing_elastic(room):
    return room.fail(nnodes=2, master=f'127.0.0.1:{free_ports(1)[0]}', env={'RDZV_ID': 'cars', 'PET_RDZV_CONF': 'join_timeout=5'})

@case(r'^rank [01], ', 'stopped answering. RuntimeError: .*[Tt]imed out', cure='ddp_timeout', soak=True)
def rank_stands_still(room):
    run = room.start(2, deepspeed=zero_config('z0'), max_steps=100_000, ddp_timeout=10)
    until(lambda: run.progress.step or not run.is_running)
    raised = lambda: any(run.output_dir.glob('failure-*.json')) or not run.is_running
    for k in range(30):  # at some moments gloo waits without a limit; then it is tried at another one
        still = rank(run, (k + 1) % 2)
        still.suspend()
        end = time.monotonic() + 20  # twice ddp_timeout
        while not raised() and time.monotonic() < end: time.sleep(.5)
        if raised(): break
        still.resume()
        time.sleep(1)
    return failure_of(run)

# Checkpoints

def full_disk(room, size):
    "The second checkpoint finds no room; the first is as it was, and when there is room the run goes on from it."
    disk = room.folder/'disk'
    with small_disk(disk, size) as enlarge:
        run = room.start(output_dir=disk/'run', save_steps=2)
        found = failure_of(run)
        first, second = checkpoints(run)
        assert is_whole(first) and not is_whole(second)
        before = {p.name: p.read_bytes() for p in first.iterdir()}
        enlarge('64m')
        assert over(run.resume()).status == 'done', run.failure
        assert before == {p.name: p.read_bytes() for p in first.iterdir()}
        assert not [*disk.glob('run/torn-*')]
        assert 'Continuing training from checkpoint' in run.log() or 'global step 2' in run.log()
    return found

@case(r'^rank 0, \S+:\d+ in ', 'The disk is full. RuntimeError: ', cure='Make room')
def disk_full(room): return full_disk(room, '2m')

@case(r'^rank 0, \S+:\d+ in ', 'The disk is full. .*No space left', cure='Make room', soak=True)
def disk_full_in_the_weights(room): return full_disk(room, '1500k')

@case(r'^rank 0, serialization.py:\d+ in __init__', 'checkpoint file is incomplete. RuntimeError: PytorchStreamReader', cure='resume()')
def checkpoint_torn(room):
    "LLaMA-Factory takes it and dies of it; `resume` passes it over."
    run = room.start(max_steps=2, save_steps=1)
    assert over(run).status == 'done'
    for name in ('all_results.json', 'train_results.json', 'adapter_model.safetensors'): (run.output_dir/name).unlink()
    file = run.output_dir/'checkpoint-2'/'optimizer.pt'
    file.write_bytes(file.read_bytes()[:-1000])
    run = room.start()
    found = failure_of(run)
    assert over(run.resume()).status == 'done', run.failure
    assert is_whole(run.output_dir/'checkpoint-2'), 'written again: the trainer goes on with the save_steps of the checkpoint that it resumes from'
    assert not [*run.output_dir.glob('torn-*')]
    return found

# Last, since the kernel counts the processes that it has killed on the whole machine

@contextmanager
def memory_group(most):
    "A group of processes that together get so many bytes; a file to write a pid to."
    for root, limit in ((Path('/sys/fs/cgroup/memory'), 'memory.limit_in_bytes'), (Path('/sys/fs/cgroup'), 'memory.max')):
        if (root/'cgroup.procs').exists(): break
    group = root/f'qwen2vl-nb-{os.getpid()}'
    try:
        group.mkdir()
        (group/limit).write_text(str(most))
    except OSError as e:
        if group.is_dir(): group.rmdir()
        pytest.fail(f'No group of processes with a limit of memory can be made here ({e}): this test alone needs to be run by root, with a writable /sys/fs/cgroup.')
    try: yield group/'cgroup.procs'
    finally: group.rmdir()

@case('^rank 0$', 'The kernel killed the process', cure='Start fewer processes')
def killed_by_the_kernel(room):
    "In a group that may take 200 MB."
    with memory_group(200_000_000) as group:
        python = room.folder/'python'
        python.write_text(f'#!/bin/sh\necho $$ > {group}\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        return room.fail(python=python)

@pytest.fixture(scope='session')
def provoked(request, tmp_path_factory, tiny, data):
    "The findings of the cases that were asked for: each is there, or will be."
    names = [item.callspec.params['name'] for item in request.session.items if item.originalname == 'test_failure']
    pool = ThreadPoolExecutor(2)
    yield {name: pool.submit(cases[name][0], Room(tmp_path_factory.mktemp(name), tiny, data)) for name in names}
    pool.shutdown(cancel_futures=True)

@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('name', [pytest.param(name, marks=[pytest.mark.soak]*c[-1]) for name,c in cases.items()])
def test_failure(provoked, name):
    found, (_, where, what, cure, _) = provoked[name].result(), cases[name]
    assert isinstance(found, Finding) and re.search(where, found.where), found
    assert all(re.search(words, found.what, re.S) for words in what), found
    assert cure in found.cure, found

def test_data_found_bad_beside_the_start(tmp_path, tiny, data, monkeypatch):
    "The checks that take long have not ended when the run starts, and end it then."
    monkeypatch.setattr(run_module, '_check_seconds', 0)
    room = Room(tmp_path, tiny, data)
    changes = room.rows(good_rows)
    room.picture(7).unlink()
    run = launch(train_recipe(tiny, output_dir=tmp_path/'run', bf16=None, use_cpu=True, **changes))
    found = failure_of(run)
    assert found.where == 'rows' and '1 row(s) have pictures or clips that cannot be read, or are too small; the first is row 6' in found.what and 'check_samples' in found.cure

def test_two_launches_at_the_same_moment(tmp_path, few_steps):
    "From two processes into one folder: exactly one starts."
    save_recipe(few_steps(max_steps=100_000), tmp_path/'recipe.yaml')
    code = f"""import os, time
from qwen2vl_nb.recipe import load_recipe
from qwen2vl_nb.run.start import launch
recipe = load_recipe({str(tmp_path/"recipe.yaml")!r})
open({str(tmp_path)!r} + f"/ready-{{os.getpid()}}", "w").close()
while not os.path.exists({str(tmp_path/"go")!r}): time.sleep(.001)
launch(recipe)"""
    both = [subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    until(lambda: len([*tmp_path.glob('ready-*')]) == 2)
    (tmp_path/'go').touch()
    said = [p.communicate()[1] for p in both]
    try:
        assert sorted(p.returncode for p in both) == [0, 1], said
        assert 'RuntimeError: A run is in progress in' in ''.join(said)
        assert attach(tmp_path/'run').is_running
    finally: attach(tmp_path/'run').stop(patience=0)

def test_a_port_that_is_taken_is_named_before_the_start(few_steps):
    recipe = few_steps(deepspeed=zero_config('z2'), use_cpu=None)
    with taken_port() as port, pytest.raises(ValueError, match=f'Port {port} is taken on this machine'): launch(recipe, nnodes=2, master=f'127.0.0.1:{port}')
    assert not Path(recipe['output_dir']).exists()

# As torch says it; without a GPU it can't be provoked
full_gpu = {'rank': 1, 'time': 1., 'type': 'torch.OutOfMemoryError', 'file': '/env/torch/nn/functional.py', 'line': 2, 'function': 'linear', 'traceback': '',
    'message': 'CUDA out of memory. Tried to allocate 1.04 GiB. GPU 1 has a total capacity of 79.11 GiB of which 512.00 MiB is free. Including non-PyTorch '
               'memory, this process has 78.60 GiB memory in use. Of the allocated memory 76.10 GiB is allocated by PyTorch, and 1.20 GiB is reserved by '
               'PyTorch but unallocated. If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid '
               'fragmentation.  See documentation for Memory Management  (https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)'}

@pytest.mark.parametrize('now,gpus,gib,cure', [
    ('z2', 2, 80, 'z3 fits'), ('z2', 4, 80, 'z3 fits'), ('z3', 4, 80, 'z2_offload fits'), (None, 2, 80, 'z3 fits'), ('z3_offload', 2, 80, 'No config that needs less memory fits without other changes; `what_would_fit(run.recipe, 2, 80)`')])
def test_a_gpu_out_of_memory(tmp_path, data, now, gpus, gib, cure):
    "The predicted table, and the next config that fits; never the one with which it ran out."
    recipe = train_recipe('Qwen/Qwen2-VL-7B-Instruct', 'car_item', tmp_path, dataset_dir=str(data), finetuning_type='full', deepspeed=now and zero_config(now))
    save_recipe(recipe, tmp_path/'recipe.yaml')
    for name, value in {'ended': {'returncode': 1, 'asked': False}, 'run': {'gpus': [{'total': gib*GiB}]*gpus}, 'failure-1': full_gpu}.items():
        (tmp_path/f'{name}.json').write_text(json.dumps(value))
    (tmp_path/'run.log').write_text('')
    found = Run(tmp_path).failure
    assert found.where == 'rank 1, functional.py:2 in linear'
    assert found.what.startswith('A GPU ran out of memory. torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.04 GiB.')
    assert cure in found.cure and f'{gpus} GPUs of {gib} GiB' in found.cure and 'z3_offload ' in found.cure
