"Batch prediction: the tokens are LLaMA-Factory's, and no row is lost or doubled, whoever is killed when."
import errno, json, random, shutil, signal, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import PATIENCE, small_disk, until
from qwen2vl_nb.model import family_of, usual_template
from qwen2vl_nb.prediction import hf
from qwen2vl_nb.prediction.rows import Answers, Asked
from qwen2vl_nb.prediction import engines as predicting
from qwen2vl_nb.prediction.engines import predict
from qwen2vl_nb.prediction.predictions import Predictions
from qwen2vl_nb.prediction.question import asked_row
from qwen2vl_nb.recipe import predict_recipe, save_recipe
from qwen2vl_nb.data.registry import Registry, dataset_samples
from qwen2vl_nb.processes import marked
from qwen2vl_nb.run.folder import state_or_empty
from qwen2vl_nb.run.start import attach
from qwen2vl_nb.tiny import tiny_model

def _answers(predictions): return [row['predict'] for row in predictions]

@pytest.fixture(scope='module')
def ask(tiny, data):
    "A recipe for the test set; keywords change it."
    def make(folder, **changes):
        return predict_recipe(tiny, 'car_item_test', folder, **dict(dataset_dir=str(data), max_new_tokens=24, use_cpu=True, preprocessing_num_workers=1) | changes)
    return make

@pytest.fixture(scope='module')
def once(ask, tmp_path_factory):
    "The test set, answered without interruption."
    return predict(ask(tmp_path_factory.mktemp('once')/'out'))

@pytest.fixture(scope='module')
def many(data):
    "Six hundred samples, without answers: enough for some seconds of work."
    rows = dataset_samples(Registry(data), 'car_item_test')
    forms = ['What is this?', 'Name the item.', 'Make a list.', 'Say it in two words.', 'Write the item as JSON.', 'Name the color.']
    return [{'id': f'{form} {i}', 'images': row['images'], 'instruction': f'<image>{form}'} for form in forms for i, row in enumerate(rows)]

@pytest.fixture(scope='module')
def uninterrupted(ask, many, tmp_path_factory): return predict(ask(tmp_path_factory.mktemp('many')/'out'), many)

def test_answers_are_those_of_llamafactory(ask, once, tmp_path):
    own = predict(ask(tmp_path/'own', per_device_eval_batch_size=50), engine='llamafactory')
    assert len(own) == 100 and _answers(own) == _answers(once)
    assert [(r['id'], r['images'], r['prompt'], r['label']) for r in own] == [(r['id'], r['images'], r['prompt'], r['label']) for r in once]
    answers, started = list(own), (tmp_path/'own'/'run.json').read_text()
    (tmp_path/'own'/'predictions.jsonl').unlink()  # as where nobody was there when it ended
    generated = Predictions(tmp_path/'own')
    assert generated.path.name == 'generated_predictions.jsonl'
    assert [(r['prompt'], r['label'], r['predict']) for r in generated] == [(r['prompt'], r['label'], r['predict']) for r in once]
    assert list(predict(ask(tmp_path/'own', per_device_eval_batch_size=50), engine='llamafactory')) == answers
    assert (tmp_path/'own'/'run.json').read_text() == started, 'its answers were taken up, not made again'

@pytest.fixture(scope='module', params=['qwen2_vl', 'qwen2_5_vl', 'qwen3_vl'])
def small(request, tiny, tmp_path_factory):
    "A small model of each family."
    return tiny if request.param == 'qwen2_vl' else tiny_model(tmp_path_factory.mktemp('models')/request.param, family=request.param)

def _dialogue(*turns, **rest):
    return {'messages': [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(turns)], 'images': []} | rest

TOOLS = json.dumps([{'name': 'look', 'description': 'Look again.', 'parameters': {'type': 'object', 'properties': {'where': {'type': 'string'}}}}])

def _picture(path, size, **saved):
    "A picture of noise."
    Image.frombytes('RGB', size, random.Random(0).randbytes(3*size[0]*size[1])).save(path, **saved)
    return str(path)

