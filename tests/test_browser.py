"""The live view where it is looked at: JupyterLab in a browser, with a run at work.

Pictures of what was to be seen are kept in `test-artefacts`."""
import base64, json, os, re, signal, time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from conftest import ROOT, until
from lab import contrast, idle, keep, menu, notebook, open_notebook, reload_page, running_lab
from qwen2vl_nb.run.folder import state_or_empty
from qwen2vl_nb.run.loss import plot_loss
from qwen2vl_nb.recipe import save_recipe
from qwen2vl_nb.run.start import attach

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "JupyterLab on a folder like the repository's."
    root = tmp_path_factory.mktemp('lab')
    (root/'data').symlink_to(ROOT/'data')
    with running_lab(root) as lab: yield lab

def _picture(page):
    "The bytes of the curve that the browser shows; none as long as it shows none."
    script = '''async () => {
        const image = document.querySelector('img.widget-image')
        if (!image || !image.naturalWidth || !image.offsetParent) return ''
        const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer())
        return btoa(Array.from(bytes, b => String.fromCharCode(b)).join(''))
    }'''
    return base64.b64decode(page.evaluate(script))

def _says(page, text): page.locator('.widget-vbox', has_text=text).first.wait_for()

@contextmanager
def _held(run):
    "A run that is at work, and stands still meanwhile."
    processes = psutil.Process(state_or_empty(run, 'waiter.json')['pid']).children(recursive=True)
    for p in processes: p.suspend()
    yield
    assert run.is_running
    for p in processes: p.resume()

def _changes(page, run, enough):
    "Pictures that the browser shows while the run is at work: it stands still after a line of its log until that has been seen."
    log, shown = run.output_dir/'trainer_log.jsonl', []
    def size(): return log.stat().st_size if log.exists() else 0
    while len(shown) < enough:
        before = size()
        until(lambda: size() > before or not run.is_running, 'a line of the log')
        assert run.is_running, run.failure
        with _held(run): shown.append(until(lambda: (picture := _picture(page)) not in shown and picture, 'the picture of it'))
    return shown

def test_the_tutorial_is_seen_to_train(lab, page):
    "The curve grows while a cell waits; after a reload and a restart of the kernel it is there again, and whole."
    tutorial = json.loads((ROOT/'nbs'/'tutorials'/'car_item.ipynb').read_text())
    for cell in tutorial['cells']:
        if cell['cell_type'] == 'code': cell['outputs'] = []
    there = lab.root/'nbs'/'tutorials'
    there.mkdir(parents=True)
    (there/'car_item.ipynb').write_text(json.dumps(tutorial))
    open_notebook(page, lab, 'nbs/tutorials/car_item.ipynb')
    menu(page, 'Run', 'Run All Cells')
    folder = lab.root/'runs'/'browser'/'train'
    until((folder/'waiter.json').exists, 'the tutorial comes to its training')
    run = attach(folder)
    _says(page, 'train: starting, ')
    _says(page, 'the curve will begin with the first loss, at step ')
    assert not page.locator('img.widget-image').locator('visible=true').count(), 'no picture of nothing'
    keep(page, 'tutorial-starting')
    shown = _changes(page, run, 4)
    keep(page, 'tutorial-training')

    with _held(run):
        reload_page(page, there/'car_item.ipynb')
        menu(page, 'Kernel', 'Restart Kernel…')
        page.locator('.jp-Dialog button.jp-mod-warn').click()
        page.locator('.jp-Dialog').wait_for(state='detached')
        idle(page)
    page.locator('.jp-CodeCell .jp-InputPrompt').first.click()
    page.keyboard.press('a')
    page.keyboard.press('Enter')
    page.keyboard.insert_text("from qwen2vl_nb.all import *\nattach('../../runs/browser/train').watch()")
    page.keyboard.press('Shift+Enter')
    again = until(lambda: _picture(page), 'the curve after the restart')
    assert again not in shown[:3], 'what was logged before the restart is there'
    until(lambda: not run.is_running, 'the training')
    assert run.status == 'done'
    _says(page, 'train: done, step 85 of 85')
    until(lambda: _picture(page) == plot_loss(run)._repr_png_(), 'the whole curve, as it is drawn from the finished log')
    keep(page, 'tutorial-reattached')
    page.locator('.widget-vbox', has_text=re.compile(r'done, step 85 of 85, epoch [\d.]+, took 0:\d\d:\d\d, ended 20')).first.wait_for()

    def kept():
        "What the notebook keeps of the view."
        page.keyboard.press('Control+s')
        try: cells = json.loads((there/'car_item.ipynb').read_text())['cells']
        except ValueError: return # it is being written
        shown = [o['data'] for cell in cells if ''.join(cell['source']).endswith("train').watch()") for o in cell.get('outputs', [])]
        return shown and 'image/png' in shown[0] and ''.join(shown[0]['text/plain'])
    assert until(kept, 'the finished curve is saved with the notebook').startswith('train: done, step 85 of 85')
    menu(page, 'Settings', 'Theme', 'JupyterLab Dark')
    page.locator('body[data-jp-theme-light=false]').wait_for(state='attached')
    keep(page, 'tutorial-dark')
    menu(page, 'Settings', 'Theme', 'JupyterLab Light')

    idle(page)
    reload_page(page, there/'car_item.ipynb')
    until(lambda: _picture(page) == plot_loss(run)._repr_png_(), 'the view comes back by itself where the kernel lives on')

