"The panel: what its files keep, what they can't do, and the notebook that it writes."
import html, json, os, shutil, subprocess, sys, threading
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from PIL import Image

from conftest import until
from qwen2vl_nb.data.sources import read_samples
from qwen2vl_nb.execute import execute
from qwen2vl_nb.panel.data_step import column_names
from qwen2vl_nb.panel.form import Panel
from qwen2vl_nb.panel.launch_step import choose
from qwen2vl_nb.panel.session import NOTEBOOK, PANEL, form_values, keep_value, run_action, what_ran
from qwen2vl_nb.prediction.serve import serve
from qwen2vl_nb.recipe import load_recipe, save_recipe, train_recipe
from qwen2vl_nb.run.folder import ENDED, RECIPE, RUN
from qwen2vl_nb.run.start import attach, launch
from qwen2vl_nb.stack import gpus

@contextmanager
def held(served):
    "A model that is kept loaded, until the end of the block."
    try: yield served
    finally: served.stop(patience=0)

COLOURS = ['red', 'green', 'blue', 'white']

def fill(panel, step, **values):
    "Put values into the controls of a step, as a browser does."
    panel.steps[step].view
    for name, value in values.items(): panel.steps[step].controls[name].value = value

def unchanged(path):
    "What changes with a file, a link or a folder."
    s = os.lstat(path)
    return s.st_ino, s.st_mode, s.st_size, s.st_mtime_ns

def press(panel, action):
    "Run an action, and return its box."
    step = panel.steps[action.partition('.')[0]]
    step.view
    box = step.boxes[action]
    box.start()
    box.wait()
    return box

def opened(folder):
    "Another panel on the folder, at its first step."
    panel = Panel(folder)
    panel.go('data')
    return panel

def shown(box): return ' '.join([box.line.value, *(w.value for w in box.result.children if hasattr(w, 'value') and isinstance(w.value, str))])

@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A folder with a spreadsheet, in which one picture is missing and one is cut off; the panel runs in it."
    (tmp_path/'photos').mkdir()
    for i in range(24): Image.new('RGB', (56, 56), (10*i, 90, 120)).save(tmp_path/'photos'/f'{i}.png')
    cut = tmp_path/'photos'/'3.png'
    cut.write_bytes(cut.read_bytes()[:60])
    rows = pd.DataFrame({'photo': [f'photos/{i}.png' for i in range(25)], 'caption': [f'{COLOURS[i%4]} {i}' for i in range(25)]})
    rows.to_excel(tmp_path/'labels.xlsx', index=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path

@pytest.fixture
def filled(folder, tiny):
    "A panel that has gone from the spreadsheet to the recipe."
    panel = Panel()
    fill(panel, 'model', model=str(tiny))
    fill(panel, 'data', source='labels.xlsx', image='photo', prompt='What colour is it?', response='caption')
    fill(panel, 'split', name='colours', test=.25)
    fill(panel, 'recipe', num_train_epochs=2., bf16=False)
    fill(panel, 'memory', gpus=2, gpu_gib=80.)
    for action in ('data.read', 'data.check', 'data.drop', 'split.register', 'recipe.make', 'memory.pick'):
        box = press(panel, action)
        assert 'qvl-error' not in shown(box), shown(box)
    return panel

def described(panel):
    "What a panel shows: values, code, marks, and what was printed."
    panel.refresh()
    names = ['data', 'split', 'model', 'recipe', 'memory']
    for name in names:
        panel.steps[name].view
        panel.steps[name].refresh()
    steps = {name: panel.steps[name] for name in names}
    return {name: [{k: c.value for k, c in step.controls.items()}, step.code.value, step.is_done, panel.tabs[name].icon] for name, step in steps.items()}

def test_a_spreadsheet_with_faults_becomes_registered_data_and_a_recipe(filled, folder):
    findings = filled.session.names['findings']
    assert {3, 24} <= {*findings.row} and 'photos/24.png' in ' '.join(findings.what)
    rows = json.loads((folder/'data'/'colours.json').read_text()) + json.loads((folder/'data'/'colours_test.json').read_text())
    assert len(rows) == 23 and {*json.loads((folder/'data'/'dataset_info.json').read_text())} == {'colours', 'colours_test'}
    recipe = filled.session.names['recipe']
    assert recipe['dataset'] == 'colours' and recipe['num_train_epochs'] == 2 and 'bf16' not in recipe and recipe['deepspeed']

def test_another_kernel_shows_the_same_and_runs_nothing(filled, folder):
    here = described(filled)
    code = f'''
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_panel import Panel, described
panel = Panel()
print(json.dumps([described(panel), list(panel.session.names)]))'''
    before = {p: p.stat().st_mtime_ns for p in folder.rglob('*')}
    there, names = json.loads(subprocess.check_output([sys.executable, '-c', code], cwd=folder, text=True).splitlines()[-1])
    assert there == json.loads(json.dumps(here)) and names == []
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob('*')}

def test_the_notebook_does_the_same_again_in_a_fresh_kernel(filled, folder, tmp_path_factory):
    nb = nbformat.read(folder/NOTEBOOK, as_version=4)
    nbformat.validate(nb)
    ran = {c.id: c.source for c in nb.cells if c.cell_type == 'code'}
    assert [*ran] == ['names', 'data-read', 'data-check', 'data-drop', 'split-register', 'recipe-make', 'memory-pick']
    for action in what_ran(filled.session.project): assert ran[action.replace('.', '-')] == filled.session.code(action)
    again = tmp_path_factory.mktemp('again')
    shutil.copy(folder/'labels.xlsx', again)
    shutil.copytree(folder/'photos', again/'photos')
    nb.cells.append(nbformat.v4.new_code_cell('import json\nprint(json.dumps(recipe, sort_keys=True))'))
    nbformat.write(nb, again/NOTEBOOK)
    execute(again/NOTEBOOK)
    done = nbformat.read(again/NOTEBOOK, as_version=4)
    whole = lambda recipe: {k: v for k, v in recipe.items() if k != 'output_dir'}  # which has the time in its name
    assert whole(json.loads(done.cells[-1].outputs[0].text)) == whole(json.loads(json.dumps(filled.session.names['recipe'])))
    for name in ('colours.json', 'colours_test.json', 'dataset_info.json'):
        same = [(where/'data'/name).read_text().replace(str(where), '') for where in (folder, again)]
        assert same[0] == same[1]

