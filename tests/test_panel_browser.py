"""The panel from end to end, as somebody uses it: JupyterLab in a browser, with mouse and keyboard, from a spreadsheet with faults to a score.

Pictures of what was to be seen are kept in `test-artefacts`."""
import json, re, shutil

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from conftest import KEPT, PATIENCE, ROOT, until
from lab import contrast, idle, menu, notebook, open_notebook, reload_page, running_lab
from qwen2vl_nb.display import grid_style
from qwen2vl_nb.panel.form import Panel
from qwen2vl_nb.panel.session import keep_value, run_action
from qwen2vl_nb.panel.shown import STYLE, as_widget, code_html
from qwen2vl_nb.panel.texts import ENGLISH
from qwen2vl_nb.recipe import train_recipe, with_time
from qwen2vl_nb.run.start import attach, launch

ROWS, TEST_ROWS = 120, 20
N_STEPS = 120 # Enough to be seen at work, stopped and resumed on a fast machine
STEPS = 'data', 'split', 'model', 'recipe', 'memory', 'launch', 'runs', 'checkpoints', 'predict', 'score'

def _spreadsheet(folder):
    "A spreadsheet from somebody's desk with faults in three rows, for two of which there is no picture."
    data = ROOT/'data'/'car_item'
    shutil.copytree(data/'images', folder/'images')
    table = pd.read_csv(data/'labels.csv').head(ROWS)
    table.loc[3, 'picture'] = 'images/gone.png'
    table.loc[5, 'card'] = None
    broken = folder/'images'/'broken.png'
    broken.write_bytes((folder/table.picture[7]).read_bytes()[:200])
    table.loc[7, 'picture'] = 'images/broken.png'
    table.to_excel(folder/'labels.xlsx', index=False)

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp('panel')
    _spreadsheet(root)
    (root/'model').symlink_to(ROOT/'data'/'tiny_qwen2vl')
    for name in ('form', 'second'): notebook(root/f'{name}.ipynb', ['from qwen2vl_nb.all import *\nPanel()'])
    with running_lab(root) as lab: yield lab

class Form:
    "The panel on a page."
    def __init__(self, page): self.page, self.at = page, page.locator('.qvl')

    def button(self, name): return self.at.locator('button', has_text=re.compile(rf'^\s*{name}\s*$'))

    def tab(self, step): return self.button(rf'\d+ {ENGLISH[step]}')

    def go(self, step):
        self.tab(step).click()
        self.at.get_by_text(ENGLISH[f'{step}.about'][:60]).first.wait_for()

    def control(self, name): return self.at.get_by_label(ENGLISH[name], exact=True)

    def fill(self, step, **values):
        "Type values into fields, with the keyboard."
        for name, value in values.items():
            field = self.control(f'{step}.{name}')
            field.focus()
            self.page.keyboard.press('Control+a')
            self.page.keyboard.type(str(value))
            self.page.keyboard.press('Tab')

    def choose_by_key(self, name, key, becomes):
        "Choose in a list with the keyboard, which JupyterLab must leave to it."
        self.control(name).focus()
        self.page.keyboard.press(key)
        assert self.control(name).evaluate('e => e.options[e.selectedIndex].text').replace('\xa0', ' ') == becomes
        assert self.control(name).evaluate('e => e == document.activeElement')

    def press(self, action): self.button(ENGLISH[action]).and_(self.page.locator(':not(.qvl-held)')).click()
    def says(self, text): self.at.get_by_text(text).first.wait_for()
    def code(self): return '\n'.join(self.at.locator('.qvl-code pre').all_inner_texts())

    def is_ready(self):
        at_work = ENGLISH['panel.running'], ENGLISH['runs.listing'], ENGLISH['memory.computing']
        return not any(self.at.get_by_text(text, exact=True).count() for text in at_work)

    def keep(self, name):
        self.at.scroll_into_view_if_needed()
        self.page.screenshot(path=KEPT/f'panel-{name}.png')

    def missed(self):
        "The controls that Tab does not reach from the first tab of the panel on, and how many it reaches."
        self.at.locator('button').first.focus()
        while self.at.evaluate('root => root.contains(document.activeElement) && (document.activeElement.dataset.reached = true)'):
            self.page.keyboard.press('Tab')
        script = """root => {
            const there = [...root.querySelectorAll('button, input, select, textarea')].filter(e => !e.disabled && e.offsetParent)
            const missed = there.filter(e => !e.dataset.reached).map(e => e.outerHTML)
            there.forEach(e => delete e.dataset.reached)
            return [missed, there.length]
        }"""
        return self.at.evaluate(script)

    def state(self):
        "What each step shows that its files say: values of its form, its code, and its tables."
        shown = {}
        for step in STEPS:
            self.go(step)
            until(self.is_ready, f'{step} is ready')
            code = ENGLISH['panel.code'], ENGLISH['panel.no_code']
            if step != 'model': until(lambda: any(self.at.get_by_text(text, exact=True).count() for text in code), f'the code of {step}')
            values = self.at.locator('input, select').evaluate_all('all => all.map(e => e.type == "checkbox" ? e.checked : e.value)')
            shown[step] = values, ''.join(self.at.locator('.qvl-code pre').all_inner_texts()[-1:]).strip()
        return shown

