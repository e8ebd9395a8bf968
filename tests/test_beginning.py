"""What a run says that it is doing, from its launch to its first step; a launch that is called again; and what a notebook keeps of a run."""
import base64, json, re, subprocess, sys, warnings

import nbformat
import pytest

from conftest import PATIENCE, until
from qwen2vl_nb.recipe import find_adapter, without_time
from qwen2vl_nb.run.folder import DOING, state_or_empty
from qwen2vl_nb.run.loss import read_log
from qwen2vl_nb.run.start import attach, launch, runs
from qwen2vl_nb.run.watch import _headline, _look
from qwen2vl_nb.zero import zero_config

@pytest.fixture(autouse=True)
def tokenized_again(monkeypatch): monkeypatch.setenv('QWEN2VL_NB_TOKENIZED', '0')

def _followed(run):
    "All that the headline has said of a run until its end."
    said = []
    def look():
        line = _headline(_look(run))
        if not said or said[-1] != line: said.append(line)
        return not run.is_running
    until(look)
    assert run.status == 'done', f'{run.failure}\n{run.log()[-2000:]}'
    return said

def _in_order(said, *parts):
    "Whether the parts were said, one after the other."
    rest = iter(said)
    return all(any(part in line for line in rest) for part in parts)

def test_a_start_says_what_it_does(few_steps):
    run = launch(few_steps(max_steps=30, preprocessing_batch_size=2, max_samples=64))
    said = _followed(run)
    assert _in_order(said, 'run: starting, loading the libraries', 'run: starting, tokenizing: ', 'run: starting, loading the model', 'run: running, step '), said
    counts = [re.search(r'tokenizing: (\d+) of 64 rows', line) for line in said]
    assert all(int(count[1]) <= 64 for count in counts if count)
    assert not (run.output_dir/DOING).exists() and re.search('run: done, step 30 of 30, epoch .*, took 0:0.*, ended 20', said[-1])

def test_two_ranks_with_deepspeed_say_what_they_do(few_steps):
    "What is told is the first's. That the losses are those of LLaMA-Factory alone is in test_run.py."
    run = launch(few_steps(use_cpu=None, deepspeed=zero_config('z3'), max_steps=6), nproc=2)
    said = _followed(run)
    assert _in_order(said, 'loading the libraries', 'loading the model', "building DeepSpeed's engine"), said
    assert not (run.output_dir/DOING).exists()
    assert len(read_log(run).dropna(subset=['loss'])) == 6

def test_a_run_that_fails_says_what_it_was_doing(few_steps, tmp_path):
    (tmp_path/'data').mkdir()
    (tmp_path/'data'/'dataset_info.json').write_text(json.dumps({'rows': {'file_name': 'rows.json', 'columns': {'prompt': 'instruction', 'response': 'output', 'images': 'images'}}}))
    (tmp_path/'data'/'rows.json').write_text(json.dumps([{'images': [], 'instruction': '<image>What?', 'output': 'A car.'}]*3))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the check may be faster or slower than the start
        run = launch(few_steps(dataset_dir=str(tmp_path/'data')) | {'dataset': 'rows'}, force=True)
    with pytest.raises(RuntimeError): run.wait()
    assert run.progress.doing.startswith(('tokenizing', 'reading the data')) and f'failed while {run.progress.doing}' in _headline(_look(run))
    assert state_or_empty(run, DOING)

def test_a_prediction_says_what_it_does(tiny, data, tmp_path):
    "Seen from a second view of the folder, while the call waits."
    code = f'''
from qwen2vl_nb.all import *
predict(predict_recipe({str(tiny)!r}, 'car_item_test', {str(tmp_path/'out')!r}, dataset_dir={str(data)!r}, use_cpu=True, max_new_tokens=16))'''
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    until((tmp_path/'out'/'waiter.json').exists)
    said = _followed(attach(tmp_path/'out'))
    shown, _ = process.communicate(timeout=PATIENCE)
    assert _in_order(said, 'starting, loading the libraries', 'starting, loading the model, row 0 of 100', 'done, row 100 of 100'), said
    assert 'loading the model' in shown and not (tmp_path/'out'/DOING).exists()