def test_other_data_make_what_came_from_the_old_ones_out_of_date(filled, folder):
    (folder/'labels.xlsx').rename(folder/'other.xlsx')
    fill(filled, 'data', source='other.xlsx')
    press(filled, 'data.read')
    assert {*what_ran(filled.session.project)} == {'data.read', 'recipe.make', 'memory.pick'}
    assert (folder/'data'/'colours.json').exists()

def make_run(run, returncode=0):
    "The folder of a run that has ended."
    run.mkdir(parents=True)
    files = {RUN: dict(host='', env={}, inherited={}, nproc=1, nnodes=1, node_rank=0, id=''), ENDED: dict(returncode=returncode, asked=False)}
    for name, value in files.items(): (run/name).write_text(json.dumps(value))
    return run

def test_a_training_is_done_when_it_has_ended_and_did_not_fail(filled, folder):
    "The tick goes and comes without anything being pressed; where another run is shown is said."
    given = {'launch.start': dict(run='runs/a', folder='runs', name='', nproc=0)}
    with filled.session.project.edit() as state: state['ran'] |= {'launch.start': dict(given=given, when=1., said='')}
    ticks = lambda: [bool(filled.tabs[name].icon) for name in ('launch', 'runs')]
    filled._repr_mimebundle_()
    run = make_run(folder/'runs'/'a', returncode=1)
    choose(filled.steps['runs'], run)
    filled.refresh()
    assert ticks() == [False, False]
    (run/ENDED).write_text(json.dumps(dict(returncode=0, asked=False)))
    until(lambda: ticks() == [True, True])
    (run/ENDED).write_text(json.dumps(dict(returncode=1, asked=True)))  # it was stopped
    until(lambda: ticks() == [False, False])
    choose(filled.steps['runs'], make_run(folder/'runs'/'b'))
    filled.go('launch')
    assert 'The chosen run is runs/b: the step &quot;Runs&quot; shows it.' in filled.steps['launch'].elsewhere.value

def test_a_new_split_makes_a_training_and_its_answers_out_of_date(filled):
    given = {'launch.start': dict(run='runs/a', folder='runs', name='', nproc=0)}
    names = 'launch.start', 'checkpoints.score', 'predict.after', 'score.scores'
    with filled.session.project.edit() as state: state['ran'] |= {name: dict(given=given.get(name, {}), when=1., said='') for name in names}
    ticks = lambda: [name for name, tab in filled.tabs.items() if tab.icon]
    press(filled, 'split.register')
    assert {*names} < {*what_ran(filled.session.project)} and {'checkpoints', 'predict', 'score'} < {*ticks()}, 'it is the same split'
    fill(filled, 'split', test=.5)
    assert 'qvl-error' not in shown(press(filled, 'split.register'))
    assert ticks() == ['data', 'split', 'model', 'recipe', 'memory'] and not {*names} & {*what_ran(filled.session.project)}

def test_names_are_made_again_when_they_are_needed(filled, folder):
    fresh = Panel()
    fill(fresh, 'split', name='twice')
    assert '17 rows for training' in shown(press(fresh, 'split.register'))
    assert len(json.loads((folder/'data'/'twice.json').read_text())) == 17  # without the rows that were dropped

def test_rows_with_chosen_warnings_are_dropped_and_mending_counts_what_is_left(folder):
    rows = pd.read_excel('labels.xlsx').assign(caption=[' red ', *['red']*10, None, *['red']*13])
    rows.to_excel('labels.xlsx', index=False)
    panel = Panel()
    fill(panel, 'data', source='labels.xlsx', image='photo', prompt='What colour is it?', response='caption')
    assert panel.steps['data'].kinds.layout.display == 'none'
    for action, says in {'data.read': '25 rows', 'data.check': 'Findings: 4; rows concerned: 4.', 'data.mend': 'Mended: 1. Left: 3 findings; rows concerned: 3.'}.items(): assert says in shown(press(panel, action))
    assert 'Findings' not in shown(panel.steps['data'].boxes['data.check'])
    also = panel.steps['data'].controls['also']
    assert panel.steps['data'].kinds.layout.display is None and also.options == (('warning (1): The answer is empty.', 'The answer is empty.'),)
    assert 'Dropped 2 of 25' in shown(press(panel, 'data.drop'))
    also.value = ['The answer is empty.']
    assert 'Dropped 3 of 25' in shown(press(panel, 'data.drop')) and len(panel.session.names['samples']) == 22
    other = Panel()
    fill(other, 'split', name='x')
    assert other.steps['data'].view and other.steps['data'].controls['also'].value == ('The answer is empty.',)
    press(other, 'split.register')
    assert len(other.session.names['samples']) == 22
    assert "also=['The answer is empty.']" in (folder/NOTEBOOK).read_text()
    press(panel, 'data.check')
    assert also.value == ()  # they are gone
    press(panel, 'data.drop')
    assert panel.session.code('data.drop').startswith('samples = drop_samples(samples, findings)'), 'nothing is left of them'
    fill(panel, 'data', prompt='Which colour?')
    for action in ('data.read', 'data.check'): press(panel, action)
    assert also.value == ('The answer is empty.',), 'a choice is kept for when it is found again'
    shown_rows = shown(panel.steps['data'].boxes['data.read'])
    assert shown_rows.count('<img') == 3 and shown(opened(folder).steps['data'].boxes['data.read']).count('<img') == 3

