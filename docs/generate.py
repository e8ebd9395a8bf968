"""Write the pages of the site into docs/_build/source: what is in docs/, the notebooks, and the API reference.

The API reference is made from the package itself: signatures, the comment of each parameter, and the first examples
that follow each definition in its notebook. A link to a file that does not exist ends this script with an error."""
import ast, inspect, json, re, shutil, sys
from pathlib import Path

import qwen2vl_nb

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT/'docs'/'_build'/'source'

# Page of the API reference → its title, and the modules or packages that it covers, in this order
PAGES = {
    'data': ('Data', ['data.sources', 'data.check', 'data.split', 'data.registry', 'data.describe', 'data']),
    'recipes': ('Recipes and checks', ['recipe', 'zero', 'checks', 'stack', 'findings', 'model']),
    'memory': ('Memory', ['memory']),
    'run': ('Runs', ['run.start', 'run']),
    'prediction': ('Predictions and scores', ['prediction.engines', 'prediction']),
    'tuning': ('Tuning', ['tuning']),
    'panel': ('Panel', ['panel']),
    'included': ('Included models and data', ['tiny', 'cli']),
}
# Folder of the repository → folder of the site; the first that fits counts
FOLDERS = {'docs/': '', 'nbs/tutorials/': 'tutorials/', 'nbs/benchmarks/': 'benchmarks/', 'nbs/images/': 'images/',
           'nbs/': 'notebooks/'}
# Pages at the root of the repository → their places on the site
ROOT_PAGES = {'CHANGELOG.md': 'changelog.md', 'CONTRIBUTING.md': 'contributing.md', 'README.zh.md': 'readme.zh.md'}
broken = []

def home(name):
    "The module of a public name, without the name of the package."
    thing = getattr(qwen2vl_nb, name)
    return next(module.partition('.')[2] for module, m in [*sys.modules.items()] if module.startswith('qwen2vl_nb.')
                and not hasattr(m, '__path__') and module != 'qwen2vl_nb.all' and vars(m).get(name) is thing
                and name in getattr(m, '__all__', ()))

def names_of(page):
    "The public names on a page of the API reference, in the order of the modules."
    rooms = PAGES[page][1]
    return [*dict.fromkeys(name for room in rooms for name in qwen2vl_nb.__all__
                           if home(name) == room or home(name).startswith(f'{room}.'))]

def in_site(path):
    "Where a file of the repository is on the site: a relative path, or None."
    for folder, there in FOLDERS.items():
        if path.startswith(folder): return there + path.removeprefix(folder)
    return (ROOT_PAGES | {'README.md': 'index.md', 'LICENSE': 'LICENSE'}).get(path)

def links(text):
    "The (whole, target, anchor) of each relative link in Markdown."
    text = re.sub(r'```.*?```', '', text, flags=re.S)
    return re.findall(r'(\]\((?![a-z]+:)([^)\s#]*)(#[^)\s]*)?\))', text)

def relinked(text, path):
    "Markdown of a file of the repository, with its links as they are on the site."
    for whole, target, anchor in links(text):
        file = (ROOT/path).parent/target if target else ROOT/path
        if not file.exists(): broken.append(f'{path}: {whole[1:]}')
        there = file.resolve().is_relative_to(ROOT) and in_site(str(file.resolve().relative_to(ROOT)))
        if target and there:
            up = in_site(path).count('/')
            target = '../'*up + there
        slug = '#' + re.sub(r'[^\w-]', '', anchor[1:].lower()) if anchor else ''
        text = text.replace(whole, f']({target}{slug})')
    return text

def linked_names(text):
    "Markdown in which public names in code style lead to the API reference."
    names = '|'.join({*qwen2vl_nb.__all__} - {'gpus'}) # which is also the name of a parameter
    parts = re.split(r'(^```.*?^```|^#.*?$|\[[^\]]*\]\([^)]*\))', text, flags=re.S | re.M)
    return ''.join(part if i%2 else re.sub(rf'(?<!`)`({names})(\(\))?`(?!`)', r'{py:obj}`~qwen2vl_nb.\1`', part)
                   for i, part in enumerate(parts))

def site_cell(cell, path):
    "A cell of a notebook as the site shows it, or None."
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown': return cell | {'source': linked_names(relinked(source, path))}
    if re.match(r'#\| *(hide|default_exp)', source): return None
    shown = re.sub(r'^#\| *(export\w*|slow)\n', '', source, flags=re.M)
    is_private = re.match(r'#\| *export', source) and not any(n[0] != '_' for n in defines(source))
    tags = ['hide-input'] if path.startswith('nbs/benchmarks/') or is_private else []
    return cell | {'source': shown, 'metadata': {'tags': tags}}

