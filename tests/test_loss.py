"The log of a run, read as it grows, and its picture."
import json, math, os, subprocess, sys, threading
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from conftest import until
from qwen2vl_nb.run.loss import Log, plot_loss, read_log
from qwen2vl_nb.recipe import save_recipe

def row(step, **more):
    "A line of training as LLaMA-Factory logs it."
    clock = f'{step//1800}:{step//30%60:02}:{step*2%60:02}'
    return dict(current_steps=step, total_steps=1000, loss=round(2/step + .01*(step*7 % 13), 4), lr=1e-4*(1 - step/1000), epoch=step/100, elapsed_time=clock) | more

def evaluated(step, value=.5): return {k: v for k,v in row(step).items() if k not in ('loss', 'lr')} | {'eval_loss': value}

def text(rows): return ''.join(json.dumps(r) + '\n' for r in rows)

def run_with(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'trainer_log.jsonl').write_bytes(content.encode() if isinstance(content, str) else content)
    return folder

def append(folder, content):
    with open(folder/'trainer_log.jsonl', 'ab') as f: f.write(content.encode() if isinstance(content, str) else content)

def rows_of(log): return [{k: v for k,v in r.items() if v == v} for r in log.table().to_dict('records')]

ROWS = [r for n in range(5, 205, 5) for r in [row(n), *[evaluated(n, 1/n)]*(n % 50 == 0)]]

def drawn(figure, panel=0): return {line.get_label(): line for line in figure.axes[panel].lines}

# The log

def test_a_torn_last_line_waits_for_its_rest(tmp_path):
    half = len(text(ROWS)) - 20
    log = Log(run_with(tmp_path, text(ROWS)[:half]))
    assert log.update() and rows_of(log) == ROWS[:-1]
    assert not log.update() and log.offset == len(text(ROWS[:-1]))
    append(tmp_path, text(ROWS)[half:])
    assert log.update() and rows_of(log) == ROWS

@pytest.mark.parametrize('torn', ['{"current_steps": 205, "lo', '{"current_steps": 205, "lo\n', '\n\n', '\0\0\0', '{"current_steps": 205, "loss": "\n', '[1]\n3\n', '\xff\n'.encode('latin1')])
def test_a_torn_line_in_the_middle_costs_no_other_row(tmp_path, torn):
    more = [row(n) for n in range(205, 305, 5)]
    run_with(tmp_path, text(ROWS))
    append(tmp_path, torn)
    append(tmp_path, text(more))
    assert Log(tmp_path).update()
    assert read_log(tmp_path).current_steps.tolist() == [r['current_steps'] for r in ROWS + more]

def test_a_resumed_log_is_that_of_an_uninterrupted_run(tmp_path):
    first, again = [r | {'epoch': -1.} for r in ROWS], [r for r in ROWS if r['current_steps'] > 100]
    kept = [r for r in first if r['current_steps'] <= 100]
    run_with(tmp_path, text(first[:-12]) + text(first)[-30:-10] + text(again))
    assert Log(tmp_path).update()
    whole = pd.DataFrame(kept + again).astype({'elapsed_time': pd.StringDtype('pyarrow', na_value=float('nan'))})
    pd.testing.assert_frame_equal(read_log(tmp_path), whole)
    twice = run_with(tmp_path/'twice', text(first[:30]) + text([r for r in first[:30] if r['current_steps'] > 50]) + text(again))
    pd.testing.assert_frame_equal(read_log(twice), whole)

def test_a_resume_takes_back_the_evaluation_of_its_first_step(tmp_path):
    run_with(tmp_path, text([row(95), row(100), evaluated(100, .1), row(105), row(100)]))
    assert Log(tmp_path).update() and 'eval_loss' not in read_log(tmp_path)
    append(tmp_path, text([evaluated(100, .2)]))
    assert read_log(tmp_path).eval_loss.dropna().tolist() == [.2]