def test_what_was_read_anew_names_the_steps_that_are_due(filled):
    "Until each was done again, also if it is read once more; buttons that only show something are not among them."
    due = lambda step='data', action='data.read': filled.steps[step].boxes[action].behind.value
    press(filled, 'recipe.check')
    press(filled, 'split.plot')
    for prompt in ('Which colour?', 'What is its colour?'):
        fill(filled, 'data', prompt=prompt)
        press(filled, 'data.read')
        assert 'recipe.check' not in what_ran(filled.session.project), 'it was about the rows that were registered'
        assert 'Steps to be done again: &quot;Split&quot;.' in due() and 'What was done with the rows is undone: press &quot;Check&quot; again.' in due()
    for action in ('data.check', 'data.mend', 'data.check', 'data.drop', 'split.register'):  # a mending without a dropping, too
        box = press(filled, action)
        assert 'qvl-error' not in shown(box), shown(box)
        filled.refresh()
    assert due() == ''
    press(filled, 'recipe.check')
    filled.go('recipe')
    made, pick, check = (filled.steps['recipe'].code.value.find(word) for word in ('train_recipe', 'pick_zero', 'check_recipe'))
    assert 0 < made < pick < check, 'what was checked is what was picked'
    fill(filled, 'memory', gpus=0, gpu_gib=0.)
    press(filled, 'memory.pick')
    assert due('memory', 'memory.pick') == ''

def test_rows_that_have_changed_in_the_file_are_other_rows(filled, folder):
    "Reading the same once more leaves all as it is."
    before = {*what_ran(filled.session.project)}
    press(filled, 'data.read')
    assert {*what_ran(filled.session.project)} == before
    rows = pd.read_excel('labels.xlsx')
    pd.concat([rows, rows.tail(4).head(1).assign(caption='another')]).to_excel('labels.xlsx', index=False)
    press(filled, 'data.read')
    assert not {'data.check', 'data.drop', 'split.register'} & {*what_ran(filled.session.project)}
    assert 'Steps to be done again: &quot;Split&quot;.' in filled.steps['data'].boxes['data.read'].behind.value
    assert not filled.tabs['split'].icon
    filled.go('split')
    said = 'Out of date since &quot;Read&quot; was pressed in the step &quot;Data&quot;: &quot;Split and register&quot;.'
    assert said in filled.steps['split'].undone.value
    for action in ('data.check', 'data.drop', 'split.register'): press(filled, action)
    filled.refresh()
    assert filled.steps['split'].undone.value == ''

def test_after_a_new_split_the_training_is_due_also_if_its_run_was_chosen(filled, folder):
    "A run that is chosen takes the place of a launch, which is not due because of it."
    given = {'launch.start': dict(run='runs/a', folder='runs', name='', nproc=0), 'checkpoints.score': {}}
    with filled.session.project.edit() as state: state['ran'] |= {name: dict(given=about, when=1., said='') for name, about in given.items()}
    due = lambda step, action: filled.steps[step].boxes[action].behind.value
    fill(filled, 'recipe', num_train_epochs=3.)
    press(filled, 'recipe.make')
    assert 'Steps to be done again: &quot;Launch&quot; · &quot;Checkpoints&quot;.' in due('recipe', 'recipe.make')
    save_recipe(filled.session.names['recipe'], make_run(folder/'runs'/'b')/RECIPE)
    choose(filled.steps['runs'], folder/'runs'/'b')
    run_action(filled.session, 'runs.choose')
    filled.go('recipe')
    assert 'Steps to be done again: &quot;Checkpoints&quot;.' in due('recipe', 'recipe.make')
    fill(filled, 'split', test=.5)
    press(filled, 'split.register')
    assert 'runs.choose' not in what_ran(filled.session.project)
    assert 'Steps to be done again: &quot;Launch&quot;' in due('split', 'split.register') and '&quot;Runs&quot;' not in due('split', 'split.register')

def test_nothing_is_launched_on_rows_that_were_registered_before_others_were_read(filled):
    "Unless the recipe names them; without a run, its step and the list of runs are named."
    fill(filled, 'data', prompt='Which colour?')
    press(filled, 'data.read')
    assert not filled.steps['data'].is_done, 'what was dropped is back'
    assert 'Other rows were read since the data set of the recipe was registered' in shown(press(filled, 'launch.start'))
    assert 'launch.start' not in what_ran(filled.session.project)
    save_recipe(filled.session.names['recipe'], make_run(Path('runs/b').absolute())/RECIPE)
    choose(filled.steps['runs'], Path('runs/b').absolute())
    fill(filled, 'predict', dataset='colours_test')
    told = shown(press(filled, 'predict.before'))
    assert 'press &quot;Launch&quot; there. Or press &quot;Choose&quot; in the step &quot;Runs&quot;.' in told, told

def test_answers_are_the_same_in_another_folder(filled, folder):
    about = dict(model='m', dataset_dir='data', data_sets=['colours'], adapter='', trained='')
    keep_value(filled.session.project, 'runs', run='runs/a', _about=about)
    fill(filled, 'predict', dataset='colours_test')
    given = filled.session.next_code('predict.after')[0]
    with filled.session.project.edit() as state: state['ran'] |= {'predict.after': dict(given=given, when=1., said='')}
    assert not filled.session.has_changed('predict.after')
    fill(filled, 'predict', folder='other')
    assert "output_dir='other/after'" in filled.session.next_code('predict.after')[1].replace('\n', '') and not filled.session.has_changed('predict.after')
    fill(filled, 'predict', max_new_tokens=9)
    assert filled.session.has_changed('predict.after')

def test_a_tick_goes_with_what_is_typed(filled):
    filled._repr_mimebundle_()
    assert filled.tabs['split'].icon
    fill(filled, 'split', test=.5)
    until(lambda: not filled.tabs['split'].icon)
    fill(filled, 'split', test=.25)
    until(lambda: filled.tabs['split'].icon)