@pytest.fixture(scope='module')
def asked_of_all_kinds(data, tmp_path_factory):
    one, two, large = (str(data/'car_item'/'images'/f'000{i}.png') for i in (1, 2, 3))
    clip, folder, turned = str(next((data/'car_video').rglob('*.mp4'))), tmp_path_factory.mktemp('pictures'), Image.Exif()
    turned[274] = 6  # a quarter to the right
    return {
        'a picture': {'instruction': '<image>What is this?', 'input': '', 'output': 'A car.', 'images': [one]},
        'several pictures': {'instruction': 'First <image> then <image>.', 'input': 'Which <image>?', 'output': 'b', 'images': [one, two, large]},
        'no picture': {'instruction': 'What is this?', 'input': '', 'output': 'c', 'images': []},
        'a system prompt': {'instruction': '<image>What is this?', 'input': 'In a word.', 'output': 'd', 'images': [two], 'system': 'Be brief. 简短。'},
        'several turns': _dialogue('<image>What is this?', 'A car.', 'And <image>?', 'A bus.', 'Sure?', 'Yes.', images=[one, two]),
        'a history': {'instruction': 'And now <image>?', 'input': '', 'output': 'f', 'history': [['<image>What is this?', 'A car.']], 'images': [one, two]},
        'a clip': _dialogue('<video>Which way?', 'Left.', videos=[clip]),
        'a clip and a picture': _dialogue('<image><video>The same?', 'No.', images=[large], videos=[clip]),
        'a system prompt in a dialogue': _dialogue('<image>What?', 'A car.', images=[two], system='Answer in Latin.'),
        'tools': {'messages': [{'role': 'user', 'content': '<image>Look.'}, {'role': 'function_call', 'content': '{"name": "look", "arguments": {"where": "left"}}'},
                               {'role': 'observation', 'content': 'A wheel.'}, {'role': 'assistant', 'content': 'A car.'}], 'images': [one], 'tools': TOOLS},
        'a turned picture': {'instruction': '<image>What is this?', 'input': '', 'output': 'g', 'images': [_picture(folder/'turned.jpg', (90, 60), exif=turned)]},
        'large and small pictures': {'instruction': '<image><image><image>?', 'input': '', 'output': 'h', 'images': [
            _picture(folder/'large.png', (1600, 1200)), _picture(folder/'small.png', (3, 5)), _picture(folder/'thin.png', (600, 2))]},
        'thoughts': _dialogue('<image>What?', '<think>\nIt is red.\n</think>\n\nA car.', 'Sure?', '<think>\nAgain.\n</think>\n\nYes.', images=[one]),
        'no label': _dialogue('<image>What is this?', '', images=[two]),
        'nothing but a picture': {'instruction': '<image>', 'input': '', 'output': 'i', 'images': [one]},
    }

KINDS = ['a picture', 'several pictures', 'no picture', 'a system prompt', 'several turns', 'a history', 'a clip', 'a clip and a picture',
         'a system prompt in a dialogue', 'tools', 'a turned picture', 'large and small pictures', 'thoughts', 'no label', 'nothing but a picture']

@pytest.fixture
def both_prompts(ask, small, tmp_path):
    "For one sample: (LLaMA-Factory's token ids, its batch), (ours)."
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_template_and_fix_tokenizer
    from llamafactory.data.loader import get_dataset
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer
    def make(sample, template):
        registry = Registry(tmp_path/'data')
        registry.add('asked', [sample])
        recipe = ask(tmp_path/'out', model_name_or_path=str(small), template=template, dataset_dir=str(tmp_path/'data'), eval_dataset='asked', cutoff_len=4096)
        model_args, data_args, training_args, *_ = get_train_args(recipe | {'cache_dir': str(tmp_path/'.cache')})
        loaded = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(loaded['tokenizer'], data_args)
        rows = get_dataset(template, model_args, data_args, training_args, 'sft', **loaded)['eval_dataset']
        loaded['tokenizer'].padding_side = 'left'
        theirs = SFTDataCollatorWith4DAttentionMask(template=template, model=None, **loaded)([rows[0]])
        Answers(tmp_path/'asked.jsonl').add([asked_row(0, s) for s in dataset_samples(registry, 'asked')])
        prompts = hf.load_prompts(recipe, Asked(tmp_path/'asked.jsonl'))[0]
        made, ours, failed = prompts[[0]]
        assert not failed
        return rows[0]['input_ids'], theirs, ours
    return make