def test_of_a_step_said_twice_the_last_counts(tmp_path):
    run_with(tmp_path, text([row(5), row(10, loss=1.), evaluated(10, .3), row(10, loss=2.), evaluated(10, .4)]))
    log = read_log(tmp_path)
    assert log.loss.dropna().tolist()[1:] == [2.] and log.eval_loss.dropna().tolist() == [.4] and len(log) == 3

def test_a_prediction_in_the_same_folder_takes_nothing_back(tmp_path):
    progress = [{k: row(n)[k] for k in ('current_steps', 'total_steps', 'elapsed_time')} for n in (5, 10, 15)]
    run_with(tmp_path, text(ROWS + progress + [evaluated(5) | {'current_steps': 0}]))
    assert len(read_log(tmp_path)) == len(ROWS)
    assert read_log(run_with(tmp_path/'alone', text(progress*2))).current_steps.tolist() == [5, 10, 15]

def test_an_update_reads_only_what_was_added(tmp_path, monkeypatch):
    log, sizes = Log(run_with(tmp_path, text(ROWS))), []
    log.update()
    opened = open
    def watched(*args, **options):
        file = opened(*args, **options)
        class Watched:
            def __enter__(self): return self
            def __exit__(self, *_): file.close()
            def _count(self, data):
                sizes.append(len(data))
                return data
            def read(self, *size): return self._count(file.read(*size))
            def readline(self, *size): return self._count(file.readline(*size))
            def __getattr__(self, name): return getattr(file, name)
        return Watched()
    append(tmp_path, added := text([row(205)]))
    monkeypatch.setattr('builtins.open', watched)
    assert log.update()
    monkeypatch.undo()
    assert sizes and sum(sizes) <= 2*len(added) + 400 < len(text(ROWS))
    assert log.offset == len(text(ROWS)) + len(added) and rows_of(log)[:-1] == ROWS

@pytest.mark.parametrize('how', ['shorter', 'as long', 'longer', 'renamed', 'gone for a while'])
def test_a_log_that_was_replaced_is_read_anew(tmp_path, how):
    log, other = Log(run_with(tmp_path/'run', text(ROWS))), [r | {'epoch': 7.} for r in ROWS]
    log.update()
    if how == 'renamed':  # the same end, so that only the file itself is another
        other[0] = ROWS[0] | {'loss': 9 + ROWS[0]['loss']}
        other[1:] = ROWS[1:]
        assert len(text(other)) == len(text(ROWS))
        os.replace(run_with(tmp_path/'beside', text(other))/'trainer_log.jsonl', tmp_path/'run/trainer_log.jsonl')
    elif how == 'gone for a while':
        (tmp_path/'run/trainer_log.jsonl').unlink()
        assert not log.update() and rows_of(log) == ROWS
        run_with(tmp_path/'run', text(other))
    else:
        if how == 'shorter': other = other[:9]
        if how == 'longer': other = other + [row(205)]
        if how == 'as long': other = [r | {'total_steps': 2000} for r in ROWS]
        run_with(tmp_path/'run', text(other))
    assert log.update() and rows_of(log) == other and len(log.table()) == len(other)

def test_a_table_is_made_once(tmp_path):
    log = Log(run_with(tmp_path, text(ROWS)))
    log.update()
    table = log.table()
    assert not log.update() and log.table() is table
    append(tmp_path, text([row(205)]))
    assert log.update() and len(log.table()) == len(table) + 1

def test_no_log_yet(tmp_path):
    assert not Log(tmp_path).update() and Log(tmp_path).table().empty
    with pytest.raises(FileNotFoundError, match='logged nothing yet'): read_log(tmp_path)
    with pytest.raises(FileNotFoundError, match='logged nothing yet'): plot_loss(run_with(tmp_path/'a', text(ROWS)), tmp_path)
    assert read_log(run_with(tmp_path/'empty', '')).empty

PIECES = st.lists(st.sampled_from(['loss', 'eval', 'end', 'back', 'torn', 'nan', 'glued']), max_size=25)