def test_what_was_checked_is_out_of_date_as_soon_as_the_recipe_changes(filled):
    press(filled, 'recipe.check')
    filled.go('recipe')
    behind = lambda: filled.steps['recipe'].boxes['recipe.check'].behind.value
    assert behind() == ''
    fill(filled, 'recipe', cutoff_len=1000)
    assert 'press &quot;Check the recipe&quot; again' in behind()
    fill(filled, 'recipe', cutoff_len=2048)
    assert behind() == ''

def test_a_recipe_with_errors_is_not_ticked_and_one_whose_check_is_out_of_date_is(filled):
    press(filled, 'recipe.check')
    assert filled.steps['recipe'].is_done and what_ran(filled.session.project)['recipe.check'].given['errors'] == 0
    fill(filled, 'recipe', dataset='colors')
    press(filled, 'recipe.make')
    assert filled.steps['recipe'].is_done, 'nobody has looked yet'
    press(filled, 'recipe.check')
    assert not filled.steps['recipe'].is_done
    fill(filled, 'recipe', dataset='')
    press(filled, 'recipe.make')
    assert filled.steps['recipe'].is_done

def test_no_code_is_shown_under_a_refusal_of_the_form(filled):
    "It has not run; code that has led to an error is shown."
    fill(filled, 'launch', name='../elsewhere')
    fill(filled, 'data', prompt='Which colour?')
    press(filled, 'data.read')
    for action in ('data.drop', 'launch.start'):
        box = press(filled, action)
        assert box.has_failed and 'qvl-code' not in shown(box), action
    fill(filled, 'data', source='nowhere.xlsx')
    assert 'qvl-code' in shown(press(filled, 'data.read'))

def test_what_runs_again_by_itself_says_when(filled):
    when = lambda: what_ran(filled.session.project)['memory.pick'].when
    first = when()
    fill(filled, 'recipe', cutoff_len=1000)
    press(filled, 'recipe.make')
    filled.go('memory')
    assert 'it runs again by itself' in filled.steps['memory'].boxes['memory.pick'].behind.value
    press(filled, 'recipe.check')
    assert when() > first

def test_a_button_of_the_same_step_is_named_without_its_step(folder):
    panel = Panel()
    fill(panel, 'data', source='labels.xlsx')
    assert 'Press &quot;Read&quot; first.' in shown(press(panel, 'data.check'))
    assert 'This needs the step &quot;Data&quot; first' in shown(press(panel, 'split.register'))

def test_a_refusal_goes_when_its_cause_is_gone(folder, tiny):
    panel = Panel()
    fill(panel, 'split', name='colours')
    assert 'Fill in &quot;Model&quot;' in shown(press(panel, 'recipe.check'))
    fill(panel, 'model', model=str(tiny))
    panel.go('recipe')
    assert 'Fill in' not in shown(panel.steps['recipe'].boxes['recipe.check'])

def test_a_check_after_a_dropping_is_about_the_rows_that_are_left_and_only_reading_brings_the_others_back(filled, folder):
    count = lambda panel=filled: len(panel.session.names['samples'])
    assert 'Nothing found in 23 rows' in shown(press(filled, 'data.check')) and {'data.settled', 'split.register'} <= {*what_ran(filled.session.project)}
    fill(filled, 'recipe', cutoff_len=8)
    assert 'rows concerned: 23' in shown(press(filled, 'data.check')) and count() == 23, 'dropped rows are not back'
    fill(filled, 'recipe', cutoff_len=2048)
    assert 'Nothing found in 23 rows' in shown(press(filled, 'data.check')) and 'ActionBox' in repr(filled.steps['data'].boxes['data.check'])
    assert '17 rows for training' in shown(press(filled, 'split.register'))
    fresh = Panel()
    press(fresh, 'data.mend')
    assert count(fresh) == 23 and 'Before the last check: Dropped 2 of 25' in fresh.steps['data'].settled.value
    fill(filled, 'data', prompt='Which colour?')
    assert 'This undoes what &quot;Mend&quot; and' in filled.steps['data'].boxes['data.read'].behind.value
    for action in ('data.check', 'data.mend', 'data.drop', 'split.register'): assert 'changed since "Read" was pressed' in html.unescape(shown(press(filled, action)))
    filled.go('split')
    assert 'changed since &quot;Read&quot;' in filled.steps['split'].left.value
    assert '25 rows' in shown(press(filled, 'data.read')) and count() == 25 and {*what_ran(filled.session.project)} == {'data.read', 'recipe.make', 'memory.pick'}

def test_choosing_the_model_after_the_check_sends_nobody_back(folder, tiny):
    panel, steps = Panel(), ('data', 'split', 'model', 'recipe')
    fill(panel, 'data', source='labels.xlsx', image='photo', prompt='What colour is it?', response='caption')
    for action in ('data.read', 'data.check', 'data.drop', 'split.register'): press(panel, action)
    fill(panel, 'model', model=str(tiny))
    press(panel, 'recipe.make')
    for length in (8, '2,5'):
        fill(panel, 'recipe', cutoff_len=length)
        panel.go('data')
        assert not any(box.behind.value for box in panel.steps['data'].boxes.values())
    fill(panel, 'recipe', cutoff_len=8)
    assert f"check_samples(samples, model='{tiny}', cutoff_len=8)" in panel.session.next_code('data.check')[1]
    assert 'rows concerned: 23' in shown(press(panel, 'data.check')), 'who presses it again has the texts counted'
    press(panel, 'recipe.make')
    assert [panel.steps[name].is_done for name in steps] == [False, True, True, True], 'rows with errors are left in the data'
    fill(panel, 'data', prompt='Which colour?')
    assert panel.steps['data'].boxes['data.read'].behind.value