def test_a_launch_cell_can_be_run_again(few_steps, tmp_path, capsys):
    "A default folder has the time in its name: what has finished there stays. A folder that the user has named is not changed for another."
    recipe = few_steps(output_dir=tmp_path/'cars-20260101-120000', max_steps=2)
    before = dict(recipe)
    first = launch(recipe).wait()
    kept = {p: p.read_bytes() for p in first.output_dir.rglob('*') if p.is_file()}
    second = launch(recipe).wait()
    assert recipe == before and second.output_dir != first.output_dir and second.recipe['output_dir'] == str(second.output_dir)
    assert without_time(second.output_dir) == str(tmp_path/'cars') and 'contains a finished run, which stays as it is' in capsys.readouterr().out
    assert {p: p.read_bytes() for p in first.output_dir.rglob('*') if p.is_file()} == kept
    table = runs(tmp_path)
    assert sorted(table.run) == sorted(p.output_dir.name for p in (first, second)) and list(table.state) == ['done']*2
    first.output_dir.rename(tmp_path/'mine')
    with pytest.raises(ValueError, match=r"contains a finished run[\s\S]*launch\(recipe \| \{'output_dir': '\S+mine-2'\}\)"): launch(recipe | {'output_dir': str(tmp_path/'mine')})

def test_a_folder_that_is_taken_says_how_far_its_run_is(few_steps, tmp_path):
    recipe = few_steps(output_dir=tmp_path/'cars', max_steps=5000, num_train_epochs=1000., save_steps=5000)
    run = launch(recipe)
    with pytest.raises(FileNotFoundError, match='its run has not ended'): find_adapter(run)
    with pytest.raises(FileNotFoundError, match=r'There are runs below it[\s\S]*cars'): attach(tmp_path)
    until(lambda: run.progress.step, 'the first step')
    with pytest.raises(RuntimeError, match='A run is in progress in'): launch(recipe)
    run.stop()
    with pytest.raises(ValueError, match=r"has reached step \d+ of 5000[\s\S]*resume\(\) continues it"): launch(recipe)

def test_machines_that_would_take_different_folders_are_warned(few_steps, tmp_path):
    recipe = few_steps(output_dir=tmp_path/'cars-20260101-120000', use_cpu=None) | {'dataset': 'no_such'}
    with pytest.warns(UserWarning, match='differs from machine to machine'), pytest.raises(ValueError): launch(recipe, nnodes=2, master='127.0.0.1:29511')

def _executed(tmp_path, *cells):
    "A notebook as nbconvert saves it, without the state of its widgets, as JupyterLab does; and as a web page."
    nb = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
    nbformat.write(nb, tmp_path/'run.ipynb')
    convert = [sys.executable, '-m', 'nbconvert', '--to']
    subprocess.run([*convert, 'notebook', '--execute', '--ExecutePreprocessor.store_widget_state=False', '--output', 'out.ipynb', 'run.ipynb'], cwd=tmp_path, check=True, timeout=PATIENCE)
    subprocess.run([*convert, 'html', '--output', 'out.html', 'out.ipynb'], cwd=tmp_path, check=True, timeout=PATIENCE)
    return nbformat.read(tmp_path/'out.ipynb', 4), (tmp_path/'out.html').read_text()

def test_a_notebook_keeps_the_finished_curve_and_one_line(few_steps, tmp_path):
    "Run by nbconvert, whose streams keep every line; and as a web page, without a kernel. The waiting cell is the last."
    recipe = few_steps(max_steps=30)
    nb, page = _executed(tmp_path, f'from qwen2vl_nb.all import *\nrun = launch({recipe!r})\nrun.watch()', 'run.wait();')
    watched, waited = (cell.outputs for cell in nb.cells)
    watched, again = watched[:1], watched[1:]
    assert [o.output_type for o in watched + waited] == ['display_data']*2
    told, = re.findall('<div (.*?)>The kernel that showed this has ended', again[0].data['text/html'])
    assert told.split()[0] == 'hidden' and len(again) == 1, 'it is for a widget whose kernel has ended'
    assert re.match('run: done, step 30 of 30, epoch .*, took 0:0.*, ended 20', watched[0].data['text/plain'])
    assert base64.b64decode(watched[0].data['image/png']).startswith(b'\x89PNG')
    assert re.fullmatch(r'run: 100%\|█+\| 30/30 \[\d\d:\d\d, [\d.]+ \S+\]', waited[0].data['text/plain'])
    assert watched[0].data['image/png'][:200] in page.replace('\n', '') and page.count('30/30 [') == 1
