"Children, and their children, under an interpreter that has torch but not this package."
import os, shutil, subprocess, sysconfig, venv
from pathlib import Path

import pytest

import qwen2vl_nb

@pytest.fixture(scope='module')
def python(tmp_path_factory):
    "The interpreter of an environment with the packages of this one, without those that are installed for development."
    environment = tmp_path_factory.mktemp('another environment')
    venv.create(environment)
    (next(environment.glob('lib/python*/site-packages'))/'stack.pth').write_text(sysconfig.get_path('purelib'))
    return environment/'bin'/'python'

@pytest.fixture
def start(python, tmp_path):
    "Start a module that is put into a copy of the package; what it prints, as lines."
    package = shutil.copytree(Path(qwen2vl_nb.__file__).parent, tmp_path/'elsewhere'/'qwen2vl_nb')
    def start(code, *arguments):
        (package/'probe.py').write_text(code)
        env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'PYTHONSAFEPATH')}
        done = subprocess.run([python, package/'boot.py', 'probe', *arguments], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert not done.returncode, done.stderr
        return done.stdout.splitlines()
    return start

def test_the_environment_does_not_have_the_package(python, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    assert 'No module named' in subprocess.run([python, '-P', '-c', 'import qwen2vl_nb'], env=env, cwd=tmp_path, capture_output=True, text=True).stderr

def test_a_child_imports_its_siblings_and_nothing_that_lies_beside_it(start):
    said = start("""
import importlib.util, sys
from .files import json_or
from . import hidden

def main():
    print(sys.argv[1:], json_or.__module__, hidden.__name__, __package__)
    print([name for name in ('files', 'data', 'boot', 'qwen2vl_nb_beside') if importlib.util.find_spec(name)])
""", 'a b', '--c')
    assert said == ["['a b', '--c'] qwen2vl_nb.files qwen2vl_nb.hidden qwen2vl_nb", '[]']

@pytest.mark.parametrize('how', ['fork', 'spawn', 'forkserver'])
def test_the_workers_of_a_data_loader_import_the_package(how, start):
    said = start("""
import sys
from pathlib import Path
from torch.utils.data import DataLoader, Dataset
from .hidden import mask

class Rows(Dataset):
    def __len__(self): return 4
    def __getitem__(self, i):
        from .files import json_or
        return mask(f'http://me:pw@{i}') + json_or('', 'none.json')

def main(): print(*DataLoader(Rows(), batch_size=None, num_workers=2, multiprocessing_context=sys.argv[1]))
""", how)
    assert said == [' '.join(f'http://***@{i}' for i in range(4))]
