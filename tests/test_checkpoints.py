"Checkpoints scored by their answers, and answers while a run trains: real runs of the embedded model, killed and resumed, and folders that are not to be trusted."
import json, math, os, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from conftest import small_disk, until
from qwen2vl_nb.checkpoint import when_written
from qwen2vl_nb.data.registry import Registry, dataset_samples
from qwen2vl_nb.prediction.engines import predict
from qwen2vl_nb.prediction.predictions import Predictions
from qwen2vl_nb.prediction.scores import compare, score
from qwen2vl_nb.prediction.serve import serve
from qwen2vl_nb.prediction.show import show_predictions
from qwen2vl_nb.processes import marked
from qwen2vl_nb.recipe import answering_recipe, find_adapter, predict_recipe, train_recipe
from qwen2vl_nb.run.folder import Best, state_or_empty, write_best
from qwen2vl_nb.run.merge import export
from qwen2vl_nb.run.preview import read_previews, show_previews
from qwen2vl_nb.run.start import Run, launch
from qwen2vl_nb.run.watch import RunView
from qwen2vl_nb.tuning.checkpoints import score_checkpoints
from qwen2vl_nb.tuning.hand_over import serving_lines
from qwen2vl_nb.zero import zero_config

ASKED = dict(max_new_tokens=24)

def _answers(rows): return [row['predict'] for row in rows]

@pytest.fixture(scope='module')
def trained(tiny, data, tmp_path_factory):
    "Runs of the embedded model, which train side by side."
    folder = tmp_path_factory.mktemp('runs')
    def begin(name, nproc=1, preview=2, share='1', **changes):
        usual = dict(dataset_dir=str(data), max_steps=160, max_samples=200, val_size=.1, eval_strategy='steps', eval_steps=40, save_steps=40, logging_steps=10,
                     learning_rate=1e-3, per_device_train_batch_size=4, per_device_eval_batch_size=4, gradient_accumulation_steps=1, bf16=None, use_cpu=True,
                     preprocessing_num_workers=None)
        return launch(train_recipe(tiny, 'car_item', folder/name, **usual | changes), nproc=nproc, preview=preview, env={'QWEN2VL_NB_PREVIEW': share})  # however fast it trains
    two_ranks = dict(nproc=2, preview=1, deepspeed=zero_config('z2'), use_cpu=None, max_steps=100, eval_steps=50, save_steps=1000)
    runs = dict(lora=begin('lora'), plain=begin('plain', preview=0), full=begin('full', finetuning_type='full', lora_target=None, learning_rate=1e-4, max_steps=20,
                                                                               eval_steps=10, save_steps=10))
    (runs['full'].output_dir/'preview.jsonl').mkdir()  # its answers cannot be written
    runs |= dict(z2=begin('z2', **two_ranks), z3=begin('z3', **two_ranks | dict(nproc=1, deepspeed=zero_config('z3'), max_steps=2, eval_steps=1, save_steps=1000)),
                 hurried=begin('hurried', share='0.001', max_steps=2, eval_steps=1, save_steps=1000))
    return SimpleNamespace(**{name: run.wait() for name, run in runs.items()})

@pytest.fixture(scope='module')
def scored(trained):
    "The scores of four checkpoints, whose prediction was killed when the first one had answered some of its rows."
    run, folder = trained.lora, trained.lora.output_dir/'scores'/'car_item_test'
    code = f'from qwen2vl_nb.tuning import score_checkpoints; score_checkpoints({str(run.output_dir)!r}, "car_item_test", **{ASKED})'
    first = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: (folder/'checkpoint-40'/'predictions.jsonl').exists(), 'the first checkpoint answers')
    for process in marked(state_or_empty(folder, 'run.json')['id']): process.kill()
    first.kill()
    first.wait()
    until(lambda: not Run(folder).is_running, 'its end is written down')
    before = {p.parent.name: p.read_text().splitlines() for p in folder.glob('*/predictions.jsonl')}
    return SimpleNamespace(run=run, before=before, found=score_checkpoints(run, 'car_item_test', **ASKED))