@settings(max_examples=150, deadline=None)
@given(PIECES, st.lists(st.integers(0, 5000), max_size=12))
def test_read_in_any_portions_it_is_the_same(tmp_path_factory, pieces, cuts):
    step, content = 10, ''
    for piece in pieces:
        step = max(5, step - 20) if piece == 'back' else step + 5*(piece != 'eval')
        content += {'eval': text([evaluated(step)]), 'end': text([{'current_steps': step, 'epoch': 3.}]), 'torn': '{"current_steps": 1, "lo\n',
                    'glued': '{"current_steps": 1é, "l' + text([row(step)]), 'nan': text([row(step, loss=math.nan)])}.get(piece, text([row(step)]))
    data = content.encode()
    whole = run_with(tmp_path_factory.mktemp('whole'), data)
    part = run_with(tmp_path_factory.mktemp('part'), b'')
    log, ends = Log(part), sorted({min(c, len(data)) for c in cuts} | {len(data)})
    for start, end in zip([0, *ends], ends):
        append(part, data[start:end])
        log.update()
    assert log.offset == len(data)
    pd.testing.assert_frame_equal(log.table(), read_log(whole))
    steps = [r['current_steps'] for r in rows_of(log)]
    assert steps == sorted(steps) and 1 not in steps

@pytest.fixture(scope='module')
def long(tmp_path_factory):
    "The log of 100,000 steps, one of them very high, and a stretch of NaN."
    changes = {70_000: {'loss': 99.}} | {n: {'loss': math.nan} for n in range(30_000, 31_000)}
    return run_with(tmp_path_factory.mktemp('long'), text(row(n, **changes.get(n, {})) for n in range(1, 100_001)))

def test_a_long_log(long):
    table = read_log(long)
    figure = plot_loss(long, lr=True, throughput=True, log=True)
    assert len(table) == 100_000 and table.current_steps.iloc[-1] == 100_000
    raw, smoothed = drawn(figure)['as logged'], drawn(figure)['smoothed']
    assert max(len(raw.get_xdata()), len(smoothed.get_xdata()), len(drawn(figure)['not a number'].get_xdata())) < 10_000
    assert pd.Series(raw.get_ydata()).max() == 99 and raw.get_xdata()[pd.Series(raw.get_ydata()).argmax()] == 70_000
    assert pd.Series(raw.get_ydata()).isna().any() and not pd.Series(smoothed.get_ydata()).isna().any()

# The picture

@pytest.mark.parametrize('n', [1, 2, 3, 17, 200, 3000])
def test_smoothing_is_that_of_llamafactory(tmp_path, n):
    from llamafactory.extras.ploting import smooth
    rows = [row(i) for i in range(1, n + 1)]
    line = drawn(plot_loss(run_with(tmp_path, text(rows))))['smoothed']
    assert list(line.get_xdata()) == [r['current_steps'] for r in rows]
    assert max(abs(a - b) for a,b in zip(line.get_ydata(), smooth([r['loss'] for r in rows]), strict=True)) < 1e-12

def test_a_weight_of_ones_own(tmp_path):
    run = run_with(tmp_path, text(ROWS))
    losses = [r['loss'] for r in ROWS if 'loss' in r]
    assert list(drawn(plot_loss(run, smooth=0))['training'].get_ydata()) == losses
    assert 'as logged' not in drawn(plot_loss(run, smooth=0)) and list(drawn(plot_loss(run))['as logged'].get_ydata()) == losses
    ours, expected = drawn(plot_loss(run, smooth=.75))['smoothed'].get_ydata(), losses[:1]
    for v in losses[1:]: expected.append(.75*expected[-1] + .25*v)
    assert ours == pytest.approx(expected, abs=1e-12)
    for weight in (1, -.1, math.nan):
        with pytest.raises(ValueError, match='below 1'): plot_loss(run, smooth=weight)

