"The package as it was installed: what it holds, and what importing it costs."
import ast, builtins, importlib, inspect, io, json, os, pkgutil, re, shutil, subprocess, sys, tokenize
from configparser import ConfigParser
from importlib.metadata import distribution, packages_distributions

import pytest

import qwen2vl_nb
from conftest import ROOT, SITE, small_disk
from qwen2vl_nb import _modidx
from qwen2vl_nb.boot import script

def test_it_is_the_wheel_that_is_tested(): assert qwen2vl_nb.__file__.startswith(SITE)

def test_every_module_is_there_and_imports():
    names = {m.name for m in pkgutil.walk_packages(qwen2vl_nb.__path__, 'qwen2vl_nb.') if not m.ispkg}
    assert names == {*_modidx.d['syms'], 'qwen2vl_nb._modidx'}
    for name in names: importlib.import_module(name)

def _required():
    "The packages that settings.ini asks for."
    settings = ConfigParser(delimiters=['='])
    settings.read(ROOT/'settings.ini', encoding='utf-8')
    return [distribution(re.match(r'[\w-]+', r)[0]) for r in settings['DEFAULT']['requirements'].split()]

def test_importing_all_imports_nothing_heavy():
    "Heavy is what takes more than 20 MB on the disk."
    large = {d.name for d in _required() if sum(file.size or 0 for file in d.files) > 20e6}
    heavy = {module for module, names in packages_distributions().items() if large & {*names}}
    assert {'torch', 'transformers', 'pandas', 'matplotlib'} < heavy
    code = f'import qwen2vl_nb.all, sys; print([m for m in {sorted(heavy)} if m in sys.modules])'
    assert subprocess.check_output([sys.executable, '-c', code], text=True).strip() == '[]'

def _code():
    "What the README and the tutorials have people type, by its file."
    yield ROOT/'README.md', '\n'.join(re.findall(r'^```(?:python)?\n(.*?)^```', (ROOT/'README.md').read_text(encoding='utf-8'), re.M | re.S))
    for path in (ROOT/'nbs'/'tutorials').glob('*.ipynb'):
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        yield path, '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code')
    for path in (ROOT/'nbs'/'tutorials').glob('*.md'): yield path, '\n'.join(re.findall(r'^```python\n(.*?)^```', path.read_text(encoding='utf-8'), re.M | re.S))