@pytest.fixture(scope='module')
def alone(trained, scored, tiny, data, tmp_path_factory):
    "The last checkpoint of the LoRA run and of the full run, each predicted on its own; and the full run scored."
    folder, last = tmp_path_factory.mktemp('alone'), [trained.lora.output_dir/'checkpoint-160', trained.full.output_dir/'checkpoint-20']
    given = dict(dataset_dir=str(data), use_cpu=True, preprocessing_num_workers=1, **ASKED)
    recipes = predict_recipe(tiny, 'car_item_test', folder/'lora', last[0], **given), predict_recipe(last[1], 'car_item_test', folder/'full', **given)
    with ThreadPoolExecutor(2) as pool: lora, full = pool.map(predict, recipes)
    return SimpleNamespace(lora=lora, full=full, scored=score_checkpoints(trained.full, 'car_item_test', **ASKED))

def _logged(run):
    rows = map(json.loads, (run.output_dir/'trainer_log.jsonl').read_text().splitlines())
    return [(row['current_steps'], row.get('loss'), row.get('eval_loss'), row.get('lr')) for row in rows]

def _weights(run): return load_file(run.output_dir/'adapter_model.safetensors')

def test_answers_during_the_training_leave_no_trace_in_it(trained):
    lines = [line for line in read_previews(trained.lora) if 'rows' in line]
    assert lines and not (trained.plain.output_dir/'preview.jsonl').exists()
    assert _logged(trained.lora) == _logged(trained.plain) and len(_logged(trained.lora)) > 16
    with_answers, without = map(_weights, (trained.lora, trained.plain))
    assert with_answers.keys() == without.keys() and all(with_answers[name].equal(without[name]) for name in without)

def test_answers_during_the_training_are_those_of_its_weights(trained):
    rows = read_previews(trained.lora)[-1]['rows']
    assert [row['row'] for row in rows] == [0, 10] and {row['prompt'] for row in rows} == {'Fill in the item card.'}
    assert all(json.loads(row['label']).keys() == {'item', 'color'} and os.path.isfile(row['images'][0]) for row in rows)
    assert any('"color"' in row['predict'] and row['finish_reason'] == 'stop' for row in rows), rows

def test_on_two_ranks_only_the_first_generates_and_the_others_wait(trained):
    lines = read_previews(trained.z2)
    assert trained.z2.status == 'done' and [row['row'] for row in lines[-1]['rows']] == [0]
    assert len({line['step'] for line in lines}) == len(lines)

def test_under_zero_3_it_says_why_there_are_no_answers(trained):
    note, = read_previews(trained.z3)
    assert trained.z3.status == 'done' and 'ZeRO-3' in note['note'] and 'score_checkpoints' in note['note']
    assert 'ZeRO-3' in str(show_previews(trained.z3))

def test_it_says_once_why_there_are_no_answers_yet(trained):
    note, = read_previews(trained.hurried)
    assert trained.hurried.status == 'done' and note['step'] == 1 and 'at most 0.1 % of the training time' in note['note']
    assert str(show_previews(trained.hurried)).startswith('At step 1, there were no answers')

def test_what_was_said_before_there_were_answers_is_gone_with_them(trained, tmp_path):
    lines = (trained.lora.output_dir/'preview.jsonl').read_text()
    (tmp_path/'preview.jsonl').write_text(json.dumps({'step': 1, 'note': 'No answers yet.'}) + '\n' + lines)
    assert str(show_previews(tmp_path)).startswith('Answers during the training')

def test_a_training_goes_on_without_answers_that_cannot_be_written(trained):
    assert trained.full.status == 'done' and 'Answers could not be generated: IsADirectoryError' in trained.full.log()
    assert read_previews(trained.full) == []