def test_what_is_no_number_is_marked_and_spoils_nothing(tmp_path):
    clean, spoilt = run_with(tmp_path/'clean', text(r for r in ROWS if r['current_steps'] not in (60, 65, 100))), tmp_path/'spoilt'
    bad = {60: {'loss': math.nan}, 65: {'loss': math.inf}, 100: {'loss': -math.inf}}
    run_with(spoilt, text(r | bad.get(r['current_steps'], {}) for r in ROWS if 'eval_loss' not in r or r['current_steps'] != 100))
    assert 'NaN' in (spoilt/'trainer_log.jsonl').read_text() and math.isnan(read_log(spoilt).loss[11 + 1])
    ours, without = plot_loss(spoilt), plot_loss(clean)
    assert list(drawn(ours)['smoothed'].get_ydata()) == list(drawn(without)['smoothed'].get_ydata())
    assert list(drawn(ours)['not a number'].get_xdata()) == [60, 65, 100] and 'not a number' not in drawn(without)
    assert sum(map(math.isnan, drawn(ours)['as logged'].get_ydata())) == 3
    assert ours.axes[0].get_ylim() == pytest.approx(without.axes[0].get_ylim())
    assert [t.get_text() for t in ours.legends[0].get_texts()][-1] == 'not a number'

def test_evaluation_and_its_lowest(tmp_path):
    run = run_with(tmp_path/'run', text([row(5), evaluated(5, .9), row(10), evaluated(10, .1234), row(15), evaluated(15, math.nan), row(20), evaluated(20, .5)]))
    figure = plot_loss(run)
    assert 'evaluation, lowest 0.1234' in legend(figure)
    assert list(drawn(figure)['evaluation'].get_ydata()) == [.9, .1234, .5] and drawn(figure)['evaluation'].get_linestyle() == '--'
    assert not [t for t in legend(plot_loss(run, run)) if 'lowest' in t]

def legend(figure): return [t.get_text() for t in figure.legends[0].get_texts()]

def test_runs_are_called_what_differs_in_their_recipes(tmp_path):
    runs = [run_with(tmp_path/name/'train', text(ROWS)) for name in 'abc']
    assert legend(plot_loss(*runs)) == ['a/train', 'b/train', 'c/train']
    assert legend(plot_loss(runs[0], tmp_path/'b'/'..'/'b'/'train')) == ['a/train', 'b/train']
    same = dict(model_name_or_path='m', lora_rank=8, bf16=True)
    for run, more in zip(runs, (dict(learning_rate=1e-4), dict(learning_rate=2e-5), dict(learning_rate=2e-5, dataset='x'))):
        save_recipe(same | more | {'output_dir': run.parent}, run/'recipe.yaml')
    assert legend(plot_loss(*runs[:2])) == ['learning_rate 0.0001', 'learning_rate 2e-05']
    assert legend(plot_loss(*runs)) == ['learning_rate 0.0001, no dataset', 'learning_rate 2e-05, no dataset', 'learning_rate 2e-05, dataset x']
    save_recipe(same | {'learning_rate': 1e-4, 'output_dir': runs[1].parent}, runs[1]/'recipe.yaml')
    assert legend(plot_loss(*runs[:2])) == ['a/train', 'b/train'], 'equal recipes'
    (runs[1]/'recipe.yaml').write_text('just words')
    assert legend(plot_loss(*runs[:2])) == ['a/train', 'b/train'], 'no recipe'

def test_runs_are_told_apart_without_colour(tmp_path):
    runs = [run_with(tmp_path/str(i), text(ROWS)) for i in range(8)]
    handles = plot_loss(*runs).legends[0].legend_handles
    assert len({(h.get_color(), h.get_marker()) for h in handles}) == 8 and len({h.get_marker() for h in handles[:6]}) == 6