def with_readme(text):
    "A page with the table of the README that it names in a comment, so that the table is written only once."
    readme = (ROOT/'README.md').read_text(encoding='utf-8')
    table = lambda heading: re.search(r'(?:^\|.*\n)+', readme.split(f'\n## {heading}\n')[1], re.M)[0]
    return re.sub('<!-- README: (.*?) -->', lambda found: table(found[1]), text)

def page(path):
    "Write a Markdown page or notebook of the repository to its place on the site."
    to = SOURCE/in_site(path)
    to.parent.mkdir(parents=True, exist_ok=True)
    text = (ROOT/path).read_text(encoding='utf-8')
    if path.endswith('.md'): to.write_text(linked_names(relinked(with_readme(text), path)), encoding='utf-8')
    else:
        nb = json.loads(text)
        nb['cells'] = [cell for c in nb['cells'] if (cell := site_cell(c, path))]
        # The modules' notebooks show their code, private parts included: the search leads to the API reference instead
        if in_site(path).startswith('notebooks/'):
            nb['metadata'] |= {'nosearch': True}
        write_notebook(to, nb['cells'], nb['metadata'])

def write_notebook(to, cells, metadata):
    to.parent.mkdir(parents=True, exist_ok=True)
    nb = {'cells': cells, 'metadata': metadata, 'nbformat': 4, 'nbformat_minor': 5}
    to.write_text(json.dumps(nb), encoding='utf-8')

def fields(doc):
    "The sections that `as_public` adds to a docstring, as Markdown's field list."
    doc = (doc or '').partition('\n\nExamples\n--------\n')[0]  # the site shows cells of the notebook instead
    text, _, rest = doc.partition('\n\nParameters\n----------\n')
    text, _, back = text.partition('\n\nReturns\n-------\n') if not rest else (text, _, '')
    rest, _, later = rest.partition('\n\nReturns\n-------\n')
    found = re.findall(r'^(\**\w+)(?: : .*)?(?:\n {4}(.*))?$', rest, flags=re.M)
    lines = [f':param {name.replace("*", chr(92) + "*")}: {comment}' for name, comment in found]
    kind, _, comment = (later or back).partition('\n    ')
    comment = comment or (kind if ' ' in kind else '')
    return '\n'.join([inspect.cleandoc(text), '', *lines, *([f':returns: {comment}'] if comment else [])])

class Plain(str):
    "An annotation that is written without quotes."
    __repr__ = str.__str__

def signature(f, skip=0):
    "A signature without the quotes of annotations and the names of modules."
    about = inspect.signature(f)
    plain = lambda a: a.strip('\'"') if isinstance(a, str) else inspect.formatannotation(a)
    mine = [p if p.annotation is p.empty else p.replace(annotation=Plain(plain(p.annotation)))
            for p in about.parameters.values()][skip:]
    text = str(about.replace(parameters=mine, return_annotation=about.empty))
    if about.return_annotation is not about.empty: text += f' -> {plain(about.return_annotation)}'
    return re.sub(r'\b(?:[a-z]\w*\.)+(?=[A-Z])', '', text)

def directive(kind, name, doc, inside=()):
    "A definition in the form of Sphinx's Python domain."
    fence = ':'*(3 if not inside else 4)
    return '\n'.join([f'{fence}{{py:{kind}}} {name}', '', fields(doc), '', *inside, fence])

def described(name):
    "The entry of a public name: signature, comments of the parameters, and those of its methods."
    thing = getattr(qwen2vl_nb, name)
    if not callable(thing): return f':::{{py:data}} {name}\n:value: {thing!r}\n:::'
    if not inspect.isclass(thing): return directive('function', name + signature(thing), thing.__doc__)
    inside = []
    for member, f in vars(thing).items():
        if member.startswith('_') or not getattr(f, '__doc__', None): continue
        if isinstance(f, property): inside.append(directive('property', member, f.__doc__))
        elif inspect.isfunction(f): inside.append(directive('method', member + signature(f, 1), f.__doc__))
    return directive('class', name + signature(thing).removesuffix(' -> None'), thing.__doc__, inside)