def test_scoring_that_was_killed_asks_only_what_is_missing(scored):
    run, found = scored.run, scored.found
    assert list(found) == [f'checkpoint-{step}' for step in (40, 80, 120, 160)]
    assert 0 < sum(map(len, scored.before.values())) < 400, 'it was killed too late'
    for name, lines in scored.before.items():
        after = (run.output_dir/'scores'/'car_item_test'/name/'predictions.jsonl').read_text().splitlines()
        assert {*lines} <= {*after} and len(after) == 100
    assert state_or_empty(run.output_dir/'scores'/'car_item_test', 'progress.json')['from_step'] == sum(map(len, scored.before.values()))
    started = (run.output_dir/'scores'/'car_item_test'/'run.json').stat().st_mtime_ns
    assert {name: dict(of) for name, of in score_checkpoints(run, 'car_item_test', **ASKED).items()} == {name: dict(of) for name, of in found.items()}
    assert (run.output_dir/'scores'/'car_item_test'/'run.json').stat().st_mtime_ns == started, 'nothing is asked twice'
    with pytest.raises(ValueError) as told: score_checkpoints(run, 'car_item_test', max_new_tokens=8)
    folder = run.output_dir/'scores'/'car_item_test'
    assert str(told.value) == f'{folder} contains the answers to another question:\n- recipe, max_new_tokens: 24 before, 8 now\nNothing was touched. To have the rows asked again, delete this folder.'

def test_what_is_wrong_is_said_before_anything_is_asked(trained, tmp_path):
    "Nothing that could only fail after the predictions, and nothing that would have every checkpoint give the answers of one."
    run = trained.plain
    Registry(tmp_path).add('unlabelled', [{'instruction': 'What?', 'output': ''}]*3)
    for part, given in {"did you mean 'max_new_tokens'": dict(max_new_token=8), 'adapter: it is set for each': dict(adapter=run), 'output_dir: it is set': dict(output_dir=tmp_path),
                        "no measure 'jsn' to rank by": dict(measure='jsn'), "Less of 'malformed' is better": dict(measure='malformed'), 'give functions by name': dict(measures=len),
                        'tolerance=nan': dict(tolerance=math.nan), 'a measure .exact. already': dict(measures={'exact': len})}.items():
        with pytest.raises(ValueError, match=part): score_checkpoints(run, 'car_item_test', **given)
    with pytest.raises(ValueError, match='None of the 3 rows has a label'): score_checkpoints(run, 'unlabelled', dataset_dir=str(tmp_path))
    for dataset in (None, '', ['car_item_test']):
        with pytest.raises(ValueError, match='name a registered data set'): score_checkpoints(run, dataset)
    assert not (run.output_dir/'scores').exists() and run.best is None

def test_answers_do_not_take_the_place_of_a_training(trained, tiny, data):
    "Its folder stays that of the run."
    run = trained.plain
    before = sorted(p.name for p in run.output_dir.iterdir())
    with pytest.raises(ValueError, match='the folder of a training'): serve(run, run.output_dir, use_cpu=True)
    with pytest.raises(ValueError, match='the folder of a training'): predict(predict_recipe(tiny, 'car_item_test', run.output_dir, run, dataset_dir=str(data), use_cpu=True))
    assert sorted(p.name for p in run.output_dir.iterdir()) == before and run.recipe['do_train'] and run.status == 'done'

def test_answers_of_exchanged_adapters_are_those_of_predict(scored, alone):
    assert _answers(alone.lora) == _answers(scored.found.predictions['checkpoint-160']) != _answers(scored.found.predictions['checkpoint-40'])
    here, there = (json.loads((p.output_dir/'question.json').read_text()) for p in (alone.lora, scored.found.predictions['checkpoint-160']))
    assert here == there
    assert (scored.run.output_dir/'scores'/'car_item_test'/'run.log').read_text().count('Loading checkpoint shards') <= 1

def test_checkpoints_of_a_full_run_are_loaded_in_turn(trained, alone):
    assert list(alone.scored) == ['checkpoint-10', 'checkpoint-20'] and trained.full.best.name in alone.scored
    assert _answers(alone.full) == _answers(alone.scored.predictions['checkpoint-20'])