def _unknown(code):
    "Names that code uses and that neither it nor Python gives."
    lines = [line for line in code.splitlines() if not line.startswith(('%', '!', 'make '))]
    nodes = [*ast.walk(ast.parse('\n'.join(lines)))]
    used = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    given = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)} | {n.arg for n in nodes if isinstance(n, ast.arg)}
    given |= {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))} | {n.name for n in nodes if isinstance(n, ast.ExceptHandler)}
    given |= {(a.asname or a.name).split('.')[0] for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    return used - given - {*dir(builtins)}

@pytest.mark.parametrize('path,code', [*_code()], ids=lambda x: x.name if hasattr(x, 'name') else '')
def test_star_import_gives_the_names_that_people_are_told_to_use(path, code):
    names = {}
    exec('from qwen2vl_nb.all import *', names)
    assert not (missing := _unknown(code) - {*names} - {'display', 'get_ipython'}), f'{path.name} uses {missing}'

def _modules():
    "(name, syntax tree) of each module of the package."
    for name in sorted(_modidx.d['syms']):
        module = importlib.import_module(name)
        with open(module.__file__, encoding='utf-8') as f: yield name.removeprefix('qwen2vl_nb.'), ast.parse(f.read())

def _imports(name, tree, nodes=ast.walk):
    "(module, name) of what a module of the package imports from the others, at its head or in a function; the name is '' for a module as a whole."
    for node in nodes(tree):
        if not isinstance(node, ast.ImportFrom): continue
        if node.level: package = '.'.join(filter(None, [*name.split('.')[:-node.level], node.module]))
        elif node.module.partition('.')[0] == 'qwen2vl_nb': package = node.module.partition('.')[2]
        else: continue
        for a in node.names:
            whole = f'{package}.{a.name}'.lstrip('.')
            yield (whole, '') if f'qwen2vl_nb.{whole}' in _modidx.d['syms'] else (_home(package, a.name), a.name)

def _home(package, name):
    "The module that defines what a package offers; otherwise the module itself."
    found = importlib.import_module(f'qwen2vl_nb.{package}'.rstrip('.'))
    return getattr(found, name).__module__.removeprefix('qwen2vl_nb.') if name in getattr(found, '__all__', ()) and hasattr(found, '__path__') else package

def test_no_private_name_crosses_modules():
    found = []
    for name, tree in _modules():
        siblings = {module.split('.')[-1] for module, what in _imports(name, tree) if not what}
        found += [(name, module, what) for module, what in _imports(name, tree) if what.startswith('_') and not what.startswith('__')]
        found += [(name, n.value.id, n.attr) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr.startswith('_') and not n.attr.startswith('__')
                  and isinstance(n.value, ast.Name) and n.value.id in siblings]
    assert not found

# What looks something up in a package only when it is called, as users do: `attach` and `Run.watch`, which show a run by
# what is built on runs, and the panel, whose steps run code that has all names
LATE = {'run.start': {'prediction.serve', 'run.watch'}, 'panel.chosen_run': {'run.start'}, 'panel.runs_step': {'run.start'}}

def test_imports_go_downwards_in_no_circle_and_eight_floors():
    "Also those of functions, and of names that a package offers, but for the few that are listed as late."
    needs, floors = {name: {module for module, _ in _imports(name, tree)} for name, tree in _modules()}, 0
    at_head = {name: {module for module, _ in _imports(name, tree, ast.iter_child_nodes)} for name, tree in _modules()}
    del needs['all']
    for name, modules in LATE.items():
        assert modules <= needs[name] and not modules & at_head[name]
        needs[name] -= modules
    while free := [name for name in needs if not needs[name] & needs.keys()]:
        for name in free: del needs[name]
        floors += 1
    assert not needs and floors <= 8

def test_imports_are_in_one_order():
    "The standard library, other packages, this package; names as isort sorts them. ruff's own rule would write one name a line, which makes cells of sixty lines."
    def group(node):
        first = (node.names[0].name if isinstance(node, ast.Import) else node.module or '').partition('.')[0]
        return 2 if isinstance(node, ast.ImportFrom) and node.level else 0 if first in sys.stdlib_module_names else 1
    kind = lambda name: (not name.isupper(), not name[0].isupper(), name.lower())
    found = []
    for name, tree in _modules():
        first = next((n.lineno for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))), 0)
        nodes = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)) and n.lineno < first]
        if list(map(group, nodes)) != sorted(map(group, nodes)): found.append(name)
        found += [(name, ast.unparse(n)) for n in nodes if [a.name for a in n.names] != sorted((a.name for a in n.names), key=kind)]
    assert not found

def test_no_module_runs_another_by_its_path_or_code_in_a_string():
    "Children are modules that `boot` starts, so that ruff and a reader see every line of them."
    found = []
    for name, tree in _modules():
        found += [(name, n.lineno) for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) and any(a.name == 'runpy' for a in n.names)]
        found += [(name, n.lineno) for n in ast.walk(tree) if isinstance(n, ast.Constant) and n.value == '-c']
        found += [(name, n.lineno) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == '__file__']
    assert not found

def test_names_of_a_runs_files_are_written_in_one_place():
    "The protocol of a run's folder is `run.folder`: elsewhere its files are constants."
    from qwen2vl_nb.run import folder
    names = {value for name, value in vars(folder).items() if name.isupper() and isinstance(value, str)}
    words = {folder.STOP, folder.STOPPING, folder.RANKS, folder.EARLIER, folder.SCORES, folder.SERVED, folder.RUN_LOCK}  # as file names they come after a slash
    found = []
    for name, tree in _modules():
        if name == 'run.folder': continue
        found += [(name, n.lineno, n.value) for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and {n.value, *n.value.split('/')} & (names - words)]
        found += [(name, n.lineno, n.value) for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value.partition('/')[0] in words and '/' in n.value]
        found += [(name, n.lineno, n.right.value) for n in ast.walk(tree) if isinstance(n, ast.BinOp) and isinstance(n.right, ast.Constant) and n.right.value in words]
    assert not found

