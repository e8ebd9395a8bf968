"The benchmark that measures memory on a GPU, tried on the CPU, where it counts live tensors."
import importlib.util, subprocess, sys

import numpy as np
import pandas as pd
import pytest

@pytest.fixture(scope='module')
def script(data): return data.parent/'nbs'/'benchmarks'/'gpu_memory.py'

@pytest.fixture(scope='module')
def calibrate(script):
    spec = importlib.util.spec_from_file_location('gpu_memory', script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.calibrate

def _start(script, *arguments):
    return subprocess.Popen([sys.executable, script, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def test_rows_are_measured_once(script, tmp_path):
    "A built model with LoRA; beside it ZeRO-2 under torchrun, and ZeRO-3 as the first of four ranks."
    files = {tmp_path/'one.csv': [0], tmp_path/'two.csv': [1, 2]}
    begun = [_start(script, out, '--cpu', '--rows', *rows) for out, rows in files.items()]
    said = [child.communicate()[0] for child in begun]
    assert not any(child.returncode for child in begun), said
    rows = pd.concat(map(pd.read_csv, files), ignore_index=True)
    lora, z2, z3 = rows.allocated
    assert 30e6 < lora < 60e6, 'seven million parameters in fp32, and little else'
    assert 2e9 < z2 < 2.1e9, "DeepSpeed's bucket of 5e8 elements, and little else"
    assert 4e6 < z3 < 20e6, 'a fourth of the state, and some whole layers'
    assert list(rows.how) == ['trainer', 'trainer', 'fake group'] and list(rows.ranks) == [1, 1, 4]
    assert list(rows.tokens) == [256, 128, 128] and list(rows.image_tokens) == [130, 63, 63]
    assert set(rows.card) == {'cpu'} and rows[['reserved', 'context', 'driver']].isna().all(axis=None)
    assert rows[['predicted', 'torch', 'transformers', 'deepspeed', 'llamafactory']].notna().all(axis=None)
    out = tmp_path/'two.csv'
    before, again = out.read_text(), _start(script, out, '--cpu', '--rows', 1, 2)
    assert again.communicate()[0].count('already measured') == 2 and out.read_text() == before

def test_without_a_gpu_it_says_so(script, tmp_path):
    asked = _start(script, tmp_path/'out.csv')
    assert asked.communicate()[0].strip() == 'There is no NVIDIA GPU here; --cpu tries the script on small models.'
    assert asked.returncode == 1 and not (tmp_path/'out.csv').exists()

def _rows(count=12):
    predicted = np.linspace(6e9, 90e9, count)
    return pd.DataFrame(dict(predicted=predicted, reserved=1.07*predicted + 4e8, context=6e8))

def test_a_known_allowance_is_found(calibrate):
    rows = _rows()
    out_of_memory = rows.tail(1).assign(reserved=np.nan, context=np.nan)
    found = calibrate(pd.concat([out_of_memory, rows]))
    assert found['factor'] == pytest.approx(1.07) and found['offset'] == pytest.approx(4e8) and found['context'] == pytest.approx(6e8)
    assert found['fitted'] == found['tested'] == 6
    assert found['mean_error'] < 1e-9 and found['worst_under'] < 1e-9

def test_the_error_is_that_of_rows_that_were_not_fitted(calibrate):
    rows = _rows()
    rows.loc[3, 'reserved'] += .25*(rows.reserved[3] + rows.context[3])
    found = calibrate(rows)
    assert found['factor'] == pytest.approx(1.07) and found['worst_under'] == pytest.approx(.2)
    assert found['mean_error'] == pytest.approx(.2/6)
    with pytest.raises(ValueError, match='at least 6'): calibrate(rows.assign(reserved=np.nan))
