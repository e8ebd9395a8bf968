"The ten lines of the README, exactly as they are, where there is no GPU."
import os, re, subprocess, sys

import pandas as pd
import pytest

from conftest import ROOT
from qwen2vl_nb.all import *

README = (ROOT/'README.md').read_text(encoding='utf-8')

@pytest.fixture
def here(tmp_path):
    "A folder with what the lines name: a spreadsheet, of which two rows are faulty, and a model."
    labels = pd.read_csv(ROOT/'data'/'car_item'/'labels.csv')[:60]
    rows = pd.DataFrame({'photo': [str(ROOT/'data'/'car_item'/p) for p in labels.picture], 'caption': labels.card,
                         'car_id': [f'{i//2:03}' for i in range(60)]})
    rows.loc[6, 'photo'] = 'gone.png'
    rows.loc[30, 'caption'] = '<image>'
    rows.to_excel(tmp_path/'labels.xlsx', index=False)
    (tmp_path/'models').mkdir()
    (tmp_path/'models'/'Qwen2-VL-7B-Instruct').symlink_to(ROOT/'data'/'tiny_qwen2vl')
    return tmp_path

def test_the_ten_lines_run_as_they_stand(here):
    lines, = re.findall(r'^```python\n(.*?)^```', README, re.M | re.S)
    assert len(lines.splitlines()) == 10
    done = subprocess.run([sys.executable, '-c', lines], cwd=here, capture_output=True, text=True,
                          env=os.environ | {'CUDA_VISIBLE_DEVICES': ''})
    assert not done.returncode, done.stderr
    assert 'Dropped 2 of 60 samples:' in done.stdout and 'There is no file gone.png' in done.stdout
    assert 'No GPU is visible here: the recipe is for the CPU' in done.stdout
    run, = runs(here/'saves').query("kind == 'training'").run if 'kind' in runs(here/'saves') else [None]
    assert len(dataset_samples(Registry(here/'cars'), 'my_cars')) == 52