def test_wrong_columns_and_files_are_told_in_the_step(folder):
    panel = Panel()
    assert 'File or folder' in shown(press(panel, 'data.read'))
    fill(panel, 'data', source='none.xlsx')
    assert 'There is no file none.xlsx' in shown(press(panel, 'data.read'))
    fill(panel, 'data', source='labels.xlsx')
    told = html.unescape(shown(press(panel, 'data.read')))
    assert '''set "Pictures" to 'photo'.''' in told and 'To be set in this form: "Prompt" · "Answer" · "Pictures".' in told and 'image=' not in told
    assert '请在此表单中设置：“提示词” · “回答” · “图片”。' in html.unescape(shown(press(Panel(language='zh'), 'data.read')))
    fill(panel, 'data', source='labels.xlsx', image='picture', prompt='What?', response='label')
    told = shown(press(panel, 'data.read'))
    assert 'To be set in this form: "Pictures" · "Answer".' in html.unescape(told)
    assert 'no column' in told and 'photo' in told and 'Traceback' not in told and 'read_samples' in told  # and the code that failed
    (folder/'titled.csv').write_text('My photos,\n1,\nphoto,caption\na.png,red\n')
    fill(panel, 'data', source='titled.csv', image='photo', response='caption', header=1)
    told = html.unescape(shown(press(panel, 'data.read')))
    assert '"Header row" = 2' in told and 'To be set in this form: "Header row" · "Pictures" · "Answer".' in told, told
    fill(panel, 'data', header='')
    (folder/'broken.xlsx').write_bytes(b'PK\3\4 no workbook')
    fill(panel, 'data', source='broken.xlsx', image='', response='')
    assert 'broken.xlsx' in shown(press(panel, 'data.read')) and not (folder/NOTEBOOK).exists()
    assert 'step' in shown(press(panel, 'split.register')) and 'Data' in shown(press(panel, 'split.register'))
    assert 'Model' in shown(press(panel, 'recipe.make'))

def test_messages_speak_of_the_fields_and_buttons_of_the_form(filled):
    "What checks and splits say about arguments; the test data have 6 rows, and each row has some 20 tokens."
    fill(filled, 'recipe', cutoff_len=8)
    press(filled, 'recipe.make')
    told = html.unescape(shown(press(filled, 'recipe.check')))
    assert 'Set "Maximum tokens" to ' in told and 'cutoff_len' not in told
    fill(filled, 'recipe', bf16=True)
    press(filled, 'recipe.make')
    told = html.unescape(shown(press(filled, 'recipe.check')))
    assert ('Switch off "bfloat16", or use' in told) == (not gpus()), 'GPUs of another machine were chosen'
    with filled.session.project.edit() as state: state['ran'].pop('memory.pick')  # as if none had been chosen yet
    press(filled, 'recipe.make')
    told = html.unescape(shown(press(filled, 'recipe.check')))
    assert ('Press "Use the fastest that fits" in the step "Memory", or switch off "bfloat16"' in told) == (not gpus())
    fill(filled, 'memory', gpus=0, gpu_gib=0.)
    press(filled, 'memory.pick')
    assert 'bfloat16' not in shown(press(filled, 'recipe.check')), 'what is checked is what would be launched'
    fill(filled, 'split', test=.25, group='car')
    told = html.unescape(shown(press(filled, 'split.register')))
    assert "The rows have no 'car' to group by; there are: photo, caption." in told and 'To be set in this form: "Keep together".' in told
    fill(filled, 'split', test=100., group='')
    assert '"Test rows" = 100 takes 100 of 23' in html.unescape(shown(press(filled, 'split.register')))
    told = html.unescape(shown(press(filled, 'launch.start')))
    assert '- "Maximum tokens" in the step "Recipe": ' in told and 'cutoff_len' not in told.partition('recipe =')[0].partition('launch(')[0]
    fill(filled, 'recipe', cutoff_len=2048, num_train_epochs='2,5')
    line = '"2,5" can’t be used for "Epochs" in the step "Recipe". Allowed: numbers (decimals with a point) from 0 up.'
    for action in ('launch.start', 'memory.pick'): assert line in html.unescape(shown(press(filled, action)))
    fill(filled, 'recipe', num_train_epochs='')
    keep_value(filled.session.project, 'recipe', more={'group_by_lenght': True})
    filled.refresh()
    told = html.unescape(shown(press(filled, 'recipe.check')))
    assert '"Other arguments: group_by_lenght"' in told
    told = html.unescape(shown(press(filled, 'launch.start')))
    assert '"Other arguments: group_by_lenght" in the step "Recipe"' in told

def test_text_from_data_is_shown_literally(folder):
    pd.DataFrame({'image': ['photos/0.png'], 'prompt': ['<script>alert(1)</script>'], 'answer': ['<img src=x onerror=alert(1)>']}).to_csv('<b>.csv', index=False)
    panel = Panel()
    fill(panel, 'data', source='<b>.csv')
    told = shown(press(panel, 'data.read')) + panel.steps['data'].code.value
    assert '&lt;script&gt;' in told and '<script>' not in told and '<img src=x' not in told and '<b>.csv' not in told