def test_the_answers_of_a_checkpoint_are_an_ordinary_prediction(scored):
    first, last = (Predictions(scored.run.output_dir/'scores'/'car_item_test'/f'checkpoint-{step}') for step in (40, 160))
    assert score(last) == scored.found['checkpoint-160'] and compare(first, last, measure='json').after == scored.found['checkpoint-160']['json']
    assert 'label' in str(show_predictions(last, n=2))
    row, table = scored.found['checkpoint-160'].overall.loc['json'], scored.found.table
    assert list(table.loc['checkpoint-160', 'json']) == list(row) and list(table['step', '']) == [40, 80, 120, 160]
    logged = {step: loss for step, _, loss, _ in _logged(scored.run) if loss is not None}
    assert dict(zip(table['step', ''], table['eval_loss', ''])) == logged

def test_a_fully_trained_run_answers_with_its_best_checkpoint(alone, trained):
    run = trained.full
    asked = answering_recipe(run.recipe, run, 'car_item_test')
    assert asked['model_name_or_path'] == str(run.best) and run.best.name.startswith('checkpoint-')
    assert asked['output_dir'] == f'{run.best}-predict-car_item_test'
    assert f"--model_name_or_path {run.best} " in serving_lines(run)['api']

def test_the_best_by_each_measure_is_found_again_elsewhere(scored, tiny, tmp_path):
    run, brief = Run(scored.run.output_dir), {'brevity': lambda row: -len(row['predict'])}
    def recorded(): return subprocess.check_output([sys.executable, '-c', f'from qwen2vl_nb.run import attach; print(attach({str(run.output_dir)!r}).best)'], text=True).strip()
    by_json = score_checkpoints(run, 'car_item_test', **ASKED)
    assert by_json.measure == 'json' and by_json.best.name == max(by_json, key=lambda name: by_json[name]['json'])
    assert find_adapter(run) == run.best == by_json.best
    remarks = {name: repr(score(Predictions(run.output_dir/'scores'/'car_item_test'/name))) for name in by_json}
    assert [name for name, text in remarks.items() if 'was chosen on these rows' in text] == [by_json.best.name]
    shortest = score_checkpoints(run, 'car_item_test', 'brevity', measures=brief, **ASKED)
    means = {name: sum(-len(row['predict']) for row in rows)/100 for name, rows in shortest.predictions.items()}
    assert shortest.best.name == max(means, key=means.get) and recorded() == str(shortest.best) == predict_recipe('m', adapter=run)['adapter_name_or_path']
    with pytest.raises(ValueError, match='no measure .beauty. to rank by; available: exact'): score_checkpoints(run, 'car_item_test', 'beauty', **ASKED)
    assert run.best == shortest.best
    tied = score_checkpoints(run, 'car_item_test', 'same', measures={'same': lambda row: 50}, **ASKED)
    assert tied.best.name == max(tied, key=lambda name: tied[name]['bleu-4'])
    alike = [found['bleu-4'] for found in tied.values()].count(tied[tied.best.name]['bleu-4'])
    why = {1: 'the answers of this one are most like the labels', 4: 'this one is the earliest'}.get(alike, f'{alike} of these are most like the labels')
    assert f'4 of 4 have this value; {why}' in repr(tied) and 'have this value' not in repr(shortest)
    lost = score_checkpoints(run, 'car_item_test', 'nothing', measures={'nothing': lambda row: 0}, **ASKED)
    assert lost.best.name == lost.table['eval_loss', ''].idxmin() and '4 of 4 have this value; its evaluation loss is the lowest' in repr(lost)
    first = run.output_dir/'checkpoint-40'
    write_best(run, Best(first.name, when_written(first), 'mine', 1., None, None, 1, 'x'))
    merged, name = load_file(export(run, tmp_path/'merged')/'model.safetensors'), 'model.layers.0.mlp.up_proj'
    base, weights = load_file(tiny/'model.safetensors')[f'{name}.weight'], load_file(first/'adapter_model.safetensors')
    a, b = (next(v for k, v in weights.items() if k.endswith(f'layers.0.mlp.up_proj.lora_{side}.weight')) for side in 'AB')
    change = 2*(b @ a).float()  # lora_alpha is twice the rank
    assert torch.allclose(merged[f'{name}.weight'].float() - base.float(), change, atol=float(change.abs().max())/20)

