"A log may hold anything: looking at it never hangs, never fails with a raw exception, and keeps the rows that are right."
import json, os, random

import pytest

from qwen2vl_nb.files import Damaged
from qwen2vl_nb.run.loss import best_evaluation, plot_loss, read_log

GOOD = [dict(current_steps=n, total_steps=9, loss=1/n, lr=1e-4, elapsed_time=f'0:00:0{n}') for n in range(1, 6)]
TEXT = ''.join(json.dumps(row) + '\n' for row in GOOD).encode()
WRONG = ['"nan"', 'null', '[1]', '{}', 'true', '1' + '0'*400, 'Infinity', '-Infinity', 'NaN', '1e400', '"x"']
KEYS = ['total_steps', 'loss', 'eval_loss', 'lr', 'epoch', 'elapsed_time', 'total_tokens']

def looked_at(folder):
    best_evaluation(folder)
    assert plot_loss(folder, lr=True, throughput=True, log=True)._repr_png_()
    return read_log(folder)

@pytest.mark.parametrize('line', [b'', b'[]', b'null', b'3', b'"a"', b'\0\xff\xfe', b'['*100_000, b'{"current_steps": ', b'x'*3_000_000,
    b'{"current_steps": true}', b'{"current_steps": 1' + b'0'*400 + b'}', b'{"current_steps": -1, "loss": 1}'])
def test_a_line_of_anything_costs_no_other_row(tmp_path, line):
    (tmp_path/'trainer_log.jsonl').write_bytes(line + b'\n' + TEXT)
    assert looked_at(tmp_path).current_steps.tolist() == [1, 2, 3, 4, 5]

def test_a_value_of_any_type_costs_no_row(tmp_path):
    lines = [f'{{"current_steps": {6 + i}, "{key}": {value}}}' for i,(key,value) in enumerate((k, v) for k in KEYS for v in WRONG)]
    (tmp_path/'trainer_log.jsonl').write_bytes(TEXT + '\n'.join(lines).encode() + b'\n')
    assert looked_at(tmp_path).loss.dropna().tolist()[:5] == [row['loss'] for row in GOOD]

@pytest.mark.parametrize('kind', ['directory', 'fifo', 'device'])
def test_what_is_no_regular_file_is_named(tmp_path, kind):
    log = tmp_path/'trainer_log.jsonl'
    {'directory': log.mkdir, 'fifo': lambda: os.mkfifo(log), 'device': lambda: log.symlink_to('/dev/zero')}[kind]()
    assert best_evaluation(tmp_path) is None
    for look in (read_log, plot_loss):
        with pytest.raises(Damaged, match='trainer_log.jsonl is not a regular file'): look(tmp_path)

def test_binary_and_empty_logs_have_no_rows(tmp_path):
    for content in (b'', random.Random(0).randbytes(100_000)):
        (tmp_path/'trainer_log.jsonl').write_bytes(content)
        assert looked_at(tmp_path).empty