def test_panels(tmp_path):
    run = run_with(tmp_path/'run', text(ROWS))
    figure = plot_loss(run, log=True, lr=True, throughput=True)
    assert [ax.get_ylabel() for ax in figure.axes] == ['loss', 'learning rate', 'steps/s']
    assert [ax.get_yscale() for ax in figure.axes] == ['log', 'linear', 'linear']
    assert list(figure.axes[1].lines[0].get_ydata()) == [r['lr'] for r in ROWS if 'lr' in r]
    assert figure.axes[2].lines[0].get_ydata() == pytest.approx(.5)
    assert len(plot_loss(run).axes) == 1 and plot_loss(run).axes[0].get_yscale() == 'linear'

def test_throughput_of_a_resumed_run_that_counts_tokens(tmp_path):
    # what LLaMA-Factory logs after a resume: all tokens over the time since the resume
    before = [row(n, total_tokens=300*n, throughput=150.) for n in range(5, 105, 5)]
    after = [row(n, total_tokens=300*n, throughput=150*n/(n - 100), elapsed_time=row(n - 100)['elapsed_time']) for n in range(105, 205, 5)]
    run = run_with(tmp_path, text(before + after))
    figure = plot_loss(run, throughput=True)
    assert figure.axes[1].get_ylabel() == 'tokens/s' and figure.axes[1].lines[0].get_ydata() == pytest.approx(150)
    assert figure.axes[1].lines[0].get_xdata()[-1] > 180

def test_throughput_of_days(tmp_path):
    rows = [row(n, elapsed_time=f'{n//24} day{"s"*(n >= 48)}, {n%24}:00:00' if n >= 24 else f'{n}:00:00') for n in range(1, 100)]
    run = run_with(tmp_path, text(rows))
    assert plot_loss(run, throughput=True).axes[1].lines[0].get_ydata() == pytest.approx(1/3600)

def test_export(tmp_path):
    run, other = run_with(tmp_path/'run', text(ROWS)), run_with(tmp_path/'other', text(ROWS))
    plot_loss(run, other, lr=True, path=tmp_path/'out'/'loss.PNG')
    picture = Image.open(tmp_path/'out'/'loss.PNG')
    assert picture.format == 'PNG' and picture.width == 2100 and picture.convert('RGBA').getpixel((0, 0))[3] == 0
    plot_loss(run, path=tmp_path/'out'/'loss.svg')
    assert ET.parse(tmp_path/'out'/'loss.svg').getroot().tag.endswith('svg')
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['loss.PNG', 'loss.svg']
    for name in ('loss.pdf', 'loss'):
        with pytest.raises(ValueError, match='.png or .svg'): plot_loss(run, path=tmp_path/name)
    assert not list(tmp_path.glob('loss*'))

def test_it_draws_from_threads_without_pyplot(tmp_path):
    runs = [run_with(tmp_path/str(i), text(ROWS[:20 + 5*i])) for i in range(3)]
    draw = lambda run: plot_loss(run, log=True, lr=True, throughput=True)._repr_png_()
    alone = [draw(run) for run in runs]
    with ThreadPoolExecutor(3) as pool: assert list(pool.map(draw, runs*2)) == alone*2
    assert len(set(alone)) == 3

def test_it_asks_for_no_window(tmp_path):
    run = run_with(tmp_path/'run', text(ROWS))
    code = 'import sys; from qwen2vl_nb.run.loss import plot_loss; plot_loss("run")._repr_png_(); print("matplotlib.pyplot" in sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], cwd=run.parent, capture_output=True, text=True, env=os.environ | {'MPLBACKEND': 'qtagg'})
    assert done.stdout.strip() == 'False', done.stderr

def test_a_log_is_drawn_as_it_grows(tmp_path):
    log = Log(run_with(tmp_path, text(ROWS[:10])))
    whole, sizes = sum('loss' in r for r in ROWS), []
    def live():
        while whole not in sizes: sizes.append(len(drawn(plot_loss(log))['smoothed'].get_xdata()))
    thread = threading.Thread(target=live)
    thread.start()
    until(lambda: sizes)
    for r in ROWS[10:]: append(tmp_path, text([r]))
    until(lambda: not thread.is_alive())
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] == whole