def _long_run(lab, page, few_steps, name):
    "A long run launched and watched in a notebook of its own."
    save_recipe(few_steps(output_dir=lab.root/name, max_steps=100_000), lab.root/f'{name}.yaml')
    notebook(lab.root/f'{name}.ipynb', [f"from qwen2vl_nb.all import *\nrun = launch(load_recipe('{name}.yaml'))\nrun.watch()", '1 + 1', 'run.watch()'])
    open_notebook(page, lab, f'{name}.ipynb')
    menu(page, 'Run', 'Run All Cells')
    until((lab.root/name/'waiter.json').exists, 'the launch')
    page.locator('.jp-OutputArea-output', has_text='2').first.wait_for()  # the cells below go on at once
    return attach(lab.root/name)

_ANSWERS = """import json
from qwen2vl_nb.all import *
cars = json.load(open('data/car_item/test.json'))
rows = [dict(id=f'car-{i}', images=[f"data/{car['images'][0]}"], prompt=car['instruction'], label=car['output'],
             predict=car['output'] if i % 3 else '{"item": "<b>truck</b>"}') for i, car in enumerate(cars)]
show_predictions(rows, n=4)"""

def test_predictions_are_paged_filtered_and_searched(lab, page):
    labels = [car['output'] for car in json.loads((ROOT/'data'/'car_item'/'test.json').read_text())]
    notebook(lab.root/'answers.ipynb', [_ANSWERS])
    open_notebook(page, lab, 'answers.ipynb')
    menu(page, 'Run', 'Run All Cells')
    view = page.locator('.widget-vbox')
    def shows(found):
        ids = [f'id car-{i}' for i in found[:4]]
        until(lambda: view.locator('small.t').all_text_contents() == ids, f'the cards of {ids}')
    shows(range(len(labels)))
    assert all(view.locator('img').evaluate_all('all => all.map(image => image.naturalWidth)')), 'the pictures are there'
    view.locator('button[title=Next]').click()
    shows(range(4, len(labels)))
    view.locator('select').select_option('wrong (34)')
    shows(range(0, len(labels), 3))
    view.get_by_placeholder('Search').fill('Yellow')
    page.keyboard.press('Enter')
    shows([i for i, label in enumerate(labels) if i % 3 == 0 and 'yellow' in label])
    assert view.locator('mark').count() and not view.locator('b', has_text='truck').count(), 'what differs is marked, and markup is text'
    keep(page, 'predictions')

_CHAT = """from qwen2vl_nb.all import *
served = serve('data/tiny_qwen2vl', 'warm', use_cpu=True, max_new_tokens=24)
served.chat('data/car_item/images/0001.png')"""

