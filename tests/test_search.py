"The search that the notebook on sweeps shows, interrupted and continued, with Optuna itself."
import json, os, re, signal, subprocess, sys

from conftest import ROOT, until
from qwen2vl_nb.recipe import save_recipe
from qwen2vl_nb.run.folder import RUN, WAITER
from qwen2vl_nb.run.start import attach

def test_a_search_is_interrupted_and_continued(few_steps, tmp_path):
    "The notebook's own code; its kernel is killed in the second run, which outlives it and whose values are then tried again."
    import optuna
    cells = json.loads((ROOT/'nbs'/'tuning'/'20_sweep.ipynb').read_text(encoding='utf-8'))['cells']
    code, = re.findall('```python\n(.*?)```', ''.join(text for cell in cells if 'import optuna' in (text := ''.join(cell['source']))), re.S)
    code = code.replace("'my_test',", "").replace('n_trials=20', 'n_trials=3 - len(study.get_trials(states=[TrialState.COMPLETE]))').replace("'maximize'", "'minimize'")
    save_recipe(few_steps(val_size=.25, eval_strategy='steps', eval_steps=2, plot_loss=None), tmp_path/'recipe.yaml')
    (tmp_path/'search.py').write_text("from qwen2vl_nb.all import *\nrecipe = load_recipe('recipe.yaml')\n" + code)
    def trained(): return sorted((p.parent for p in (tmp_path/'run').glob(f'*/{RUN}')), key=lambda p: p.stat().st_ctime)
    def search(): return subprocess.Popen([sys.executable, 'search.py'], cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL)
    kernel = search()
    until(lambda: len(trained()) == 2 and (trained()[1]/WAITER).exists() or kernel.poll() is not None)
    os.killpg(kernel.pid, signal.SIGKILL)
    kernel.wait()
    assert search().wait() == 0
    assert len(trained()) == 3 and {attach(p).status for p in trained()} == {'done'}
    study = optuna.load_study(study_name='cars', storage=f'sqlite:///{tmp_path}/search.db')
    done = [t for t in study.trials if t.state.name == 'COMPLETE']
    assert len(done) == 3 and study.best_value == min(t.value for t in done)
    assert len({json.dumps(t.params, sort_keys=True) for t in study.trials}) == 3