def _notebooks():
    "(path, code cells) of each notebook that the package is written in; a cell is its source and whether it has outputs."
    for path in sorted((ROOT/'nbs').rglob('*.ipynb')):
        if {'tutorials', 'benchmarks'} & {*path.parts}: continue
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        yield path.name, [(''.join(c['source']), bool(c['outputs'])) for c in cells if c['cell_type'] == 'code']

def _public(source):
    "The public names that an exported cell defines, and the public classes that it adds methods to."
    nodes = [n for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    owner = lambda n: n.args.args[0].annotation if isinstance(n, ast.FunctionDef) and n.decorator_list and n.args.args else None
    return {owner(n).id if isinstance(owner(n), ast.Name) else n.name for n in nodes} & {*qwen2vl_nb.__all__}

@pytest.mark.parametrize('path,cells', [*_notebooks()], ids=lambda x: x if isinstance(x, str) else '')
def test_public_definitions_are_followed_by_an_example_with_output_and_by_a_test(path, cells):
    exported, found = [source.startswith('#| export') for source, _ in cells], []
    for i in [i for i, is_exported in enumerate(exported) if is_exported]:
        start = next(k for k in range(i + 1, len(cells) + 1) if k == len(cells) or not (exported[k] and _public(cells[k][0])))
        after = cells[start:next((k for k in range(start, len(cells)) if exported[k]), len(cells))]
        if _public(cells[i][0]) and not (any(shown for _, shown in after) and any(re.search(r'\btest_\w+\(|\bassert\b', source) for source, _ in after)):
            found.append(_public(cells[i][0]))
    assert not found

@pytest.mark.parametrize('path,cells', [*_notebooks()], ids=lambda x: x if isinstance(x, str) else '')
def test_exported_cells_are_short(path, cells):
    assert not [source for source, _ in cells if source.startswith('#| export') and len(source.splitlines()) > 51]

def test_no_saved_output_names_the_machine_on_which_it_was_made():
    "Such as in a warning, whose first words are the path of the source."
    outputs = {path: json.dumps([c.get('outputs', []) for c in json.loads(path.read_text(encoding='utf-8'))['cells']]) for path in (ROOT/'nbs').rglob('*.ipynb')}
    place = re.compile(r'/[\w./-]+/qwen2vl_nb/[\w/]+\.py:\d+|ipykernel_\d+|/site-packages/')
    assert not {path.name: found[0] for path, text in outputs.items() if (found := place.search(text))}

def _lines_of_code(source):
    "How many lines are neither blank nor a comment nor a docstring."
    layout = tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in layout]
    is_text = lambda n: isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) and isinstance(n.value.value, str)
    texts = [n for n in ast.walk(ast.parse(source)) if is_text(n)]
    over = lambda found: {line for first, last in found for line in range(first, last + 1)}
    return len(over((t.start[0], t.end[0]) for t in tokens) - over((n.lineno, n.end_lineno) for n in texts))

def test_notebooks_have_three_words_of_prose_for_each_line_of_code():
    "All together, but for the panel's tables of texts; none has only half of that."
    words, lines = {}, {}
    for path in sorted((ROOT/'nbs').rglob('*.ipynb')):
        if {'tutorials', 'benchmarks'} & {*path.parts} or path.name in ('00_texts.ipynb', '00_chinese.ipynb'): continue
        cells = [(c['cell_type'], ''.join(c['source'])) for c in json.loads(path.read_text(encoding='utf-8'))['cells']]
        code = [_lines_of_code(source) for kind, source in cells if kind == 'code' and source.startswith('#| export')]
        if code: words[path], lines[path] = sum(len(text.split()) for kind, text in cells if kind == 'markdown'), sum(code)
    assert sum(words.values()) >= 3*sum(lines.values())
    assert not [path.name for path in words if words[path] < 1.5*lines[path]]