HOSTILE = [
    {'values': []}, {'values': {'data': 1, 'recipe': [], 'memory': None, 'split': {'test': 'x', 'name': {}, 'media': 'move'}}},
    {'values': {'recipe': {'more': {'x': 1, 'trust_remote_code': True, '__import__("os")': 1}, 'lora_rank': 10**30, 'stage': '<b>', 'num_train_epochs': float('1e300')}}},
    {'values': {'model': {'model': '\0'}, 'data': {'source': '\0', 'image': 'x'*100_000, 'media_dir': '/proc/self/fd/0'}}},
    {'values': {'data': {'source': 'x'*300 + '/y', 'media_dir': 'x'*300}, 'model': {'model': 'x'*300 + '/y'}}},
    {'values': {'memory': {'gpus': -5, 'gpu_gib': -1.0}, 'split': {'folder': '/dev/stdin', 'test': -3.0}, 'runs': {'run': '\0', 'folder': '\0'}}},
    {'ran': []}, {'ran': {'data.read': []}}, {'ran': {'data.read': {'given': {}, 'when': 0, 'said': ''}, 'none.such': {'given': {}, 'when': 1, 'said': 'x'}}},
    {'ran': {'data.read': {'given': {'source': 1, 'image': [], 'prompt': {}, 'response': None, 'media_dir': 2, 'boxes': 'x', 'model': 3}, 'when': 1e300, 'said': '<script>'}}},
    {'ran': {name: {'given': {}, 'when': -1e14, 'said': 'x'} for name in ('memory.pick', 'recipe.make', 'launch.start', 'runs.choose', 'predict.after', 'checkpoints.score', 'score.scores')}},
    {'ran': {'launch.start': {'given': {'run': '\0', 'folder': 'x', 'name': '', 'nproc': 0}, 'when': 1.0, 'said': ''}}},
    {'ran': {'split.register': {'given': dict(test=float('inf'), group='', stratify='', name='x', folder='data', media='refer'), 'when': 1.0, 'said': ''}}},
    {'values': {'data': {'also': [1, {}, '<script>'], 'header': 1e14}}, 'ran': {'data.mend': {'given': {'findings': 1, 'kinds': {'<script>': []}, 'shown': 0}, 'when': 1, 'said': ''}, 'data.check': {'given': {'kinds': [1]}, 'when': 2, 'said': ''}, 'data.drop': {'given': {'also': {'x': 1}}, 'when': 3, 'said': ''}}},
    {'notebook': 3}, {'notebook': {'name': '../../x.ipynb', 'digest': 0}}, {'notebook': {'name': None}}, {'open': ['x']}, {'open': 'none'}, {'open': 7},
]

@pytest.mark.parametrize('state', HOSTILE, ids=range(len(HOSTILE)))
def test_a_panel_of_somebody_else_can_do_nothing_by_being_opened(folder, state):
    written = json.dumps(state | {'written_by': 'qwen2vl_nb.Panel'})
    (folder/PANEL).write_text(written)
    before = sorted(folder.rglob('*'))
    panel = Panel()
    for name in panel.steps: panel.go(name)
    assert not panel.steps['memory']._thread and panel.session.names == {} and sorted(folder.rglob('*')) == before and (folder/PANEL).read_text() == written
    assert '<script>' not in ''.join(b.line.value for step in panel.steps.values() for b in step.boxes.values())

def test_values_cannot_become_code(folder):
    evil = "x'); open('owned', 'w'); ('"
    panel = Panel()
    fill(panel, 'data', source=evil, image=evil, prompt=evil, response=evil, media_dir=evil)
    fill(panel, 'model', model='Qwen/Qwen2-VL-7B-Instruct')
    fill(panel, 'split', name=evil, group=evil, folder='data')
    keep_value(panel.session.project, 'recipe', more={"a=1); open('owned', 'w'); (": 1, 'b': evil, 'model': evil, 'output_dir': evil})
    for action in ('data.read', 'split.register', 'recipe.make'): press(panel, action)
    assert panel.session.names['recipe']['b'] == evil and panel.session.names['recipe']["a=1); open('owned', 'w'); ("] == 1
    assert not (folder/'owned').exists()

@pytest.mark.parametrize('make', [lambda p: p.write_text('{"mine": 1}'), lambda p: p.write_text('[1]'), lambda p: p.write_text(''), os.mkfifo, os.mkdir,
                                  lambda p: p.write_bytes(b'{"written_by": "qwen2vl_nb.Panel", "x": "' + b'x'*2**23 + b'"}')],
                         ids=['foreign', 'list', 'empty', 'pipe', 'folder', 'huge'])
def test_a_foreign_panel_json_is_left_alone(folder, make):
    make(folder/PANEL)
    before = unchanged(folder/PANEL)
    with pytest.raises((ValueError, OSError), match=PANEL): Panel()
    assert unchanged(folder/PANEL) == before

@pytest.mark.parametrize('kind', ['foreign', 'link', 'folder', 'no notebook'])
def test_a_foreign_notebook_is_left_alone(folder, kind):
    path, target = folder/NOTEBOOK, folder/'target'
    if kind == 'foreign': nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('mine')]), path)
    if kind == 'link': path.symlink_to(target)
    if kind == 'folder': path.mkdir()
    if kind == 'no notebook': path.write_text('mine')
    before = unchanged(path)
    panel = Panel()
    fill(panel, 'model', model='Qwen/Qwen2-VL-7B-Instruct')
    for _ in range(2): press(panel, 'recipe.make')
    assert unchanged(path) == before and not target.exists()
    assert sorted(p.name for p in folder.glob('*.ipynb')) == ['panel-2.ipynb', NOTEBOOK] and 'panel-2.ipynb' in panel.where.outputs[0]['data']['text/html']

def test_a_notebook_that_was_run_and_saved_keeps_its_outputs(filled, folder):
    execute(folder/NOTEBOOK)
    mine = (folder/NOTEBOOK).read_bytes()
    fill(filled, 'recipe', lora_rank=16)
    press(filled, 'recipe.make')
    assert (folder/NOTEBOOK).read_bytes() == mine and 'lora_rank=16' in (folder/'panel-2.ipynb').read_text()