def _cells(path): return {c.id: c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == 'code'}

def _run_all(page):
    menu(page, 'Run', 'Run All Cells')
    page.locator('.qvl').wait_for()
    return Form(page)

def _prepared(form):
    "From the spreadsheet to the recipe."
    form.go('data')
    form.fill('data', source='labels.xlsx')
    form.at.locator('datalist option[value=picture]').first.wait_for(state='attached')
    form.fill('data', image='picture', prompt='Fill in the item card.', response='card')
    form.page.keyboard.press('Shift+Tab')
    form.page.keyboard.press('Enter')
    form.says('labels.xlsx: 120 rows')
    form.press('data.check')
    form.says(ENGLISH['data.found'].format(n=3, rows=3))
    form.keep('faults')
    form.press('data.drop')
    form.says('Dropped 2 of 120')
    form.at.locator('.qvl-shown td', has_text='dropped').nth(1).wait_for()
    form.keep('dropped')
    form.go('split')
    form.fill('split', test='20', name='cars')
    form.choose_by_key('split.media', 'ArrowDown', ENGLISH['split.copy'])
    form.choose_by_key('split.media', 'ArrowUp', ENGLISH['split.refer'])
    form.press('split.register')
    form.says('cars_test')
    form.go('model')
    form.fill('model', model='model')
    form.says(ENGLISH['model.folder'].format(family='Qwen2-VL', template='qwen2_vl'))
    form.go('recipe')
    form.fill('recipe', learning_rate='3e-3', max_steps=N_STEPS, per_device_train_batch_size=8, gradient_accumulation_steps=1, save_steps=N_STEPS//2)
    form.press('recipe.make')
    form.says(ENGLISH['recipe.whole'].format(memory=ENGLISH['memory']))
    form.go('memory')
    form.press('memory.pick')
    form.says('recipe = pick_zero(')

def _trained(form, root):
    "The launch, stopped, resumed, and watched until its end."
    form.go('launch')
    form.fill('launch', name='cars')
    form.press('launch.start')
    waiter, = until(lambda: [*root.glob('runs/cars-*/waiter.json')], 'the launch')
    form.says(re.compile(rf'cars-\d+-\d+: running, step \d+ of {N_STEPS}'))
    form.button('Stop').click()
    form.says(re.compile(rf'cars-\d+-\d+: stopped, step \d+ of {N_STEPS}'))
    form.says('"Score the checkpoints" in the step "Checkpoints" scores the answers that it gives so far.')
    form.button('Resume').click()
    form.says(re.compile(rf'cars-\d+-\d+: running, step \d+ of {N_STEPS}'))
    form.keep('training')
    form.go('runs')
    form.says(re.compile(rf'cars-\d+-\d+: done, step {N_STEPS} of {N_STEPS}'))
    until(lambda: 'done' in form.control('runs.run').inner_text(), 'the list says so')
    return attach(waiter.parent)

def _started_by_somebody_else(form, root):
    "A run of code in the same folder, in its default place, which the list shows by itself, and the chosen one stays; that fails, and is looked at."
    chosen, = form.control('runs.run').locator('option:checked').all_inner_texts()
    few = dict(max_steps=1, use_cpu=True, bf16=None, preprocessing_num_workers=None)
    recipe = train_recipe(root/'model', 'cars', root/with_time('saves/model/lora/others'), dataset_dir=root/'data', **few)
    (root/'images').rename(root/'away')
    other = launch(recipe, force=True)
    line = form.control('runs.run').locator('option', has_text=re.compile('saves/model/lora/others-.*failed'))
    line.wait_for(state='attached')
    (root/'away').rename(root/'images')
    assert form.control('runs.run').locator('option:checked').all_inner_texts() == [chosen] and not other.is_running
    form.control('runs.run').select_option(label=line.inner_text())
    form.press('runs.choose')
    form.says('Was it moved after the launch?')
    form.says('There is no complete checkpoint: "Launch" in the step "Launch" starts from the beginning.')
    assert form.button('Resume').is_disabled()
    form.keep('failed')
    form.control('runs.run').select_option(label=chosen)
    form.press('runs.choose')
    form.says(re.compile(rf'cars-\d+-\d+: done, step {N_STEPS} of {N_STEPS}'))

def _answered(form):
    "Checkpoints by answers, predictions before and after, scores and answers."
    form.go('checkpoints')
    form.fill('checkpoints', max_new_tokens=24)
    form.press('checkpoints.score')
    form.says('Best by json')
    form.keep('checkpoints')
    form.go('predict')
    form.fill('predict', max_new_tokens=24)
    for action in ('predict.before', 'predict.after'):
        form.press(action)
        form.at.get_by_text('20 rows have an answer of ').nth(int(action == 'predict.after')).wait_for()
    form.go('score')
    form.press('score.scores')
    form.says('20 rows; in percent, with 95 % intervals')
    form.press('score.compare')
    form.says('McNemar')
    form.press('score.show')
    until(lambda: form.at.locator('img').evaluate_all('all => all.length && all.every(image => image.naturalWidth)'), 'the pictures')

def test_code_is_not_broken_on_a_narrow_page(lab, page):
    "A long line scrolls, inside of the output."
    cell = """from ipywidgets import HTML, VBox
from qwen2vl_nb.panel.shown import STYLE, code_html
line = "recipe = train_recipe('models/Qwen2-VL-7B-Instruct', 'my_cars', num_train_epochs=3, learning_rate=1e-4, lora_rank=16)"
shown = VBox([HTML(STYLE), HTML(code_html(f'{line}\\n{line}'))])
shown.add_class('qvl')
shown"""
    notebook(lab.root/'code.ipynb', [cell])
    page.set_viewport_size(dict(width=700, height=900))
    open_notebook(page, lab, 'code.ipynb')
    form = _run_all(page)
    code = form.at.locator('.qvl-code pre')
    code.wait_for()
    height, scrolls, is_inside = code.evaluate("""e => [(e.clientHeight - 16)/parseFloat(getComputedStyle(e).lineHeight),
        e.scrollWidth > e.clientWidth, e.getBoundingClientRect().right < e.closest('.jp-OutputArea-output').getBoundingClientRect().right]""")
    assert round(height, 1) == 2 and scrolls and is_inside

def test_from_a_spreadsheet_with_faults_to_a_score(lab, page):
    open_notebook(page, lab, 'form.ipynb')
    form = _run_all(page)
    _prepared(form)
    run = _trained(form, lab.root)
    _started_by_somebody_else(form, lab.root)
    _answered(form)
    form.keep('scores')
    before, after = (float(n) for n in re.search(r'json: (\d+) of 20 right before, (\d+) after', form.at.inner_text()).groups())
    assert (before, run.recipe['max_steps']) == (0, N_STEPS) and after > before

    # what is shown is what is in the notebook
    shown, cells = form.state(), _cells(lab.root/'panel.ipynb')
    for step in set(STEPS) - {'model'}: assert shown[step][1] == '\n'.join(text for id, text in cells.items() if id.startswith(f'{step}-')), step

    # Tab reaches everything
    for step in ('data', 'recipe', 'runs', 'score'):
        form.go(step)
        missed, there = form.missed()
        assert not missed and there > len(STEPS), step

    # a kernel that was restarted, and a second page with a kernel of its own
    form.at.locator('.qvl-code').last.scroll_into_view_if_needed()
    menu(page, 'Kernel', 'Restart Kernel…')
    page.locator('.jp-Dialog button.jp-mod-warn').click()
    page.locator('.jp-Dialog').wait_for(state='detached')
    page.get_by_text(ENGLISH['panel.run_again']).wait_for()
    assert 0 < page.get_by_text(ENGLISH['panel.run_again']).bounding_box()['y'] < 1100, 'it is seen from below, too'
    form.keep('restarted')
    signs = "all => all.filter(e => getComputedStyle(e, '::before').display != 'none').length"
    assert page.locator('.jupyter-widgets-disconnected').count() and not page.locator('.jupyter-widgets-disconnected').evaluate_all(signs)
    reload_page(page, lab.root/'form.ipynb')
    idle(page)
    page.get_by_text(ENGLISH['panel.run_again']).wait_for()
    again = _run_all(page)
    page.get_by_text(ENGLISH['panel.run_again']).wait_for(state='hidden')
    until(lambda: 'McNemar' in again.at.inner_text() and again.at.locator('img').count(), 'the scores and the answers come back by themselves')
    assert again.state() == shown
    second = page.context.browser.new_page(viewport=dict(width=700, height=1100))
    second.set_default_timeout(PATIENCE*1000)
    open_notebook(second, lab, 'second.ipynb')
    other = _run_all(second)
    assert other.state() == shown
    again.go('launch')
    again.fill('launch', name='other')
    other.go('launch')
    until(lambda: other.control('launch.name').input_value() == 'other', 'the second page shows what was typed in the first')

    # dark, too
    menu(page, 'Settings', 'Theme', 'JupyterLab Dark')
    page.locator('body[data-jp-theme-light=false]').wait_for(state='attached')
    assert min(map(contrast, again.at.locator('.qvl-help, .qvl-code pre, .widget-label').all())) > 4.5
    again.keep('dark')

    # the notebook runs from top to bottom
    nb = nbformat.read(lab.root/'panel.ipynb', as_version=4)
    NotebookClient(nb, timeout=None, resources={'metadata': {'path': str(lab.root)}}).execute()
    assert len([*lab.root.glob('runs/cars-*/waiter.json')]) == 1, 'the chosen run is attached to'
    texts = [json.dumps(c.outputs) for c in nb.cells if c.cell_type == 'code']
    assert any('McNemar' in text for text in texts)

CLIPPED = """root => {
    const right = e => e.getBoundingClientRect().right, shown = [...root.querySelectorAll('*')].filter(e => e.checkVisibility() && e.clientWidth)
    const wide = shown.filter(e => right(e) > right(root) + 1 && !e.closest('.qvl-shown, .qvl-code, select'))
    const moved = shown.filter(e => e.matches('.widget-box') && e.scrollWidth > e.clientWidth)
    const low = shown.filter(e => e.matches('.widget-dropdown > select') && e.clientHeight < 24)
    return [wide, moved, low].map(all => all.map(e => e.outerHTML.slice(0, 200)))
}"""

def test_a_page_of_any_width_clips_nothing_and_a_folder_that_jupyterlab_does_not_show_has_no_dead_link(lab, page, tmp_path):
    _spreadsheet(tmp_path)
    panel = Panel(tmp_path)
    keep_value(panel.session.project, 'data', source='labels.xlsx', image='picture', prompt='What is this?', response='card')
    keep_value(panel.session.project, 'model', model=str(ROOT/'data'/'tiny_qwen2vl'))
    for action in ('data.read', 'data.check', 'split.register', 'recipe.make'): run_action(panel.session, action)
    notebook(lab.root/'narrow.ipynb', [f'from qwen2vl_nb.all import *\nPanel({str(tmp_path)!r})'])
    open_notebook(page, lab, 'narrow.ipynb')
    page.keyboard.press('Control+b')
    form = _run_all(page)
    form.says(f'jupyter lab {tmp_path}/panel.ipynb')
    assert not form.at.locator('a').count()
    for width in 1000, 700, 400:
        page.set_viewport_size(dict(width=width, height=1100))
        for step in STEPS:
            form.go(step)
            until(form.is_ready, f'{step} is ready')
            assert form.at.evaluate(CLIPPED) == [[], [], []], (width, step)
    form.go('data')
    form.keep('narrow')
    findings = form.at.locator('.qvl-shown table').last
    assert findings.evaluate('e => e.scrollWidth > e.closest(".qvl-shown").clientWidth'), 'it is scrolled by itself'
    form.go('split')
    form.press('split.plot')
    plots = form.at.locator('.qvl-shown svg')
    plots.wait_for()
    assert plots.bounding_box()['width'] > 600 and form.at.evaluate(CLIPPED) == [[], [], []]
    form.keep('narrow-plots')

def test_no_card_of_answers_is_cut_off_in_a_notebook(lab, page):
    cell = f"""from qwen2vl_nb.prediction.show import PredictionView
picture = {str(ROOT/'data'/'car_item'/'images'/'0001.png')!r}
PredictionView([dict(id=i, images=[picture], prompt='What is this?', label='A car.', predict='A bus.') for i in range(8)], n=8)"""
    notebook(lab.root/'cards.ipynb', [cell])
    page.set_viewport_size(dict(width=1300, height=900))
    open_notebook(page, lab, 'cards.ipynb')
    menu(page, 'Run', 'Run All Cells')
    cards = page.locator('.jp-OutputArea-output [style*=radius]')
    cards.nth(7).wait_for()
    right = "all => all.map(e => e.getBoundingClientRect().right - e.closest('.jp-OutputArea-output').getBoundingClientRect().right)"
    assert max(cards.evaluate_all(right)) <= 0
    assert len({box.bounding_box()['x'] for box in cards.all()}) > 2

def test_the_pager_of_answers_stays_one_line_on_a_narrow_page(lab, page):
    cell = """from ipywidgets import HTML, VBox
from qwen2vl_nb.panel.shown import STYLE
from qwen2vl_nb.prediction.show import PredictionView
shown = VBox([HTML(STYLE), PredictionView([dict(id=i, prompt='1+1?', label='2', predict='2') for i in range(20)], n=4)])
shown.add_class('qvl')
shown"""
    notebook(lab.root/'pager.ipynb', [cell])
    page.set_viewport_size(dict(width=400, height=900))
    open_notebook(page, lab, 'pager.ipynb')
    page.keyboard.press('Control+b')
    form = _run_all(page)
    form.says('of 5')
    form.keep('narrow-pager')
    boxes = [part.bounding_box() for part in form.at.locator('.qvl-pager > *').all()]
    assert len(boxes) == 4 and max(b['y'] for b in boxes) < min(b['y'] + b['height'] for b in boxes), boxes
    assert max(b['x'] + b['width'] for b in boxes) <= 400

HINTS = """root => {
    const all = [...root.querySelectorAll('.qvl-below')].filter(e => e.checkVisibility())
    const beside = all.filter(e => e.getBoundingClientRect().top < e.previousElementSibling.getBoundingClientRect().bottom - 1)
    return [all.length, beside.map(e => e.textContent)]
}"""

def test_fields_keep_what_is_typed_say_what_is_allowed_and_have_their_hints_below(lab, page, tmp_path):
    panel = Panel(tmp_path)
    keep_value(panel.session.project, 'model', model=str(ROOT/'data'/'tiny_qwen2vl'))
    notebook(lab.root/'fields.ipynb', [f'from qwen2vl_nb.all import *\nPanel({str(tmp_path)!r})'])
    open_notebook(page, lab, 'fields.ipynb')
    form = _run_all(page)
    form.go('data')
    wide = form.control('data.prompt').evaluate('e => e.getBoundingClientRect().right/e.closest(".qvl").getBoundingClientRect().right')
    assert wide > .95, 'a whole question can be read'
    form.go('recipe')
    typed = dict(num_train_epochs='2,5', per_device_train_batch_size='-5', learning_rate='3e-3x')
    form.fill('recipe', **typed)
    for name, text in typed.items():
        form.at.locator('.qvl-below', has_text=f'"{text}" can’t be used for "{ENGLISH[f"recipe.{name}"]}"').wait_for()
        assert form.control(f'recipe.{name}').input_value() == text
    form.press('recipe.make')
    form.at.locator('.qvl-error').wait_for()
    assert form.at.locator('.qvl-error').inner_text().count(' can’t be used for ') == 3 and not (tmp_path/'panel.ipynb').exists()
    form.keep('refused')
    form.fill('recipe', num_train_epochs='2.5', per_device_train_batch_size='5', learning_rate='3e-3', dataset='cars')
    form.at.get_by_text('can’t be used').first.wait_for(state='detached')
    for words, text in (('group_by_length', 'true'), ('lora_dropout', '')):
        form.control('recipe.find').fill(words)
        form.at.locator('.widget-hbox', has=page.locator('b', has_text=words)).locator('button').last.click()
        until(lambda: form.at.get_by_label(words, exact=True).input_value() == text, f'{words} is there')
    form.press('recipe.make')
    form.at.locator('summary').click()
    whole = form.at.locator('details pre')
    lines = whole.inner_text().splitlines()
    assert {'num_train_epochs: 2.5', 'learning_rate: 0.003', 'group_by_length: true'} <= {*lines} and 'dropout' not in whole.inner_text()
    assert 'mono' in whole.evaluate('e => getComputedStyle(e).fontFamily')
    page.keyboard.press('Control+b')
    for width in (1300, 400):
        page.set_viewport_size(dict(width=width, height=1100))
        for step in STEPS:
            form.go(step)
            until(form.is_ready, f'{step} is ready')
            n, beside = form.at.evaluate(HINTS)
            assert n and not beside or step in ('model', 'runs'), step
            assert form.at.evaluate(CLIPPED) == [[], [], []], step

def test_a_list_of_folders_keeps_its_place_and_the_focus(lab, page, tmp_path):
    for name in (*(f'{i:02}' for i in range(30)), 'last/inner'): (tmp_path/name).mkdir(parents=True)
    notebook(lab.root/'folders.ipynb', [f'from qwen2vl_nb.all import *\nPanel({str(tmp_path)!r})'])
    open_notebook(page, lab, 'folders.ipynb')
    form = _run_all(page)
    form.go('data')
    form.at.get_by_title(ENGLISH['data.media_dir'], exact=True).click()
    shown, scrolled = form.at.locator('.qvl-list').last, 'e => e.scrollTop'
    shown.get_by_text('29/').click()
    form.says('There are no files in 29. There is nothing more to choose in it.')
    assert shown.evaluate(scrolled) > 100 and shown.locator('.fa-check').is_visible()
    shown.get_by_text('last/').focus()
    page.keyboard.press('Enter')
    shown.get_by_text('inner/').wait_for()
    page.wait_for_function('document.activeElement.innerText.includes("one folder up")')
    assert shown.evaluate(scrolled) == 0
    form.keep('folders')
    page.keyboard.press('Enter')
    until(lambda: form.control('data.media_dir').input_value() == '.', 'the path is relative')
    form.fill('data', media_dir='lost')
    form.says(ENGLISH['panel.missing'])

@pytest.mark.parametrize('width, abreast', [(400, 2), (150, 1), (1100, 4)])
def test_cards_code_and_tall_tables_can_be_read_at_any_width(page, width, abreast):
    "Cards are next to each other where there is room; the button doesn't cover the code, and a table that goes on fades."
    page.set_viewport_size(dict(width=width + 16, height=900))
    tall = as_widget(pd.DataFrame({'n': range(50)})).value
    cards = f'<div id="cards" style="{grid_style(4, 250)}">{"<article>unbelievable</article>"*8}</div>'
    page.set_content(f'<!DOCTYPE html>{STYLE}<body style="margin:8px"><div class="qvl">{code_html("x = 1")}{tall}{cards}</div>')
    at = page.locator('article').evaluate_all('all => all.map(e => e.getBoundingClientRect().toJSON())')
    assert len({box['left'] for box in at}) == abreast and min(box['width'] for box in at) >= min(130, width)
    button, code = (page.locator(f'.qvl-code {tag}').bounding_box() for tag in ('button', 'pre'))
    assert width > 480 or button['y'] + button['height'] <= code['y']
    edge = page.locator('.qvl-shown').evaluate('e => [getComputedStyle(e, "::after").position, e.scrollHeight > e.clientHeight]')
    assert edge == ['sticky', True]