@pytest.mark.parametrize('name', [name for name in qwen2vl_nb.__all__ if callable(getattr(qwen2vl_nb, name))])
def test_help_explains_every_parameter(name):
    thing = getattr(qwen2vl_nb, name)
    methods = [f for k, f in vars(thing).items() if inspect.isfunction(f) and not k.startswith('_')] if inspect.isclass(thing) else []
    for f in (thing, *methods):
        said = inspect.getdoc(f)
        assert len(said) > 15
        for parameter, about in inspect.signature(f).parameters.items():
            assert about.annotation is not about.empty or parameter == 'self' or about.kind in (about.VAR_KEYWORD, about.VAR_POSITIONAL), f'{f.__qualname__}({parameter})'
            assert parameter == 'self' or re.search(rf'^\**{parameter}( : .*)?\n    \S', said, re.M), f'{f.__qualname__}({parameter})'

@pytest.mark.parametrize('name', [name for name in qwen2vl_nb.__all__ if callable(getattr(qwen2vl_nb, name))])
def test_help_ends_with_an_example(name):
    "It is Python, uses the name or what it gives, and calls public names with parameters that they have."
    example = '\n'.join(re.findall(r'^>>> (.*)$', inspect.getdoc(getattr(qwen2vl_nb, name)).rpartition('\n\nExamples\n--------\n')[2], re.M))
    calls = [n for n in ast.walk(ast.parse(example)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in qwen2vl_nb.__all__]
    for call in calls: inspect.signature(getattr(qwen2vl_nb, call.func.id)).bind(*call.args, **{k.arg: k.value for k in call.keywords})
    assert calls and name in example or inspect.isclass(getattr(qwen2vl_nb, name)) and example

def test_digests_of_files_are_made_in_one_place():
    "So that what earlier versions wrote down is still recognized, and every one of them reads regular files only."
    reads = lambda node: any(isinstance(n, ast.Call) and ast.unparse(n.func).rpartition('.')[2] in ('read', 'read_bytes', 'open', 'open_regular') for n in ast.walk(node))
    found = []
    for name, tree in _modules():
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and name != 'files']
        found += [(name, n.lineno) for n in calls if ast.unparse(n.func) == 'hashlib.file_digest']
        found += [(name, n.lineno) for n in calls if (ast.unparse(n.func).startswith('hashlib.') or ast.unparse(n.func).endswith('.update')) and reads(n)]
    assert not found

def test_the_readme_on_pypi_has_no_link_that_leads_nowhere(tmp_path):
    "PyPI knows no files of the repository: their links get the address in settings.ini, and are plain text without one."
    for name in ('setup.py', 'pyproject.toml', 'README.md'): shutil.copy(ROOT/name, tmp_path)
    about = []
    for url in ('', 'https://example.com/me/nb'):
        (tmp_path/'settings.ini').write_text((ROOT/'settings.ini').read_text(encoding='utf-8').replace('git_url =', f'git_url = {url}'), encoding='utf-8')
        (to := tmp_path/f'made{len(about)}').mkdir()
        made = subprocess.run([sys.executable, 'setup.py', '-q', 'dist_info', '--output-dir', to], cwd=tmp_path, capture_output=True, text=True)
        assert not made.returncode, made.stderr
        about.append(next(to.glob('*.dist-info/METADATA')).read_text(encoding='utf-8'))
    alone, linked = about
    assert ']' + '(' not in alone.partition('\n\n')[2].replace('](https://', '') and 'The how-to pages take one job each: labels and their faults, boxes,' in alone
    assert '![Before fine-tuning the model describes the vehicle; afterwards it fills in the item card](https://example.com/me/nb/raw/main/nbs/images/result.png)' in linked
    assert '[CHANGELOG.md](https://example.com/me/nb/blob/main/CHANGELOG.md)' in linked and 'Project-URL: Issues, https://example.com/me/nb/issues' in linked
    assert 'Project-URL' not in alone and 'Classifier: Development Status :: 3 - Alpha' in alone