def test_panels_that_write_at_once_lose_nothing(folder):
    panels = [Panel() for _ in range(4)]
    def write(i):
        for n in range(25): keep_value(panels[i].session.project, f'step{i}', **{f'v{n}': n})
    threads = [threading.Thread(target=write, args=[i]) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    for i in range(4): assert form_values(Panel().session.project, f'step{i}', {f'v{n}': -1 for n in range(25)}) == {f'v{n}': n for n in range(25)}

def test_a_hundred_thousand_rows_put_nothing_into_the_form(folder):
    with open('many.csv', 'w') as f:
        f.write('image,prompt,response\n')
        f.writelines(f'photos/{i%20}.png,What is {i}?,{i}\n' for i in range(100_000))
    panel = Panel()
    fill(panel, 'data', source='many.csv')
    assert panel.steps['data'].controls['image'].options == ('image', 'prompt', 'response')
    assert '100000 rows' in shown(press(panel, 'data.read')).replace(',', '')
    def size(widget): return len(repr(widget.get_state())) + sum(map(size, getattr(widget, 'children', ())))
    for name in ('data', 'split'): panel.go(name)
    assert sum(size(panel.steps[name].view) for name in ('data', 'split')) < 1_000_000
    assert (folder/PANEL).stat().st_size < 20_000

def test_columns_are_found_without_reading_the_file(folder):
    with open('large.csv', 'wb') as f:
        f.write(b'photo,text\n')
        f.truncate(10**12)  # a terabyte, of which nothing is on the disk
    assert column_names('large.csv') == ['photo', 'text']

@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'gb18030', 'utf-16'])
def test_columns_have_the_names_that_the_reader_gives_them(folder, encoding):
    "Also of a file that is longer than what is looked at, which may end within a character."
    line = ''.join(f'photos/{i}.png,{COLOURS[i%4]}色,{i}\n' for i in range(24))
    for n, times in enumerate((1, 5000)):
        Path(f'{encoding}{n}.csv').write_bytes(('图片,描述,编号\n' + line*times).encode(encoding))
        assert column_names(f'{encoding}{n}.csv') == ['图片', '描述', '编号']
    read_samples(f'{encoding}0.csv', image='图片', prompt='?', response='描述')

def test_a_table_with_a_title_is_read_with_and_without_the_number_of_its_header(folder):
    rows = [['Colours of 2026'], [], ['photo', 'caption'], *pd.read_excel('labels.xlsx').values.tolist()]
    pd.DataFrame(rows).to_excel('titled.xlsx', header=False, index=False)
    panel = Panel()
    fill(panel, 'data', source='titled.xlsx', prompt='What colour is it?')
    assert panel.steps['data'].controls['image'].options == ('photo', 'caption')
    assert '"Header row" = 2 takes the second row of a file' in html.unescape(shown(press(panel, 'data.read')))
    fill(panel, 'data', image='photo', response='caption')
    assert '25 rows' in shown(press(panel, 'data.read')) and 'row 28 of titled.xlsx' in shown(press(panel, 'data.check'))
    fill(panel, 'data', header=3)
    assert '25 rows' in shown(press(panel, 'data.read')) and 'header=3' in panel.session.code('data.read')
    fill(panel, 'data', header=4)
    assert panel.steps['data'].controls['image'].options == ('photos/0.png', 'red 0') and 'no column' in shown(press(panel, 'data.read'))

def test_a_folder_that_cannot_be_written_is_told(folder):
    panel = Panel(folder/'file')
    (folder/'file').write_text('mine')
    fill(panel, 'model', model='Qwen/Qwen2-VL-7B-Instruct')
    panel.go('recipe', keep=True)
    assert 'could not be saved' in panel.complaint.value and (folder/'file').read_text() == 'mine'

def listed(panel):
    "The runs that the panel lists."
    step = panel.steps['runs']
    step.view
    step.look()
    while thread := step._thread: thread.join()
    return {row['run'] for row in step.rows}