@pytest.mark.parametrize('kind', KINDS)
def test_prompts_are_those_of_llamafactory(kind, small, asked_of_all_kinds, both_prompts):
    "In each family and under each of its templates, token by token and pixel by pixel."
    for template in family_of(small).templates:
        ids, theirs, ours = both_prompts(asked_of_all_kinds[kind], template)
        shown = ours['input_ids'][0][ours['attention_mask'][0] == 1].tolist()
        assert shown == list(ids) and theirs.keys() - {'labels'} == ours.keys()
        for key in ours: assert ours[key].equal(theirs[key]) if torch.is_tensor(ours[key]) else ours[key] == theirs[key], key
        grids = [len(ours.get(f'{part}_grid_thw', [])) for part in ('image', 'video')]
        media = [len(asked_of_all_kinds[kind].get(key, [])) for key in ('images', 'videos')]
        assert grids == (media if any(media) else [1, 0]), 'to a batch without pictures LLaMA-Factory adds one that is not attended to'

def test_every_kind_is_asked(asked_of_all_kinds): assert list(asked_of_all_kinds) == KINDS

def test_rows_of_a_batch_do_not_touch_each_other(asked_of_all_kinds, small, ask, tmp_path):
    "All kinds in one batch have the tokens and pixels that each has alone."
    Answers(tmp_path/'asked.jsonl').add([asked_row(i, sample) for i, sample in enumerate(asked_of_all_kinds.values())])
    prompts = hf.load_prompts(ask(tmp_path/'out', model_name_or_path=str(small), template=usual_template(small), cutoff_len=4096), Asked(tmp_path/'asked.jsonl'))[0]
    alone = [prompts[[i]][1] for i in range(len(KINDS))]
    _, together, _ = prompts[list(range(len(KINDS)))]
    for i, one in enumerate(alone):
        assert together['input_ids'][i][together['attention_mask'][i] == 1].equal(one['input_ids'][0][one['attention_mask'][0] == 1]), KINDS[i]
    seen = [one['pixel_values'] for one, sample in zip(alone, asked_of_all_kinds.values()) if sample['images']]
    assert together['pixel_values'].equal(torch.cat(seen))

