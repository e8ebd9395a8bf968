"The pages of the documentation site, as far as they can be tested without the tools that build it."
import ast, importlib.util, inspect, json, re, subprocess, sys

import numpy as np
import pytest
from PIL import Image

import qwen2vl_nb
from conftest import ROOT

def _script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT/'docs'/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

generate = _script('generate')
PAGES = sorted(p for p in (ROOT/'docs').rglob('*.md') if '_build' not in p.parts)
HOWTO = [p for p in PAGES if p.parent.name == 'howto' and p.name != 'index.md']

def test_every_public_name_is_on_one_page_of_the_reference():
    listed = [name for page in generate.PAGES for name in generate.names_of(page)]
    assert sorted(listed) == sorted(qwen2vl_nb.__all__)

@pytest.mark.parametrize('name', [name for name in qwen2vl_nb.__all__ if callable(getattr(qwen2vl_nb, name))])
def test_an_entry_has_the_comment_of_each_parameter(name):
    thing = getattr(qwen2vl_nb, name)
    commented = dict(re.findall(r'^:param (\S+): (\S.*)$', generate.fields(thing.__doc__), re.M))
    stars = {inspect.Parameter.VAR_POSITIONAL: r'\*', inspect.Parameter.VAR_KEYWORD: r'\*\*'}
    assert {*commented} == {stars.get(p.kind, '') + p.name for p in inspect.signature(thing).parameters.values()}
    assert generate.fields(thing.__doc__) in generate.described(name)

@pytest.mark.parametrize('page', PAGES, ids=lambda p: f'{p.parent.name}/{p.name}')
def test_links_lead_to_files_that_exist(page):
    for whole, target, _ in generate.links(page.read_text(encoding='utf-8')):
        assert not target or (page.parent/target).exists(), whole

def test_every_how_to_page_is_listed():
    listed = (ROOT/'docs'/'howto'/'index.md').read_text(encoding='utf-8')
    for page in HOWTO:
        assert f']({page.name})' in listed and f'\n{page.stem}\n' in listed

def test_every_tutorial_is_listed_on_the_site_and_how_to_pages_in_the_readme():
    listed, readme = (ROOT/'docs'/'tutorials'/'index.md').read_text(encoding='utf-8'), (ROOT/'README.md').read_text(encoding='utf-8')
    for path in (ROOT/'nbs'/'tutorials').iterdir():
        if path.suffix in ('.md', '.ipynb') and not path.name.startswith('.'): assert f'(../../nbs/tutorials/{path.name})' in listed
    for page in HOWTO:
        if page.stem != 'folders': assert f'](docs/howto/{page.name})' in readme  # to which the page on safety leads

def test_the_search_shows_how_to_pages_first(page):
    "By Sphinx's scores of pages with a word in their text, and of a method of that name."
    code = (ROOT/'docs'/'_static'/'search.js').read_text(encoding='utf-8')
    score = "([page, score]) => Scorer.score([page, '', '', null, score, '', ''])"
    names = '''["howto/runs", 5], ["api/run", Scorer.objPartialMatch + Scorer.objPrio[0]], ["tutorials/video", 5],
        ["readme.zh", 5], ["changelog", 5]'''
    scores = page.evaluate(f'() => {{{code}; return [{names}].map({score})}}')
    assert scores[0] > max(scores[1:3]) and min(scores[1:3]) > max(scores[3:])
    assert 'html_search_scorer' in (ROOT/'docs'/'conf.py').read_text(encoding='utf-8')

def test_the_search_finds_chinese_words_of_two_characters():
    "Sphinx takes what stands between two blanks as a word, and finds parts of it only from three characters on."
    found = _script('conf').searched('显存不足（OOM）：每块GPU的显存')
    assert {'OOM', '显存', '不足', '显存不足', '每块GPU的显存'} <= {*found} and '足O' not in found
    assert _script('conf').searched('pick_zero fits') == ['pick_zero', 'fits']