def test_incomplete_checkpoints_are_left_out_and_named(trained, tmp_path):
    folder = tmp_path/'run'
    folder.mkdir()
    for name in ('run.json', 'recipe.yaml'): shutil.copy2(trained.lora.output_dir/name, folder)
    for step in (40, 80): shutil.copytree(trained.lora.output_dir/f'checkpoint-{step}', folder/f'checkpoint-{step}')
    (folder/'checkpoint-40'/'trainer_state.json').unlink()
    os.truncate(folder/'checkpoint-80'/'adapter_model.safetensors', 1000)
    with pytest.raises(ValueError) as e: score_checkpoints(folder, 'car_item_test')
    assert 'checkpoint-40: it is incomplete' in str(e.value) and 'checkpoint-80: its adapter' in str(e.value)
    with pytest.raises(ValueError, match='it is not a training run'): score_checkpoints(trained.lora.output_dir/'scores'/'car_item_test', 'car_item_test')

def test_a_checkpoint_that_is_deleted_meanwhile_costs_no_other_its_answers(trained, tmp_path):
    "As by a run that is still training, with save_total_limit: it goes before it was asked."
    run = Path(shutil.copytree(trained.plain.output_dir, tmp_path/'run'))
    with ThreadPoolExecutor(1) as pool, pytest.warns(UserWarning, match='Deleted meanwhile, .* left out: checkpoint-160'):
        call = pool.submit(score_checkpoints, run, 'car_item_test', **ASKED)
        folder = run/'scores'/'car_item_test'
        until(lambda: (folder/'checkpoint-40'/'predictions.jsonl').exists() or call.done())
        for process in (held := marked(state_or_empty(folder, 'run.json')['id'])): process.suspend()
        shutil.rmtree(run/'checkpoint-160')
        for process in held: process.resume()
        assert list(call.result()) == ['checkpoint-40', 'checkpoint-80', 'checkpoint-120']

def test_other_rows_under_the_same_name_are_answered_in_a_folder_of_their_own(trained, data, tmp_path):
    "As after a second split; the folder of the first ones is used as long as their answers are in it, also by the next scoring of them."
    run, registry, rows = tmp_path/'run', Registry(tmp_path/'data'), dataset_samples(Registry(data), 'car_item_test', 5)
    shutil.copytree(trained.plain.output_dir, run, ignore=shutil.ignore_patterns('checkpoint-120', 'checkpoint-160'))
    few = dict(dataset_dir=str(registry.dataset_dir), max_new_tokens=4)
    def scored(first, last, **changes):
        registry.add('cars', rows[first:last])
        found = score_checkpoints(run, 'cars', **few | changes)
        folder = found.predictions[found.best.name].output_dir.parent
        assert state_or_empty(run, 'best.json')['rows'] == last - first and [len(p) for p in found.predictions.values()] == [last - first]*2
        said, = [remark for remark in Predictions(folder/found.best.name).remarks if 'was chosen' in remark]
        assert 'was chosen on these rows' in said
        return folder
    first, second = scored(0, 3), scored(3, 5)
    assert first == run/'scores'/'cars' and second.parent == first.parent and second.name.startswith('cars-')
    started = [(folder/'run.json').stat().st_mtime_ns for folder in (first, second)]
    assert [scored(0, 3), scored(3, 5)] == [first, second] and [(folder/'run.json').stat().st_mtime_ns for folder in (first, second)] == started
    for rows_of in ((0, 3), (3, 5)):
        with pytest.raises(ValueError, match='contains the answers to another question:\n- recipe, max_new_tokens: 4 before, 5 now'): scored(*rows_of, max_new_tokens=5)
    assert {p.name for p in first.parent.iterdir()} == {first.name, second.name}
    best = state_or_empty(run, 'best.json')
    assert not [text for text in Predictions(first/best['checkpoint']).remarks if 'was chosen' in text], 'the checkpoint was chosen on other rows'
    shutil.rmtree(first)
    assert scored(3, 5) == second and not first.exists()

