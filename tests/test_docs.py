"The pages of the documentation site, as far as they can be tested without the tools that build it."
import importlib.util, re, subprocess, sys

import pytest

import qwen2vl_nb
from conftest import ROOT

def _generate():
    spec = importlib.util.spec_from_file_location('generate', ROOT/'docs'/'generate.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

generate = _generate()
PAGES = sorted(p for p in (ROOT/'docs').rglob('*.md') if '_build' not in p.parts)
HOWTO = [p for p in PAGES if p.parent.name == 'howto']

def test_every_public_name_is_on_one_page_of_the_reference():
    listed = [name for page in generate.PAGES for name in generate.names_of(page)]
    assert sorted(listed) == sorted(qwen2vl_nb.__all__)

@pytest.mark.parametrize('name', qwen2vl_nb.__all__)
def test_an_entry_has_the_comment_of_each_parameter(name):
    entry = generate.described(name)
    documented = re.findall(r'^:param (\S+): (.+)$', entry, re.M)
    shown = re.findall(r'^ {4}(\S.*)$', getattr(qwen2vl_nb, name).__doc__ or '', re.M) if callable(getattr(qwen2vl_nb, name)) else []
    assert {text for _, text in documented} <= {*shown} or 'class' in entry
    assert len(documented) >= len(re.findall(r'^\**\w+ : ', getattr(qwen2vl_nb, name).__doc__ or '', re.M))

@pytest.mark.parametrize('page', PAGES, ids=lambda p: f'{p.parent.name}/{p.name}')
def test_links_lead_to_files_that_exist(page):
    for whole, target, _ in generate.links(page.read_text(encoding='utf-8')):
        assert not target or (page.parent/target).exists(), whole

def test_every_page_is_in_a_table_of_contents():
    for page in PAGES:
        if page.name == 'index.md': continue
        assert f'\n{page.stem}\n' in (page.parent/'index.md').read_text(encoding='utf-8')
    tutorials = {p.stem for p in (ROOT/'nbs'/'tutorials').iterdir() if p.suffix in ('.ipynb', '.md')}
    benchmarks = {p.stem for p in (ROOT/'nbs'/'benchmarks').glob('*.ipynb')}
    for name, stems in (('tutorials', tutorials), ('benchmarks', benchmarks)):
        listed = (ROOT/'docs'/name/'index.md').read_text(encoding='utf-8').partition(':hidden:')[2].split()
        assert {*listed} - {'```'} == stems

def test_links_of_notebooks_lead_to_their_places_on_the_site():
    moved = generate.relinked("[a](../03_model.ipynb#The-model's-dimensions) [b](../tutorials/slurm.md)", 'nbs/data/15_boxes.ipynb')
    assert moved == '[a](../../notebooks/03_model.ipynb#the-models-dimensions) [b](../../tutorials/slurm.md)'
    generate.relinked('[a](gone.ipynb)', 'nbs/data/15_boxes.ipynb')
    assert generate.broken.pop() == 'nbs/data/15_boxes.ipynb: (gone.ipynb)'

def test_examples_are_shown_with_their_outputs():
    for name in ('read_samples', 'split_samples', 'zero_table', 'score'):
        assert all(cell['outputs'] for cell in generate.examples(name)) and generate.examples(name)

def _code(page): return re.findall(r'^```python\n(.*?)^```', page.read_text(encoding='utf-8'), re.M | re.S)

@pytest.mark.parametrize('page', HOWTO, ids=lambda p: p.stem)
def test_code_of_how_to_pages_compiles_and_uses_public_names(page):
    names = {}
    exec('from qwen2vl_nb.all import *', names)
    for block in _code(page): compile(block, page.name, 'exec')
    called = re.findall(r'(?<![.\w`])(\w+_\w+)\(', '\n'.join(re.findall(r'^```py(?:thon)?\n(.*?)^```', page.read_text(encoding='utf-8'), re.M | re.S)))
    assert not {*called} - {*names}

@pytest.mark.soak
@pytest.mark.parametrize('page', HOWTO, ids=lambda p: p.stem)
def test_code_of_how_to_pages_runs(page, tmp_path):
    "In a folder that has the data of a clone; blocks marked `py` need other machines, those marked `python` run."
    (tmp_path/'data').symlink_to(ROOT/'data')
    (tmp_path/'runs'/'howto').mkdir(parents=True)
    (tmp_path/'page.py').write_text('\n'.join(_code(page)), encoding='utf-8')
    done = subprocess.run([sys.executable, 'page.py'], cwd=tmp_path, capture_output=True, text=True)
    assert not done.returncode, done.stderr