def test_a_model_is_asked_by_hand(lab, page):
    "With the keyboard alone, about a picture on the disk and one that is chosen in the browser; in a light and in a dark theme."
    notebook(lab.root/'chat.ipynb', [_CHAT])
    open_notebook(page, lab, 'chat.ipynb')
    menu(page, 'Run', 'Run All Cells')
    view, field = page.locator('.widget-vbox').first, page.get_by_placeholder('Ask something')
    field.wait_for()
    said = view.locator('[role=article]')
    field.focus()
    page.keyboard.type('What is <b>this</b>?')
    page.keyboard.press('Enter')
    until(lambda: said.count() == 2 and said.nth(1).inner_text().strip() not in ('Model', 'Model\n…') and not view.locator('button', has_text='Send').is_disabled(), 'the answer')
    assert 'What is <b>this</b>?' in said.nth(0).inner_text() and not view.locator('b').count()
    assert view.locator('img').first.evaluate('image => image.naturalWidth') > 0
    with page.expect_file_chooser() as chooser: view.locator('button', has_text='Pictures').press('Enter')
    chooser.value.set_files(str(ROOT/'data'/'car_item'/'images'/'0002.png'))
    until(lambda: '(1)' in view.locator('button').first.inner_text(), 'the picture is chosen')
    field.focus()
    page.keyboard.type('And this?')
    reached = []
    for _ in range(3):  # Send, New; Stop is disabled
        page.keyboard.press('Tab')
        reached.append(page.evaluate('document.activeElement.innerText.trim()'))
    assert reached[:2] == ['Send', 'New'], reached
    view.locator('button', has_text='Send').focus()
    page.keyboard.press('Enter')
    until(lambda: said.count() == 4 and said.nth(3).inner_text().strip() not in ('Model', 'Model\n…') and not view.locator('button', has_text='Send').is_disabled(), 'the second answer')
    assert view.locator('img').count() == 2
    keep(page, 'chat-light')
    assert min(map(contrast, said.all())) > 4.5 and field.is_visible()
    menu(page, 'Settings', 'Theme', 'JupyterLab Dark')
    page.locator('body[data-jp-theme-light=false]').wait_for(state='attached')
    assert min(map(contrast, said.all())) > 4.5
    keep(page, 'chat-dark')
    menu(page, 'Settings', 'Theme', 'JupyterLab Light')
    view.locator('button', has_text='New').press('Enter')
    until(lambda: not said.count(), 'a new dialogue')

@pytest.mark.soak
def test_buttons_and_failure(lab, page, few_steps):
    "Stop, Resume, and the cause in red; in a dark theme, too. And it takes next to nothing of the processor."
    run = _long_run(lab, page, few_steps, 'cars')
    assert len(_changes(page, run, 2)) == 2
    kernels = [p for p in lab.process.children(recursive=True) if 'ipykernel_launcher' in p.cmdline()]
    kernel = next(p for p in kernels if Path(p.cwd()) == lab.root)  # that of this notebook
    spent, began = sum(kernel.cpu_times()[:2]), time.time()
    time.sleep(25)
    share = (sum(kernel.cpu_times()[:2]) - spent)/(time.time() - began)
    print(f'the kernel takes {share:.2%} of one core')
    assert share < .05
    keep(page, 'light')

    page.locator('.widget-button', has_text='Stop').first.click()
    _says(page, 'cars: stopp')
    until(lambda: run.status == 'stopped', 'the stop')
    _says(page, 'cars: stopped')
    assert page.locator('.widget-button', has_text='Stop').first.is_disabled()
    before = _picture(page)
    page.locator('.widget-button', has_text='Resume').first.click()
    until(lambda: run.is_running, 'the start')
    _says(page, 'cars: running, step')
    until(lambda: _picture(page) != before, 'the curve goes on')

    menu(page, 'Settings', 'Theme', 'JupyterLab Dark')
    page.locator('body[data-jp-theme-light=false]').wait_for(state='attached')
    keep(page, 'dark')
    os.kill(state_or_empty(run, 'waiter.json')['child'], signal.SIGKILL)
    _says(page, 'SIGKILL')
    red = page.locator('.widget-vbox span', has_text='SIGKILL').first
    assert red.evaluate('e => getComputedStyle(e).color') == 'rgb(214, 69, 69)'
    assert not page.locator('.widget-button', has_text='Resume').first.is_disabled()
    keep(page, 'failed')