def test_links_of_notebooks_lead_to_their_places_on_the_site():
    moved = generate.relinked("[a](../03_model.ipynb#The-model's-dimensions) [b](../tutorials/slurm.md)", 'nbs/data/15_boxes.ipynb')
    assert moved == '[a](../../notebooks/03_model.ipynb#the-models-dimensions) [b](../../tutorials/slurm.md)'
    generate.relinked('[a](gone.ipynb)', 'nbs/data/15_boxes.ipynb')
    assert generate.broken.pop() == 'nbs/data/15_boxes.ipynb: (gone.ipynb)'

def test_chinese_pages_are_on_the_site():
    listed = [(ROOT/'docs'/name).read_text(encoding='utf-8') for name in ('index.md', 'tutorials/index.md')]
    assert '<readme.zh>' in listed[0] and '](../README.zh.md)' in listed[0] and '\ncar_item.zh\n' in listed[1]
    moved = generate.relinked('[a](nbs/tutorials/car_item.zh.ipynb) [b](README.md) [c](LICENSE)', 'README.zh.md')
    assert moved == '[a](tutorials/car_item.zh.ipynb) [b](index.md) [c](LICENSE)'

def test_examples_are_shown_with_their_outputs():
    for name in ('read_samples', 'split_samples', 'zero_table', 'score'):
        assert all(cell['outputs'] for cell in generate.examples(name)) and generate.examples(name)

def test_examples_of_the_reference_are_no_tests():
    shown = [cell['source'] for name in qwen2vl_nb.__all__ if callable(getattr(qwen2vl_nb, name)) for cell in generate.examples(name)]
    assert len(shown) > 60 and not [source for source in shown if re.search('^(test_|assert )', source, re.M)]

def _code(page, language='python'):
    return re.findall(rf'^```{language}\n(.*?)^```', page.read_text(encoding='utf-8'), re.M | re.S)

@pytest.mark.parametrize('page', HOWTO, ids=lambda p: p.stem)
def test_code_of_how_to_pages_calls_public_names_with_their_parameters(page):
    calls = [n for block in _code(page, 'py(?:thon)?') for n in ast.walk(ast.parse(block)) if isinstance(n, ast.Call)]
    for call in calls:
        if getattr(call.func, 'id', '') not in qwen2vl_nb.__all__: continue
        keywords = {k.arg: ... for k in call.keywords if k.arg}
        inspect.signature(getattr(qwen2vl_nb, call.func.id)).bind(*call.args, **keywords)
    for name in {n.func.id for n in calls if isinstance(n.func, ast.Name) and '_' in n.func.id}: assert name in qwen2vl_nb.__all__

@pytest.mark.soak
@pytest.mark.parametrize('page', HOWTO, ids=lambda p: p.stem)
def test_code_of_how_to_pages_runs(page, tmp_path):
    "In a folder that has the data of a clone; blocks marked `py` need other machines, those marked `python` run."
    (tmp_path/'data').symlink_to(ROOT/'data')
    (tmp_path/'runs').mkdir()
    (tmp_path/'page.py').write_text('\n'.join(_code(page)), encoding='utf-8')
    done = subprocess.run([sys.executable, 'page.py'], cwd=tmp_path, capture_output=True, text=True)
    assert not done.returncode, done.stderr

@pytest.mark.soak
def test_tables_on_the_page_about_memory_are_what_the_code_prints(tmp_path):
    page = (ROOT/'docs'/'howto'/'zero.md').read_text(encoding='utf-8')
    shown = re.findall(r'^```python\n((?:[^`]*\n)?(zero_table|recipe = pick_zero)\(.*\))\n```\n[^`]*```text\n([^`]*)\n```', page, re.M)
    assert len(shown) == 3
    code = '\n'.join(re.sub(r'^(zero_table.*)$', r'print(\1)', code, flags=re.M) + "\nprint('=')" for code, _, _ in shown)
    (tmp_path/'data').symlink_to(ROOT/'data')
    printed = subprocess.check_output([sys.executable, '-c', code], cwd=tmp_path, text=True).split('=\n')
    assert [text for *_, text in shown] == [text.rstrip('\n') for text in printed[:3]]

