"Trackers: TensorBoard gets the losses of the log, and a key reaches the run without being written down."
import os, re
from pathlib import Path

import psutil
import pytest

from conftest import until
from qwen2vl_nb.processes import marked
from qwen2vl_nb.run.folder import RUN, read_state
from qwen2vl_nb.run.loss import read_log
from qwen2vl_nb.run.start import launch

KEYS = {'WANDB_API_KEY': 'wandb_secret_1', 'SWANLAB_API_KEY': 'swan_secret_2', 'MLFLOW_TRACKING_PASSWORD': 'mlflow_secret_3',
        'MLFLOW_TRACKING_URI': 'https://bob:mlflow_secret_4@tracker.example'}

def _is_rank_with_keys(process):
    try: return 'run.rank' in process.cmdline() and KEYS.items() <= process.environ().items()
    except (psutil.Error, OSError): return False

def test_a_key_reaches_the_run_and_is_written_nowhere(few_steps, tmp_path):
    "As environment variables, and as SwanLab's argument in the recipe."
    run = launch(few_steps(max_steps=2, swanlab_api_key='swan_secret_5'), env=KEYS)
    mark = read_state(run, RUN)['id']
    found = until(lambda: [p for p in marked(mark) if _is_rank_with_keys(p)] or not run.is_running)
    assert found is not True, 'the run ended before a rank with the keys was seen'
    run.wait()
    assert {*KEYS} == {*read_state(run, RUN)['secrets']['env']}
    files = [p for folder in (tmp_path, Path(os.environ['XDG_DATA_HOME'])) for p in folder.rglob('*') if p.is_file()]
    assert len(files) > 20 and not [p for p in files if re.search(rb'(wandb|swan|mlflow)_secret', p.read_bytes())]

@pytest.mark.soak
def test_tensorboard_gets_the_losses_of_the_log(few_steps, tmp_path, monkeypatch):
    "`make soak` installs TensorBoard into a folder of its own, which `TENSORBOARD` names."
    site = os.environ['TENSORBOARD']
    monkeypatch.setenv('PYTHONPATH', f"{os.environ['PYTHONPATH']}{os.pathsep}{site}")
    run = launch(few_steps(report_to='tensorboard', eval_dataset='car_item_test', eval_strategy='steps', eval_steps=2), nproc=1).wait()
    folder, = {file.parent for file in (run.output_dir/'runs').rglob('events.out.tfevents.*')}  # the evaluation at the end has a file of its own
    monkeypatch.syspath_prepend(site)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    told = EventAccumulator(str(folder))
    told.Reload()
    log = read_log(run)
    for tag, column in (('train/loss', 'loss'), ('eval/loss', 'eval_loss'), ('train/learning_rate', 'lr')):
        rows = log.dropna(subset=[column])
        seen = [*{e.step: e.value for e in told.Scalars(tag)}.items()]  # the last step is evaluated twice
        assert len(seen) >= 2 and [step for step, _ in seen] == list(rows.current_steps)
        assert [value for _, value in seen] == pytest.approx(list(rows[column]), abs=1e-4, rel=1e-4)