def notebook_of(module):
    "The notebook that a module of the package is exported from."
    text = (ROOT/'qwen2vl_nb'/(module.replace('.', '/') + '.py')).read_text(encoding='utf-8')
    return 'nbs/' + re.search(r'File to edit: (?:\.\./)+nbs/(.*?\.ipynb)', text)[1]

def defines(source):
    "The names that an exported cell defines."
    if not re.match(r'#\| *export', source): return set()
    return {n.name for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}

def tests(source):
    "Whether a cell is a test."
    return re.search(r'^(test_|assert |with expect_fail)', source, re.M)

def examples(name):
    "The first two cells after a definition in its notebook that use it, show something and test nothing."
    path, found, after = notebook_of(home(name)), [], False
    for cell in json.loads((ROOT/path).read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        after = after or (cell['cell_type'] == 'code' and name in defines(source))
        uses = re.search(rf'\b{name}\b', source) and cell.get('outputs') and not tests(source)
        if after and uses and (shown := site_cell(cell, path)): found.append(shown)
    return found[:2]

def reference(to, title, names):
    "Write a page of the API reference."
    markdown = lambda text: {'cell_type': 'markdown', 'id': f'md{len(cells)}', 'metadata': {}, 'source': text}
    cells = []
    cells.append(markdown(f'# {title}\n\n```{{py:currentmodule}} qwen2vl_nb\n```'))
    for name in names:
        path = notebook_of(home(name))
        cells.append(markdown(described(name)))
        if found := examples(name): cells.append(markdown('Example:'))
        cells += [cell | {'id': f'ex{len(cells)}-{i}'} for i, cell in enumerate(found)]
        cells.append(markdown(f'Written and explained in [{title_of(ROOT/path)[0]}](../{in_site(path)}).'))
    write_notebook(to, cells, {'language_info': {'name': 'python'}})

def title_of(path):
    "The title of a notebook and the line that says what it is about."
    lines = ''.join(json.loads(path.read_text(encoding='utf-8'))['cells'][0]['source']).splitlines()
    return lines[0].removeprefix('# '), next(line[2:] for line in lines if line.startswith('> '))

def list_notebooks(books):
    "Write the page that lists the notebooks of the package."
    index, text = SOURCE/'notebooks'/'index.md', ['| Notebook | What it is about |', '|---|---|']
    inside = sorted(in_site(str(p.relative_to(ROOT))).removeprefix('notebooks/') for p in books)
    inside = sorted((p for p in inside if not p.startswith('../')), key=lambda p: (p.count('/'), p))
    text += [f'| [{title}]({p}) | {about} |' for p in inside for title, about in [title_of(ROOT/'nbs'/p)]]
    toc = ['```{toctree}', ':hidden:', '', *(p.removesuffix('.ipynb') for p in inside), '```']
    index.write_text('\n'.join([index.read_text(encoding='utf-8'), *text, '', *toc]), encoding='utf-8')

def write_site():
    shutil.rmtree(SOURCE.parent, ignore_errors=True)
    shutil.copytree(ROOT/'nbs'/'images', SOURCE/'images')
    shutil.copy(ROOT/'LICENSE', SOURCE)
    own = [p for p in (ROOT/'docs').rglob('*.md') if '_build' not in p.parts]
    books = [p for p in (ROOT/'nbs').rglob('*.ipynb') if p.name != 'index.ipynb' and '.' not in p.parent.name]
    for path in [*own, *books, *(ROOT/'nbs'/'tutorials').glob('*.md'), *(ROOT/name for name in ROOT_PAGES)]:
        page(str(path.relative_to(ROOT)))
    list_notebooks([p for p in books if in_site(str(p.relative_to(ROOT))).startswith('notebooks/')])
    pages = {name: names for name in PAGES if (names := names_of(name))}
    for name, names in pages.items(): reference(SOURCE/'api'/f'{name}.ipynb', PAGES[name][0], names)
    table = [f'| [{PAGES[p][0]}]({p}.ipynb) | ' + ', '.join(f'{{py:obj}}`~qwen2vl_nb.{n}`' for n in names) + ' |'
             for p, names in pages.items()]
    toc = ['```{toctree}\n:hidden:\n', *pages, '```']
    index = SOURCE/'api'/'index.md'
    text = [index.read_text(encoding='utf-8'), '| Page | Names |', '|---|---|', *table, '', *toc]
    index.write_text('\n'.join(text), encoding='utf-8')

if __name__ == '__main__':
    write_site()
    if broken: sys.exit('Links to files that do not exist:\n' + '\n'.join(broken))