def _rows(page):
    "(first cell, number of bars) of each row of each table of a page."
    table = re.findall(r'(?:^\|.*\n)+', page.read_text(encoding='utf-8'), re.M)
    return [[(line.split('|')[1].strip(), line.count('|')) for line in t.splitlines()[2:]] for t in table]

def test_every_row_of_the_comparison_has_its_sources():
    compared = next(t for t in _rows(ROOT/'README.md') if t[0][0] == 'Models')
    page = (ROOT/'docs'/'comparison.md').read_text(encoding='utf-8')
    added = {*generate.with_readme(page).splitlines()} - {*page.splitlines()}
    assert len(added) == 15 and all(line.startswith('| ') for line in added)
    assert compared == _rows(ROOT/'docs'/'comparison.md')[-1] and len(compared) == 15 and {n for _, n in compared} == {6}

BENCHMARKS = sorted((ROOT/'nbs'/'benchmarks').glob('*.ipynb'))

def _numbers(text): return {n.replace(',', '').rstrip('.') for n in re.findall(r'\d[\d,]*(?:\.\d+)?', text)}

@pytest.mark.parametrize('path', BENCHMARKS, ids=lambda p: p.stem)
def test_a_benchmark_begins_with_results_that_its_outputs_have(path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    results = ''.join(cells[1]['source'])
    assert results.startswith('## Results\n') and all(c['cell_type'] == 'code' or 'Results' not in c['source'][0] for c in cells[2:])
    said = [''.join(o.get('text', '') or o.get('data', {}).get('text/plain', '')) for c in cells for o in c.get('outputs', [])]
    # Sizes that were chosen may be in the code or the text; what was measured is in the outputs
    chosen = ' '.join(''.join(c['source']) for c in [cells[0], *cells[2:]]).replace('_', '')
    found = _numbers(re.sub(r'\d+\.\d+\.\d+', '', results)) # without the versions of packages
    assert {n for n in found if '.' in n} <= _numbers(' '.join(said))
    assert found <= _numbers(' '.join(said) + chosen)

def test_the_box_of_the_readme_says_of_memory_what_its_proof_says():
    "Also where the proof says that something was not measured, and how far off the worst of its runs is."
    row = next(line for line in (ROOT/'README.md').read_text(encoding='utf-8').splitlines() if line.startswith('| **Memory.**'))
    measured, other = row.strip('|').split('|')
    cells = json.loads((ROOT/'nbs'/'benchmarks'/'memory.ipynb').read_text(encoding='utf-8'))['cells']
    not_measured = next(text for c in cells if (text := ''.join(c['source'])).startswith('## What was not measured'))
    for name in ('QLoRA', 'ffload'): assert name in not_measured and name in other and name not in measured
    said = ''.join(''.join(o.get('text', '')) for c in cells for o in c.get('outputs', []))
    worst, limit = re.search(r'Worst error ([\d.]+) %.* limit is (\d+) %: met', said).groups()
    assert float(worst) <= float(limit) and f'in most cases within {limit} %' in measured
    for far in re.findall(r'Off by more than \d+ %: .*: [+-]([\d.]+) %', said):
        assert f'{far} % too' in measured and f'{far} %' in ''.join(cells[1]['source'])

def test_the_picture_of_the_readme_has_the_lines_that_plot_loss_draws(tmp_path):
    "As logged, smoothed, and at evaluations, each in its colour."
    from matplotlib.colors import to_rgb
    (tmp_path/'trainer_log.jsonl').write_text('\n'.join(json.dumps(row) for step in range(1, 9) for row in (
        {'current_steps': step, 'total_steps': 8, 'loss': 1/step}, {'current_steps': step, 'total_steps': 8, 'eval_loss': 1/step})))
    figure = qwen2vl_nb.plot_loss(tmp_path)
    lines = {line.get_label(): to_rgb(line.get_color()) for line in figure.axes[0].lines if line.get_label()[0] != '_'}
    assert len(lines) == 3
    shown = np.asarray(Image.open(ROOT/'nbs'/'images'/'result.png').convert('RGB'))/255
    for label, colour in lines.items(): assert np.abs(shown - colour).max(-1).min() < .03, label