def test_the_wheel_brings_the_tutorials(tmp_path):
    written = qwen2vl_nb.tutorial(tmp_path/'first')
    names = lambda folder: sorted(str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file() and not p.name.startswith('.'))
    assert names(tmp_path/'first'/'data') == names(ROOT/'data')
    assert names(written.parent) == [name for name in names(ROOT/'nbs'/'tutorials') if not name.startswith('.')]
    assert '../../' not in written.read_text() and "Path('../data')" in written.read_text()
    assert '信息卡' in qwen2vl_nb.tutorial(tmp_path/'first', language='zh').read_text(encoding='utf-8')
    for path in written.parent.iterdir():
        text = path.read_text(encoding='utf-8')
        if path.suffix == '.ipynb': text = '\n'.join(''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'markdown')
        gone = [link for link in re.findall(r'\]\((?!https?:|#)([^)#]+)', text) if not (path.parent/link).exists()]
        assert not gone, f'{path.name}: {gone}'

def test_lab_is_that_of_the_interpreter_also_above_another_environment(tmp_path):
    "Such as in a container, where a virtual environment sees the packages of the system: there is no `jupyter-lab` beside its Python."
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', tmp_path/'above'], check=True)
    packages = next((tmp_path/'above'/'lib').glob('python*/site-packages'))
    (packages/'below.pth').write_text(os.path.dirname(os.path.dirname(pytest.__file__)))
    said = subprocess.run([tmp_path/'above'/'bin'/'python', *script('cli'), 'lab', '--version'], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {'PATH': '/usr/bin:/bin'})
    assert not said.returncode and re.fullmatch(r'\d+\.\d+\S*', said.stdout.strip()), said.stderr

def test_make_opens_the_tutorial_of_a_language_and_installs_with_a_pip_that_shows_progress():
    alone = {k: v for k, v in os.environ.items() if k not in ('MAKEFLAGS', 'MAKELEVEL')}  # not as a part of the `make test` that runs this
    planned = lambda *words: subprocess.run(['make', '-n', *words], cwd=ROOT, env=alone, capture_output=True, text=True, check=True).stdout
    for word in ('lab', 'demo'):
        assert 'nbs/tutorials/car_item.ipynb\n' in planned(word) and 'nbs/tutorials/car_item.zh.ipynb\n' in planned('language=zh', word)
    assert '`make lab` opens' in planned('demo') and '`make language=zh lab` opens' in planned('language=zh', 'demo')
    assert '-m venv --upgrade-deps .venv' in planned('--always-make', 'setup')

def test_make_regenerates_every_notebook_but_the_benchmarks():
    planned = subprocess.run(['make', '-n', 'notebooks'], cwd=ROOT, capture_output=True, text=True, check=True,
                             env={k: v for k, v in os.environ.items() if k not in ('MAKEFLAGS', 'MAKELEVEL')}).stdout
    notebooks = {str(p.relative_to(ROOT)) for p in (ROOT/'nbs').rglob('*.ipynb') if not any(part.startswith('.') for part in p.parts)}
    assert {word for word in planned.split() if word.endswith('.ipynb')} == {name for name in notebooks if not name.startswith('nbs/benchmarks/')}

def test_a_full_disk_leaves_no_truncated_tutorial(tmp_path):
    disk = tmp_path/'disk'
    with small_disk(disk, '2m') as resize:
        said = subprocess.run([sys.executable, *script('cli'), 'demo'], cwd=disk, capture_output=True, text=True)
        assert said.returncode and said.stderr.startswith('qwen2vl-nb: ') and 'The disk is full' in said.stderr and len(said.stderr) < 400, said.stderr
        resize('20m')
        data = qwen2vl_nb.tutorial(disk/'qwen2vl_nb-tutorial').parents[1]/'data'
        assert all(p.read_bytes() == (data/p.relative_to(ROOT/'data')).read_bytes() for p in (ROOT/'data').rglob('*') if p.is_file())

@pytest.mark.soak
def test_the_demo_runs_from_the_wheel(tmp_path):
    done = subprocess.run([sys.executable, *script('cli'), 'demo'], cwd=tmp_path, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert 'Done in' in done.stdout and list((tmp_path/'qwen2vl_nb-tutorial'/'runs').glob('car_item-*/after/predictions.jsonl'))