def test_what_was_scored_is_found_again_where_nothing_can_be_written(trained, tmp_path):
    "In another place, on a disk that is read-only by now, as an archive is; what would have to be asked says that it can't be written."
    few = dict(max_samples=4, max_new_tokens=8)
    with small_disk(tmp_path/'disk', '64m') as remount:
        run = Path(shutil.copytree(trained.plain.output_dir, tmp_path/'disk'/'run'))
        before = score_checkpoints(run, 'car_item_test', **few)
        run = run.rename(tmp_path/'disk'/'moved')
        remount('64m,ro')
        assert score_checkpoints(run, 'car_item_test', **few).table.equals(before.table)
        with pytest.warns(UserWarning, match='could not be recorded as the best checkpoint: .*Read-only'): score_checkpoints(run, 'car_item_test', 'bleu-4', **few)
        with pytest.raises(OSError, match='Read-only'): score_checkpoints(run, 'car_item', **few)

def test_a_hostile_record_of_the_best_names_no_other_folder(trained, tmp_path):
    run = tmp_path/'run'
    shutil.copytree(trained.lora.output_dir/'checkpoint-40', run/'checkpoint-40')
    shutil.copytree(trained.lora.output_dir/'checkpoint-40', tmp_path/'checkpoint-7')
    good = dict(checkpoint='checkpoint-40', written=when_written(run/'checkpoint-40'), measure='exact', value=1., low=None, high=None, rows=1, dataset='x')
    for content in ({}, [], good | {'checkpoint': '../checkpoint-7'}, good | {'checkpoint': 7}, good | {'written': 'x'}, good | {'value': 1e999}, good | {'measure': '\ud800'}):
        (run/'best.json').write_text(json.dumps(content))
        assert Run(run).best is None and find_adapter(run) == run/'checkpoint-40', content
    (run/'best.json').write_text(json.dumps(good))
    assert Run(run).best == run/'checkpoint-40'
    (run/'best.json').unlink()
    os.mkfifo(run/'best.json')
    assert Run(run).best is None
    with pytest.raises(FileExistsError, match='not replaced'): write_best(run, Best(**good))

def test_hostile_answers_are_shown_as_text_and_read_in_bounds(tmp_path):
    bad = '<img src=x onerror=alert(1)>$x$'
    row = dict(row=0, images=['/dev/zero', 'http://127.0.0.1:9/x.png', bad], prompt=bad, label=bad, predict=bad, finish_reason=bad)
    (tmp_path/'run.json').write_text('{}')
    with open(tmp_path/'preview.jsonl', 'w') as f:
        f.write('x'*5_000_000 + '\n')
        for step in (1, 2): f.write(json.dumps(dict(step=step, seconds=1, rows=[row | dict(row=i) for i in range(200)])) + '\n')
        f.write(json.dumps(dict(step=3, note=bad)) + '\n{"step": 4, "seconds": 1, "rows": [{"ro')
    shown = show_previews(tmp_path)._repr_html_()
    assert '<img src=x' not in shown and shown.count('&lt;img src=x') > 16 and len(shown) < 200_000
    view = RunView(Run(tmp_path))
    view._refresh(True)
    assert '<img src=x' not in view._cards.value and view._cards.layout.display is None
    (tmp_path/'preview.jsonl').unlink()
    os.mkfifo(tmp_path/'preview.jsonl')
    assert read_previews(tmp_path) == []

def test_launch_refuses_a_senseless_number_of_rows_and_a_file_of_somebody_else(few_steps, tmp_path):
    for preview in (-1, 2.5, 'all', 1000):
        with pytest.raises(ValueError, match='from 0'): launch(few_steps(), preview=preview)
    (tmp_path/'run').mkdir(exist_ok=True)
    (tmp_path/'run'/'preview.jsonl').write_text('mine')
    with pytest.raises(ValueError, match='preview.jsonl'): launch(few_steps(eval_strategy='steps', eval_steps=2, val_size=.2))
    assert (tmp_path/'run'/'preview.jsonl').read_text() == 'mine'
