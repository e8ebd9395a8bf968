"The ten lines of the README, exactly as they are, on a machine without a GPU."
import re, subprocess, sys

import pandas as pd
import pytest

from conftest import ROOT
from qwen2vl_nb.all import Predictions, Registry, attach, dataset_samples, runs

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
    lines, = re.findall(r'^```python\n(.*?)^```', (ROOT/'README.md').read_text(encoding='utf-8'), re.M | re.S)
    assert len(lines.splitlines()) == 10
    done = subprocess.run([sys.executable, '-c', lines], cwd=here, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    for said in ('Dropped 2 of 60 rows:', '- row 8 of labels.xlsx: There is no file gone.png.',
                 '- row 32 of labels.xlsx: The answer has <image>', 'the recipe is for the CPU (use_cpu: true; without bf16',
                 '52 rows for training, 6 for the test.', 'Folder: saves/Qwen2-VL-7B-Instruct/lora/my_cars-'):
        assert said in done.stdout, done.stdout
    samples = [dataset_samples(Registry(here/'cars'), name) for name in ('my_cars', 'my_cars_test')]
    assert sum(map(len, samples)) == 58
    training, prediction = sorted((attach(here/'saves'/p) for p in runs(here/'saves').run), key=lambda run: not run.recipe['do_train'])
    assert (training.status, prediction.status) == ('done', 'done')
    answers = Predictions(prediction.output_dir)
    assert len(answers) == len(samples[1]) and not answers.failed and f'{len(answers)} rows' in done.stdout