def test_what_a_training_was_built_on_is_asked_with_it_and_all_runs_are_listed_wherever_the_folder_is(folder, few_steps, data, tiny_fp32, monkeypatch):
    "An adapter that was trained by code where recipes write by default, and a second one on it from the panel."
    few = dict(max_steps=2, max_samples=8, use_cpu=True, preprocessing_num_workers=None, add_tokens='<car>')
    first = launch(few_steps(output_dir=None, model_name_or_path=str(tiny_fp32), **few)).wait()
    panel = Panel()
    fill(panel, 'model', model=tiny_fp32.name)
    fill(panel, 'split', name='car_item', folder=str(data))
    fill(panel, 'recipe', bf16=False)
    own = few | dict(adapter_name_or_path=str(first.output_dir.relative_to(folder)), create_new_adapter=True)
    keep_value(panel.session.project, 'recipe', more=own | {'template': 'qwen2_v'})
    press(panel, 'recipe.make')
    told = shown(press(panel, 'launch.start'))
    assert 'cannot run' in told and 'qwen2_vl' in told and not (folder/'runs').exists(), 'what would fail is said before the start'
    keep_value(panel.session.project, 'recipe', more=own)
    for action in ('recipe.make', 'launch.start'): assert 'qvl-error' not in shown(press(panel, action))
    panel.go('launch')
    press(panel, 'launch.start')
    assert 'still training' in panel.steps['launch'].held.value, 'nothing is started beside the run that is training'
    second = panel.session.names['run'].wait()
    until(lambda: not panel.steps['launch'].held.value, 'the refusal goes with what it was about')
    places = {str(run.output_dir.relative_to(folder)) for run in (first, second)}
    assert [p.split('/')[0] for p in sorted(places)] == ['runs', 'saves'] and listed(panel) == places

    fill(panel, 'predict', dataset='car_item_test', max_samples=2, max_new_tokens=4)
    asked, step = {}, panel.steps['predict']
    panel.go('predict')
    for name in ('before', 'after'):
        box, at_work = step.boxes[f'predict.{name}'], []
        box.result.observe(lambda change, at_work=at_work: at_work.append(len(step.work._seen)), 'children')
        box.start()
        until(lambda: at_work or step.work.look(), 'it is seen at work')
        box.wait()
        assert 'qvl-error' not in shown(box), shown(box)
        assert at_work[0] == 0, 'nothing is shown at work beside its result'
        asked[name] = load_recipe(panel.session.names[name].output_dir/RECIPE)
    both = f'{first.output_dir},{second.output_dir}'
    assert [asked[name]['adapter_name_or_path'] for name in asked] == [str(first.output_dir), both]
    assert {asked[name]['add_tokens'] for name in asked} == {'<car>'}
    assert 'answering_recipe(run.recipe, run,' in panel.session.code('predict.after')
    with held(serve(second, max_new_tokens=4)) as served, held(serve(second, adapter=None, max_new_tokens=4)) as base:
        panel.refresh()
        assert 'loaded already' in step.loaded.value
        fill(panel, 'predict', engine='served', folder='warm')
        assert not step.loaded.value
        for name in ('before', 'after'): assert 'qvl-error' not in shown(press(panel, f'predict.{name}'))
        assert 'engine=serve(run)' in panel.session.code('predict.after')
        for name, model in (('before', base), ('after', served)):
            asked_by = json.loads((folder/'warm'/name/RUN).read_text())['workers'][0]['command']
            assert str(model.output_dir) in asked_by and model.is_running, 'the process that was there has answered'
            assert [*panel.session.names[name]] and len(listed(panel)) == 2
        assert step.work.look() is False, 'a model that is kept loaded is no prediction at work'
    fill(panel, 'predict', engine='openai')
    assert 'Server' in shown(press(panel, 'predict.after'))
    fill(panel, 'predict', engine='vllm', python=sys.executable, folder='vllm')
    assert 'There is no vLLM in' in shown(press(panel, 'predict.after'))
    fill(panel, 'predict', engine='llamafactory', python='', folder='theirs')
    assert 'qvl-error' not in shown(press(panel, 'predict.after'))
    assert attach(folder/'theirs'/'after').progress.unit == 'batch' and listed(panel) == places, 'it is no training'

    job = Panel(folder/'job')  # the kernel is in another folder
    choose(job.steps['runs'], first.output_dir)
    run_action(job.session, 'runs.choose')
    fill(job, 'predict', dataset='car_item_test', engine='served', max_samples=2, max_new_tokens=4)
    said, saves = [], folder/'job'/'saves'/tiny_fp32.name
    job.steps['predict'].boxes['predict.before'].line.observe(lambda change: said.append(change['new']), 'value')
    box = press(job, 'predict.before')
    assert any('served: loading [' in text for text in said), said  # with what it is at, such as loading the libraries
    assert 'qvl-error' not in shown(box), shown(box)
    with held(attach(saves/'served')): assert [*(saves/'predict').glob(f'car_item_test-*/{RUN}')], 'with a digest of the rows'
    assert not (folder/'saves'/tiny_fp32.name/'served').exists()

    assert str(folder) not in json.dumps([ran.given for ran in what_ran(panel.session.project).values()])
    moved = folder.rename(folder.with_name('moved'))
    monkeypatch.chdir(moved)
    there = Panel()
    assert listed(there) == places and 'qvl-error' not in shown(press(there, 'score.scores'))
    assert there.session.names['run'].output_dir == moved/second.output_dir.relative_to(folder)
    assert (moved/'panel.ipynb').exists()

@pytest.mark.parametrize('name', ['checkpoints', 'predict'])
def test_the_test_set_of_the_chosen_run_is_suggested_unless_the_user_names_another(name, folder, tiny):
    (folder/'data').mkdir()
    names = [f'{of}{end}' for of in ('cars', 'birds') for end in ('', '_test')]
    (folder/'data'/'dataset_info.json').write_text(json.dumps({of: {'file_name': f'{of}.json'} for of in names}))
    def chosen(of):
        save_recipe(train_recipe(tiny, of, folder/'runs'/of, dataset_dir=str(folder/'data')), folder/'runs'/of/RECIPE)
        choose(panel.steps['runs'], folder/'runs'/of)
        panel.refresh()
        return control.value
    panel = Panel()
    panel.go(name)
    control = panel.steps[name].controls['dataset']
    assert [chosen(of) for of in ('birds', 'cars')] == ['birds_test', 'cars_test']
    panel = Panel()  # as after a restart
    panel.go(name)
    control = panel.steps[name].controls['dataset']
    assert chosen('birds') == 'birds_test', 'the last suggestion was nobody’s choice'
    for theirs in ('cars', ''):
        control.value = theirs
        assert [chosen(of) for of in ('cars', 'birds')] == [theirs]*2

def test_the_path_of_a_run_as_older_panels_kept_it_is_still_read(folder):
    old = {'given': {'run': str(folder/'runs'/'a'), 'folder': 'runs', 'name': '', 'nproc': 0}, 'when': 1.0, 'said': ''}
    (folder/PANEL).write_text(json.dumps({'written_by': 'qwen2vl_nb.Panel', 'ran': {'launch.start': old}}))
    assert Panel().session.code('launch.start', again=True) == f"run = attach({str(folder/'runs'/'a')!r})"

def test_runs_are_found_where_they_are_and_not_through_foreign_links(folder, tmp_path_factory):
    def make(at):
        at.mkdir(parents=True)
        (at/RUN).write_text('{}')
    disk, other = tmp_path_factory.mktemp('disk'), tmp_path_factory.mktemp('other')
    for at in (folder/'runs'/'a', folder/'saves'/'m'/'lora'/'b', folder/'deep'/'x'/'y'/'c', disk/'d', other/'e'): make(at)
    (folder/'foreign').symlink_to(other)
    (folder/'loop').symlink_to(folder)
    os.mkfifo(folder/'photos'/RUN)
    mine = {'runs/a', 'saves/m/lora/b', 'deep/x/y/c', 'photos'}
    panel = Panel()
    assert listed(panel) == mine
    fill(panel, 'runs', folder=str(disk))
    assert listed(panel) == mine | {str(disk/'d')}
    (folder/'many').symlink_to(disk)
    fill(panel, 'runs', folder='many')
    assert listed(panel) == mine | {'many/d'}