_MATHS = ['$5 and $6', r'\(x\)', r'\[y\]', r'\begin{equation}z\end{equation}']
_SHOWN_AS_TEXT = {  # a cell each, and whether it has the texts themselves
    'import json': """
from pathlib import Path
from IPython.display import HTML, display
from PIL import Image
from qwen2vl_nb.all import *
texts = MATHS
def lines(path, rows):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(''.join(json.dumps(row) + '\\n' for row in rows))
samples = [dict(instruction=f'<image>{t}', output=t, images=[f'maths/{t}.png']) for t in texts]
rows = [dict(row=i, id=t, images=[f'maths/{t}.png'], prompt=t, label=t, predict=t, engine='hf') for i, t in enumerate(texts)]
lines('maths/out/predictions.jsonl', rows)
for i, t in enumerate(texts):
    Image.new('RGB', (56, 56), (60*i, 90, 90)).save(f'maths/{t}.png')
    lines(f'maths/runs/{t}/run.json', [dict(nproc=1)])
    lines(f'maths/runs/{t}/trainer_log.jsonl', [dict(current_steps=n, total_steps=9, loss=1/n, remaining_time=t) for n in range(1, 10)])
    lines('maths/log/trainer_log.jsonl', [dict(current_steps=n, loss=1., remaining_time=t) for n, t in enumerate(texts)])
entry = {'file_name': 'none.json', 'columns': {'prompt': 'instruction', 'response': 'output'}}
lines('maths/dataset_info.json', [{t: entry for t in texts}])
registry = Registry('maths')
recipe = train_recipe('data/tiny_qwen2vl', 'car_item', 'maths/train', dataset_dir='data')
scores = score(rows, measures={t: lambda row: 1 for t in texts})
fields = score([dict(id=t, label=json.dumps({t: 1}), predict=json.dumps({t: 1})) for t in texts])
comparison = compare(rows, [row | dict(predict='no') for row in rows])
""",
    'check_samples(samples + [s | dict(images=[f"gone/{s[\'output\']}.png"]) for s in samples])': _MATHS,
    'show_samples(samples)': _MATHS,
    'describe_samples(samples)': [],
    'count_tokens(samples)': [],
    'registry.check()': _MATHS,
    'registry.find()': _MATHS,
    'show_predictions(rows)': _MATHS,
    'HTML(show_predictions(rows)._repr_html_())': _MATHS,
    'scores': _MATHS,
    'scores.by("prompt")': _MATHS,
    'scores.rows': _MATHS,
    'scores.overall': _MATHS,
    'scores.rows.head()[["id"]]': _MATHS,
    'fields.fields': _MATHS,
    'comparison': [],
    'comparison.changed': _MATHS,
    'comparison.table': [],
    'runs("maths/runs")': _MATHS,
    'read_log("maths/log")': _MATHS,
    'Predictions("maths/out").to_pandas()': _MATHS,
    'display(*[watch_loss(f"maths/runs/{t}") for t in texts])': _MATHS,
    'zero_table(recipe, gpus=2, gpu_gib=24)': [],
    'zero_table(recipe, gpus=2, gpu_gib=24).to_pandas()': [],
}
_TYPESET = "display(HTML('<p>$x^2$</p>'))"

def test_only_what_is_marked_up_as_maths_is_typeset(lab, page):
    first, *rest = _SHOWN_AS_TEXT
    setup = f'{first}{_SHOWN_AS_TEXT[first]}'.replace('MATHS', repr(_MATHS))
    notebook(lab.root/'maths.ipynb', [setup, *rest, _TYPESET])
    open_notebook(page, lab, 'maths.ipynb')
    menu(page, 'Run', 'Run All Cells')
    outputs = page.locator('.jp-CodeCell')
    errors = page.locator('[data-mime-type="application/vnd.jupyter.stderr"], [data-mime-type="application/vnd.jupyter.error"]')
    typeset = outputs.last.locator('mjx-container')
    until(lambda: typeset.count() or errors.count(), 'the control is typeset')
    assert not errors.count(), errors.all_text_contents()
    page.locator('.widget-vbox', has_text=_MATHS[-1]).last.wait_for()
    for k, code in enumerate(rest, 1):
        cell = outputs.nth(k).locator('.jp-OutputArea')
        assert cell.locator('.jp-OutputArea-output').count(), f'{code} shows something'
        assert not cell.locator('mjx-container, .MathJax').count(), f'{code} is not typeset'
        shown = cell.inner_text()
        assert all(text in shown for text in _SHOWN_AS_TEXT[code]), (code, shown)