def _begun(ask_again, folder):
    "Start a prediction in another process, which can be left behind, and give its run once it is at work."
    caller = subprocess.Popen([sys.executable, '-c', ask_again], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    until(lambda: (folder/'waiter.json').exists() and attach(folder).is_running or caller.poll() is not None)
    assert caller.poll() is None, caller.communicate()[0]
    return caller, attach(folder)

def _call(recipe, samples, folder):
    "The code of a call from another process."
    save_recipe(recipe, folder/'recipe.yaml')
    (folder/'samples.json').write_text(json.dumps(samples))
    return (f'import json, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom qwen2vl_nb.all import *\n'
            f'predict(load_recipe({str(folder/"recipe.yaml")!r}), json.load(open({str(folder/"samples.json")!r})))\n')

def _worker(run):
    "The process that holds the model."
    return next((p for p in marked(state_or_empty(run, 'run.json')['id']) if 'prediction.hf' in p.cmdline() and 'prediction.hf' not in p.parent().cmdline()), None)

@contextmanager
def _held(run):
    "The process that holds the model stands still meanwhile, so that the run can't end."
    worker = until(lambda: _worker(run))
    worker.suspend()
    yield
    worker.resume()

def _rows_done(folder):
    path = folder/'predictions.jsonl'
    return path.read_bytes().count(b'\n') if path.exists() else 0

def _wait_a_little(run, chance, before, most):
    "Until some moment of the start, or until some more rows are done, however fast the machine is."
    more, seconds = chance.randint(1, most), chance.uniform(0, 3)
    if chance.random() < .6: return until(lambda: not run.is_running or _rows_done(run.output_dir) >= before + more)
    until(lambda: not run.is_running or _worker(run))
    end = time.monotonic() + seconds
    until(lambda: not run.is_running or time.monotonic() > end or _rows_done(run.output_dir) > before)

def _killed_again_and_again(ask, many, uninterrupted, folder, times):
    chance, done = random.Random(0), []
    recipe = ask(folder/'out')
    for _ in range(times):
        before = _rows_done(folder/'out')
        caller, run = _begun(_call(recipe, many, folder), folder/'out')
        _wait_a_little(run, chance, before, len(many)//(2*times))
        if worker := _worker(run): worker.kill()
        assert 'rows are done and kept' in caller.communicate(timeout=PATIENCE)[0]
        done.append(len(Predictions(folder/'out')) if (folder/'out'/'predictions.jsonl').exists() else 0)
    assert done == sorted(done) and 0 < done[-1] < len(many), 'none is lost, and it was killed in the middle each time'
    p = predict(recipe, many)
    assert [r['id'] for r in p] == [s['id'] for s in many] and len(p.path.read_text().splitlines()) == len(many)
    assert _answers(p) == _answers(uninterrupted) and not p.failed

@pytest.mark.parametrize('times', [5, pytest.param(25, marks=pytest.mark.soak)])
def test_killed_again_and_again_it_finishes(ask, many, times, tmp_path):
    more = [sample | {'id': f'{sample["id"]} {k}'} for k in range(times//2) for sample in many]  # more than all kills leave time for
    _killed_again_and_again(ask, more, predict(ask(tmp_path/'whole'), more), tmp_path, times)

def test_an_interrupted_cell_leaves_it_at_work_and_another_call_attaches(ask, many, uninterrupted, tmp_path):
    recipe = ask(tmp_path/'out')
    caller, run = _begun(_call(recipe, many, tmp_path), tmp_path/'out')
    assert any('rows/s' in line or 's/row' in line for line in caller.stdout), 'it is waiting, with progress'
    with _held(run):
        caller.send_signal(signal.SIGINT)
        said = caller.communicate(timeout=PATIENCE)[0]
        assert 'The run continues in the background' in said and 'KeyboardInterrupt' in said and run.is_running
        with pytest.raises(ValueError, match='recipe, max_new_tokens: 24 before, 8 now'): predict(ask(tmp_path/'out', max_new_tokens=8), many)
        assert run.is_running
    p = predict(recipe, many)
    assert not (tmp_path/'out'/'earlier').exists(), 'it was not started again'
    assert _answers(p) == _answers(uninterrupted)

def test_two_workers_share_the_rows_however_late_one_begins(ask, many, uninterrupted, tmp_path, monkeypatch):
    both = predicting._workers
    def late(about):
        first, second = both(about)
        return [first, second | {'command': ['sh', '-c', 'sleep 8; exec "$@"', 'sh', *second['command']]}]
    monkeypatch.setattr(predicting, '_workers', late)
    p = predict(ask(tmp_path/'out'), many, nproc=2)
    assert [r['id'] for r in p] == [s['id'] for s in many] and _answers(p) == _answers(uninterrupted)
    assert len(p.path.read_text().splitlines()) == len(many)

def test_each_worker_has_a_gpu_of_its_own():
    about = {'python': 'python', 'gpus': [{'device': '2'}, {'device': 'GPU-5'}]}
    assert [w['env'] for w in predicting._workers(about | {'nproc': 2})] == [{'CUDA_VISIBLE_DEVICES': '2'}, {'CUDA_VISIBLE_DEVICES': 'GPU-5'}]
    with pytest.raises(ValueError, match='nproc=3: each worker needs a GPU'): predicting._workers(about | {'nproc': 3})

def test_a_row_that_the_model_fails_of_does_not_take_the_others_along(ask, many, tmp_path):
    "The text of one is the model's own mark for a picture. Columns that are called like keys of a row change nothing in this."
    columns = {'error': 'none', 'predict': None, 'label': 7, 'tokens': [], 'asked': {}, 'finish_reason': 'length', 'row': -1}
    asked = [sample | columns for sample in [*many[:9], many[9] | {'instruction': '<image>What is <|image_pad|>?'}]]
    with pytest.warns(UserWarning, match='1 of 10 rows have no answer'): p = predict(ask(tmp_path/'out'), asked)
    assert [r['row'] for r in p.failed] == [9] and 'tokens' in p[9]['error'] and all(r['predict'] for r in p[:9])
    assert all(row[f'column.{name}'] == value for row in p for name, value in columns.items())

def test_pictures_that_are_not_there_are_told_before_the_start(ask, many, tmp_path):
    asked = [*many[:2], many[2] | {'images': [str(tmp_path/'gone.png')]}]
    with pytest.warns(UserWarning) as found: predict(ask(tmp_path/'out'), asked)
    first, last = [str(w.message) for w in found if issubclass(w.category, UserWarning)]
    assert first == '1 of 3 rows have a picture or clip that is not there, and get no answer: row 2.'
    assert last.startswith('1 of 3 rows have no answer; once the cause is gone, calling predict again')

@pytest.mark.soak
def test_two_calls_at_once_wait_for_the_same_run(ask, many, uninterrupted, tmp_path):
    code = _call(ask(tmp_path/'out'), many, tmp_path)
    both = [subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    said = [caller.communicate(timeout=PATIENCE)[0] for caller in both]
    assert [caller.returncode for caller in both] == [0, 0], said
    p = Predictions(tmp_path/'out')
    assert _answers(p) == _answers(uninterrupted) and not (tmp_path/'out'/'earlier').exists()

@pytest.mark.soak
def test_it_stops_and_goes_on(ask, many, uninterrupted, tmp_path):
    recipe = ask(tmp_path/'out')
    caller, run = _begun(_call(recipe, many, tmp_path), tmp_path/'out')
    until(lambda: run.progress.step or not run.is_running)
    run.stop()
    assert 'was stopped' in caller.communicate(timeout=PATIENCE)[0] and run.status == 'stopped' and not marked(state_or_empty(run, 'run.json')['id'])
    before = list(Predictions(tmp_path/'out'))
    assert 0 < len(before) < len(many)
    with pytest.raises(RuntimeError, match='called again as before, continues'): run.resume()
    p = predict(recipe, many)
    assert _answers(p) == _answers(uninterrupted) and all(p[row['row']] == row for row in before)

def test_a_picture_deleted_meanwhile_costs_its_row_only(ask, many, uninterrupted, tmp_path):
    "And when it is back, the row is asked again."
    copies = [sample | {'images': [str(shutil.copy(sample['images'][0], tmp_path/f'{i:03}.png'))]} for i, sample in enumerate(many[:120])]
    recipe = ask(tmp_path/'out')
    caller, run = _begun(_call(recipe, copies, tmp_path), tmp_path/'out')
    with _held(run): gone = Path(copies[77]['images'][0]).rename(tmp_path/'gone.png')
    assert '1 of 120 rows have no answer' in caller.communicate(timeout=PATIENCE)[0]
    p = Predictions(tmp_path/'out')
    assert [r['row'] for r in p.failed] == [77] and '077.png' in p[77]['error'] and p[77]['predict'] is None
    assert [r['predict'] for r in p if r['row'] != 77] == [r['predict'] for r in uninterrupted.rows[:120] if r['row'] != 77]
    gone.rename(copies[77]['images'][0])
    again = predict(recipe, copies)
    assert not again.failed and again[77]['predict'] == uninterrupted[77]['predict'] and len(again.path.read_text().splitlines()) == 120

def test_a_full_disk_loses_nothing(ask, many, uninterrupted, tmp_path):
    with small_disk(tmp_path/'disk', '340k') as enlarge:
        recipe = ask(tmp_path/'disk'/'out')
        with pytest.raises(RuntimeError, match=r'The disk is full.[\s\S]* of 600 rows are done and kept'): predict(recipe, many)
        before = list(Predictions(tmp_path/'disk'/'out'))
        assert 0 < len(before) < len(many)
        enlarge('64m')
        p = predict(recipe, many)
        assert _answers(p) == _answers(uninterrupted) and all(p[row['row']] == row for row in before)
        del p  # it keeps its file open

def test_a_disk_that_is_full_before_the_start_is_told(ask, many, tmp_path):
    with small_disk(tmp_path/'disk', '64k'):
        with pytest.raises(OSError): (tmp_path/'disk'/'full').write_bytes(bytes(2**20))
        with pytest.raises(OSError, match=r'The disk is full, and \S+asked.jsonl could not be written. What was there is unchanged') as told: predict(ask(tmp_path/'disk'/'out'), many)
        assert told.value.errno == errno.ENOSPC and [p.name for p in (tmp_path/'disk'/'out').iterdir()] == ['.asked.lock']

@pytest.mark.soak
def test_sampled_answers_are_the_same_after_an_interruption(ask, many, tmp_path):
    hot = dict(do_sample=True, temperature=1.5, top_p=1.)
    whole, again = predict(ask(tmp_path/'whole', **hot), many[:200]), predict(ask(tmp_path/'cut', **hot), many[:200])
    kept = again.path.read_text().splitlines(keepends=True)
    again.path.write_text(''.join(kept[::3]))
    assert _answers(predict(ask(tmp_path/'cut', **hot), many[:200])) == _answers(whole)
    assert len(set(_answers(whole))) > 40, 'it was hot'

def test_too_long_a_row_is_an_error_of_its_own(ask, data, tmp_path):
    picture = str(data/'car_item'/'images'/'0001.png')
    rows = [{'images': [picture], 'instruction': '<image>What is this?'}, {'images': [picture]*9, 'instruction': '<image>'*9}]
    with pytest.warns(UserWarning, match='1 of 2 rows have no answer'): p = predict(ask(tmp_path/'out', cutoff_len=100), rows)
    assert p[0]['predict'] == 'The ' + p[0]['predict'][4:] and 'cutoff_len is 100' in p[1]['error']

def test_predictions_of_an_unknown_question_are_left_alone(ask, tmp_path):
    (tmp_path/'predictions.jsonl').write_text('{"row": 0, "predict": "x"}\n')
    with pytest.raises(ValueError, match='it is unknown which question'): predict(ask(tmp_path))
    assert (tmp_path/'predictions.jsonl').read_text() == '{"row": 0, "predict": "x"}\n'

def test_an_unknown_model_is_said_before_anything_starts(ask, tmp_path):
    with pytest.raises(ValueError, match='model_name_or_path'): predict(ask(tmp_path/'out') | {'model_name_or_path': str(tmp_path/'none')})
    assert not (tmp_path/'out'/'run.json').exists()

def test_a_question_that_nobody_has_answered_gives_way_to_the_corrected_one(tiny, data, tmp_path):
    "Whether it was refused before the start or its workers failed; once there are answers, another question is refused as ever."
    recipe = predict_recipe(tiny, 'car_item_test', tmp_path/'out', dataset_dir=str(data), max_new_tokens=4, max_samples=4, use_cpu=True, preprocessing_num_workers=1)
    with pytest.raises(ValueError, match="max_new_token: LLaMA-Factory has no such argument; did you mean 'max_new_tokens'"): predict(recipe | {'max_new_token': 8, 'max_samples': 9})
    assert not (tmp_path/'out'/'run.json').exists()
    other = tmp_path/'python'  # for what is known, its LLaMA-Factory may have this argument
    other.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    other.chmod(0o755)
    with pytest.raises(RuntimeError, match='max_new_token'): predict(recipe | {'max_new_token': 8}, python=other)
    answers = [row['predict'] for row in predict(recipe)]
    assert len(answers) == 4 and all(answers)
    with pytest.raises(ValueError, match='another question:\n- recipe, max_new_tokens: 4 before, 5 now'): predict(recipe | {'max_new_tokens': 5})
    assert [row['predict'] for row in predict(recipe)] == answers
