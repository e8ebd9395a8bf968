"""No false alarm: where `check_samples`, `check_recipe` and `launch` say error, LLaMA-Factory really stops, drops the row or spoils it.

The rows of the corpus of bad data go through LLaMA-Factory's own loading, preprocessing and collating, and what is left of them through
the embedded model. Recipes go through its `run_exp`, all in one child. What is proven elsewhere is named with its test. And a finding of
level error that nothing here proves fails the last test: prove it, or make it a warning."""
import ast, json, os, random, re, shutil, signal, stat, subprocess, sys
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

import qwen2vl_nb
from conftest import PATIENCE
from qwen2vl_nb.data import media
from qwen2vl_nb.data.check import check_samples
from qwen2vl_nb.checks import data_findings, late_findings
from qwen2vl_nb.model_faults import model_findings
from qwen2vl_nb.recipe_faults import recipe_findings
from qwen2vl_nb.data.registry import sample_entry
from qwen2vl_nb.data.tokens import cut_samples
from qwen2vl_nb.model import other_templates, text_templates
from qwen2vl_nb.recipe import train_recipe
from qwen2vl_nb.run.start import launch
from qwen2vl_nb.zero import zero_config
from test_batches import write_rows
import test_preferences
from test_bad_data import CLIPS, DIALOGUES, PICTURES, QUESTIONS, ROWS, _clip, _dialogue, _noise, _question, _said, _save

LEVELS = 'warning', 'note', 'mended'

# --- which of the package's lines say error

def _is_error(call):
    "Whether a call of `Fault` or `Finding` may give an error: no other level stands in it."
    given = [*call.args, *[k.value for k in call.keywords if k.arg == 'level']]
    return not any(isinstance(value, ast.Constant) and value.value in LEVELS for value in given)

@cache
def _error_lines():
    "(module, line) → the function and the words, of all that can say error."
    found = {}
    package = Path(qwen2vl_nb.__path__[0])
    for path in package.rglob('*.py'):
        module = '.'.join(path.relative_to(package).with_suffix('').parts)
        tree = ast.parse(source := path.read_text(encoding='utf-8'))
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        for call in ast.walk(tree):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ('Fault', 'Finding') and _is_error(call)): continue
            inside = [f.name for f in functions if f.lineno <= call.lineno <= f.end_lineno]
            found[module, call.lineno] = f'{path.stem}.{inside[-1] if inside else ""}: {ast.get_source_segment(source, call)}'
    return found

@pytest.fixture(scope='module')
def said():
    "The lines that said error since it was last cleared; and those that are proven."
    lines, patch = SimpleNamespace(now=set(), proven=set()), pytest.MonkeyPatch()
    def watched(kind, module):
        def make(*args, **kwargs):
            made = kind(*args, **kwargs)
            if made.level == 'error': lines.now.add((module, sys._getframe(1).f_lineno))
            return made
        return make
    for name in {module for module, _ in _error_lines()}:
        module = import_module(f'qwen2vl_nb.{name}')
        for kind in ('Fault', 'Finding'):
            if hasattr(module, kind): patch.setattr(module, kind, watched(getattr(module, kind), name))
    yield lines
    patch.undo()

def _proves(said, beside=frozenset()):
    "Only one line said it, others aside: the proof is its own."
    if len(said.now - beside) == 1: said.proven |= said.now
    said.now.clear()

# --- rows

@pytest.fixture(scope='module')
def takes(tiny, tmp_path_factory):
    "What LLaMA-Factory makes of samples: the kept rows, or an exception. The model sees each of them."
    import torch
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_template_and_fix_tokenizer
    from llamafactory.data.loader import get_dataset
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer
    from transformers import Qwen2VLForConditionalGeneration
    model = Qwen2VLForConditionalGeneration.from_pretrained(tiny)
    def arguments(folder, cutoff_len=2048):
        return get_train_args(dict(model_name_or_path=str(tiny), stage='sft', do_train=True, dataset='rows', dataset_dir=str(folder), template='qwen2_vl', overwrite_cache=True,
            output_dir=str(folder/'out'), use_cpu=True, report_to='none', cache_dir=str(folder/'.cache'), cutoff_len=cutoff_len))[:3]
    loaded = load_tokenizer(arguments(tmp_path_factory.mktemp('none'))[0])
    template = get_template_and_fix_tokenizer(loaded['tokenizer'], arguments(tmp_path_factory.mktemp('none'))[1])
    collate = SFTDataCollatorWith4DAttentionMask(template=template, model=None, **loaded)
    def take(samples, entry, **changes):
        folder = tmp_path_factory.mktemp('rows')
        (folder/'rows.json').write_text(json.dumps(samples))
        (folder/'dataset_info.json').write_text(json.dumps({'rows': entry}))
        rows = list(get_dataset(template, *arguments(folder, **changes), 'sft', **loaded)['train_dataset'])
        with torch.no_grad():
            for row in rows: model(**collate([row]))
        return [SimpleNamespace(text=loaded['tokenizer'].decode(r['input_ids']), answer=loaded['tokenizer'].decode([i for i in r['labels'] if i >= 0]),
                                marks=sum(i in loaded['tokenizer'].all_special_ids for i in r['input_ids'])) for r in rows]
    return take

def _entry(samples):
    "The entry of the samples that are some."
    try: return sample_entry([s for s in samples if isinstance(s, dict)], 'rows.json')
    except (TypeError, AttributeError): return sample_entry([s for s in samples if isinstance(s, dict)][:1], 'rows.json')

def _numbered(paths): return [_question(i, images=[p], instruction=f'<image>What is number {i}?') for i, p in enumerate(paths)]

def _of(make):
    "A picture of the corpus between two sound ones."
    def rows(f):
        made, good = make(f), str(_save(f/'good.png'))
        return _numbered([good, str(made) if isinstance(made, os.PathLike) else made, good]), {}
    return rows

def _clips_of(make):
    def rows(f):
        made, good = make(f), str(_clip(f/'good.mp4'))
        clips = [good, str(made) if isinstance(made, os.PathLike) else made, good]
        return [_dialogue(i, ('user', f'<video>What is number {i}?'), ('assistant', 'A car.'), videos=[c]) for i, c in enumerate(clips)], {}
    return rows

def _corpus():
    "name → (what makes the samples, and how they are checked), of all that may have an error."
    for name, (make, *_) in PICTURES.items(): yield f'picture: {name}', _of(make)
    for name, (changes, *_) in QUESTIONS.items(): yield f'question: {name}', lambda f, c=changes: ([_question(0), _question(1, **c), _question(2)], {})
    for name, (bad, *_) in DIALOGUES.items():
        changes = bad if isinstance(bad, dict) else {'messages': _said(*bad)}
        yield f'dialogue: {name}', lambda f, c=changes: ([_dialogue(0), _dialogue(1) | c, _dialogue(2)], {})
    for name, (make, _) in ROWS.items(): yield f'row: {name}', make
    for name, (make, *_) in CLIPS.items(): yield f'clip: {name}', _clips_of(make)
    yield from MORE.items()

# What the corpus has only beside other errors
MORE = {
    'a tag in the answer, where the prompt has none': lambda f: ([_question(i, images=[str(_save(f/'a.png'))], output='It is <image>.') for i in range(2)], {}),
    'a clip that does not say its rate': _clips_of(lambda f: _clip(f/'a.asf', codec='mpeg4')),
    'a PostScript program': lambda f: (_numbered([str(_save(f/'a.eps', _noise(1)))]*2), {}),
    'a picture that may not be read': lambda f: (_numbered([str(_forbidden(f))]*2), {}),
}

def _forbidden(f):
    (f/'a.png').symlink_to(next(Path('/sys/bus').glob('*/uevent')))  # not even by root
    return f/'a.png'

# What LLaMA-Factory takes, and how it is seen that the row is spoilt: of (row, a sound row)
SPOILT = {
    '<|': lambda row, sound: row.marks > sound.marks, # text becomes the template's own marks
    'The history is': lambda row, sound: 'What? A car.' not in row.text,
    'has <image> in it': lambda row, sound: '<|image_pad|>' in row.answer,
}

def _is_unwritable(sample):
    "No file of JSON, or none in UTF-8, can hold it."
    try: json.dumps(sample, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError): return True

def _media_of_all(samples): return [p for s in samples if isinstance(s, dict) for key in ('images', 'videos') for p in (s.get(key) if isinstance(s.get(key), list) else [])]

def _is_pipe(path): return isinstance(path, str) and os.path.exists(path) and stat.S_ISFIFO(os.stat(path).st_mode)

@contextmanager
def _alarm(seconds):
    "An exception for who reads a pipe into which nobody writes; 0: none."
    def ring(*_): raise TimeoutError('Nobody writes into the pipe.')
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)

def _is_proven(samples, how, errors, takes):
    if any(_is_unwritable(s) for s in samples): return True
    try:
        with _alarm(20 if any(map(_is_pipe, _media_of_all(samples))) else 0): kept = takes(samples, _entry(samples), cutoff_len=how.get('cutoff_len', 2048))
    except Exception: return True
    if len(kept) < len(samples): return True
    return any(words in what and spoilt(kept[row], kept[row - 1]) for row, what in zip(errors.row, errors.what) for words, spoilt in SPOILT.items())

@pytest.mark.parametrize('all_of_them', [False, pytest.param(True, marks=pytest.mark.soak)])
def test_rows_with_an_error_are_stopped_at_dropped_or_spoilt(all_of_them, takes, said, tiny, tmp_path):
    "The first of the corpus for each line that says error; in `make soak` all."
    false, proven = [], 0
    for i, (name, make) in enumerate(_corpus()):
        (folder := tmp_path/str(i)).mkdir()
        samples, how = make(folder)
        said.now.clear()
        found = check_samples(samples, **dict(model=tiny) | how)
        errors = found[found.level == 'error']
        if not len(errors) or said.now <= said.proven and not all_of_them: continue
        if _is_proven(samples, how, errors, takes): proven, _ = proven + 1, _proves(said)
        else: false.append((name, list(errors.what)))
    assert not false and proven > (100 if all_of_them else 20), false

def test_a_clip_that_does_not_say_its_length(plugin, said):
    "No encoder here writes one, so both are shown its header alone."
    stream = SimpleNamespace(average_rate=8, frames=9, duration=None, time_base=1)
    said.now.clear()
    assert media._header_fault(stream).level == 'error'
    with pytest.raises(TypeError): plugin._get_video_sample_indices(stream)
    _proves(said)

def test_sound_rows_pass(takes, tiny, tmp_path):
    "The judge itself is no false alarm."
    samples = _numbered([str(_save(tmp_path/'a.png', _noise(i))) for i in range(3)])
    assert not _is_proven(samples, {}, check_samples(samples, model=tiny), takes)

def _is_spoilt(row, sample, tokenizer):
    "Whether a row of a ranking has an answer in the user's marks, or one that was marked as good counts as bad."
    if 'kto_tags' in row: return row['kto_tags'] != sample['kto_tag']
    answers = [tokenizer.decode([i for i in row[f'{k}_labels'] if i >= 0]) for k in ('chosen', 'rejected')]
    return any(answer.startswith('<|im_start|>user') for answer in answers)

@pytest.mark.parametrize('name', [name for name, (*_, level) in test_preferences.BAD_ROWS.items() if level == 'error'])
def test_preferences_with_an_error_are_stopped_at_dropped_or_spoilt(name, factory, said, tmp_path):
    stage, row, *_ = test_preferences.BAD_ROWS[name]
    samples = test_preferences.between(row, stage)
    said.now.clear()
    assert 'error' in set(check_samples(samples).level)
    (tmp_path/'rows.json').write_text(json.dumps(samples))
    (tmp_path/'dataset_info.json').write_text(json.dumps({'rows': sample_entry([samples[0]], 'rows.json')}))
    try: kept, tokenizer = factory.encode(tmp_path, 'rows', stage)
    except Exception: kept = []
    assert len(kept) < len(samples) or _is_spoilt(kept[1], row, tokenizer)
    _proves(said, set(said.proven))

# --- recipes

class Room:
    "A folder with a model and data that may be spoilt."
    def __init__(self, folder, tiny, data): self.folder, self.tiny, self.data = folder, tiny, data

    def model(self, without=(), **config):
        "A copy of the model without some of its files, and with changes of its config."
        model = Path(shutil.copytree(self.tiny, self.folder/'model'))
        for name in without: (model/name).unlink()
        if config: (model/'config.json').write_text(json.dumps(json.loads((model/'config.json').read_text()) | config))
        return {'model_name_or_path': str(model)}

    def processor(self, **changes):
        "A copy of the model with changes of its processor."
        given = self.model()
        file = self.folder/'model'/'preprocessor_config.json'
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return given

    def cut(self, name):
        "A copy of the model with a file that is cut off."
        changes = self.model()
        file = self.folder/'model'/name
        file.write_bytes(file.read_bytes()[:-1000])
        return changes

    def rows(self, rows, entry=None):
        "A data set: what a recipe says of it. Text is written as it is."
        if rows is not None: (self.folder/'rows.json').write_text(rows if isinstance(rows, str) else json.dumps(rows))
        entry = entry or {'file_name': 'rows.json', 'columns': {'prompt': 'instruction', 'response': 'output', 'images': 'images'}}
        (self.folder/'dataset_info.json').write_text(json.dumps({'rows': entry}))
        return {'dataset': 'rows', 'dataset_dir': str(self.folder)}

    def preferences(self, columns):
        rows = [{'instruction': f'What is number {i}?', 'chosen': 'A car.', 'rejected': 'A bus.', 'good': i % 2 == 0} for i in range(4)]
        entry = {'file_name': 'rows.json', 'columns': {'prompt': 'instruction'} | columns} | ({'ranking': True} if 'rejected' in columns else {})
        return self.rows(rows, entry)

    def adapter(self):
        for name in ('adapter_config.json', 'adapter_model.safetensors'): self.write(name, '{}')
        return {'adapter_name_or_path': str(self.folder)}

    def write(self, name, text):
        (self.folder/name).write_text(text)
        return str(self.folder/name)

    def finished(self):
        "A folder in which a training has ended, and its checkpoints were taken away."
        shutil.copytree(self.tiny, self.folder/'out')
        self.write('out/train_results.json', '{}')
        return {'output_dir': str(self.folder/'out')}

def _picture(path): return {'images': [str(path)], 'instruction': '<image>What?', 'output': 'A car.'}

RECIPES = { # name → the changes of a recipe that runs
    'no model': lambda r: {'model_name_or_path': '/nowhere/model_7b'},
    **{f'no reference model for {stage}': lambda r, stage=stage, entry=entry: r.preferences(entry) | {'stage': stage, 'ref_model': '/nowhere/model_7b'}
       for stage, entry in {'dpo': {'chosen': 'chosen', 'rejected': 'rejected'}, 'kto': {'response': 'chosen', 'kto_tag': 'good'}}.items()},
    'a model without its config': lambda r: r.model(['config.json']),
    'a model without its weights': lambda r: r.model(['model.safetensors']),
    'a model without its processor': lambda r: r.model(['preprocessor_config.json']),
    'a model without a tokenizer': lambda r: r.model(['tokenizer.json', 'vocab.json', 'merges.txt']),
    'a model whose config is cut off': lambda r: r.cut('config.json'),
    'weights that are cut off': lambda r: r.cut('model.safetensors'),
    'a processor under its first name': lambda r: r.processor(image_processor_type='Qwen2_5_VLImageProcessor'),
    'pixel limits that are text': lambda r: r.processor(min_pixels='3136', max_pixels='12845056'),
    'limits in size that are text': lambda r: r.processor(min_pixels=None, max_pixels=None, size={'shortest_edge': '3136', 'longest_edge': '12845056'}),
    'a patch_size that is text': lambda r: r.processor(patch_size='14'),
    'all parts frozen': lambda r: {'freeze_language_model': True},
    'all parts frozen, fully fine-tuned': lambda r: {'freeze_language_model': True, 'finetuning_type': 'full'},
    'a model of another kind': lambda r: r.model(model_type='llama'),
    'a model that this transformers does not know': lambda r: r.model(model_type='qwen9_vl'),
    **{f'the template {name}': lambda r, name=name: {'template': name} for name in other_templates},
    **{f'pictures under the template {name}': lambda r, name=name: {'template': name} for name in (None, *text_templates)},
    'a template that is misspelt': lambda r: {'template': 'qwen2_v'},
    'an argument that is misspelt': lambda r: {'learning_rat': 1e-4},
    'no adapter': lambda r: {'adapter_name_or_path': str(r.folder/'adapter')},
    'an adapter for full fine-tuning': lambda r: r.adapter() | {'finetuning_type': 'full'},
    'a ZeRO config that is not there': lambda r: {'deepspeed': 'ds_z9.json', 'use_cpu': None},
    'a ZeRO config that is no JSON': lambda r: {'deepspeed': r.write('ds.json', '{'), 'use_cpu': None},
    'a learning rate below 0': lambda r: {'learning_rate': -1},
    'a data set that is not registered': lambda r: {'dataset': 'car_itme'},
    'no registry': lambda r: {'dataset_dir': str(r.folder)},
    'a registry that is cut off': lambda r: {'dataset_dir': str(Path(r.write('dataset_info.json', '{"car_item": {')).parent)},
    'an entry that is no object': lambda r: r.rows([_question()], [1]),
    'a data set without its file': lambda r: r.rows(None),
    'a data set that is cut off': lambda r: r.rows('[{"instruction": "What?", "outp'),
    'a row with a tag and no picture': lambda r: r.rows([_question(), _question(1, instruction='<image>What?')]),
    'a picture that is missing': lambda r: r.rows([_picture(_save(r.folder/'a.png')), _picture(r.folder/'gone.png')]),
    'a cutoff_len inside a picture': lambda r: {'cutoff_len': 10},
    'adapters in a list': lambda r: {'adapter_name_or_path': [str(r.folder/'a'), str(r.folder/'b')]},
    'packing to a length that is not a multiple of 8': lambda r: {'neat_packing': True, 'cutoff_len': 2044},
    'packing text': lambda r: r.rows([_question(i) for i in range(4)]) | {'neat_packing': True},
    'a finished run': lambda r: r.finished(),
}

RUN_ALL = '''
import json, os, sys
cases, answers = json.load(sys.stdin), os.fdopen(os.dup(1), 'w')
os.dup2(2, 1)  # what LLaMA-Factory prints is no answer
from llamafactory.train.tuner import run_exp
for name, recipe in cases.items():
    try: answer = run_exp(recipe)
    except Exception as e: answer = f'{type(e).__name__}: {e}'
    print(json.dumps([name, answer]), file=answers, flush=True)
'''

@pytest.fixture(scope='module')
def rooms(tiny, data, tmp_path_factory):
    "name → the recipe of each case, in folders of their own; and one that is sound."
    base = dict(model_name_or_path=str(tiny), stage='sft', do_train=True, finetuning_type='lora', dataset='car_item', dataset_dir=str(data), template='qwen2_vl',
                cutoff_len=2048, max_steps=1, max_samples=4, use_cpu=True, report_to='none', save_strategy='no')
    made = {}
    for name, change in ({'sound': lambda r: {}} | RECIPES).items():
        room = Room(tmp_path_factory.mktemp('room'), tiny, data)
        made[name] = {k: v for k, v in (base | {'output_dir': str(room.folder/'run')} | change(room)).items() if v is not None}
    return made

@pytest.fixture(scope='module')
def answers(rooms, tmp_path_factory):
    "name → what LLaMA-Factory dies of, all tried in one child; `None` where it trains."
    home = tmp_path_factory.mktemp('child')
    with open(home/'log', 'w') as log:
        done = subprocess.run([sys.executable, '-c', RUN_ALL], input=json.dumps(rooms), stdout=subprocess.PIPE, stderr=log, text=True, cwd=home, timeout=PATIENCE,
                              env=os.environ | {'HF_HOME': str(home/'hf'), 'OMP_NUM_THREADS': '1'})
    answers = dict(map(json.loads, done.stdout.splitlines()))
    assert answers.keys() == rooms.keys(), (home/'log').read_text()[-3000:]
    return answers

def _said_of(recipe): return [f for f in recipe_findings(recipe) + data_findings(recipe) if f.level == 'error']

@pytest.mark.parametrize('name', RECIPES)
def test_recipes_with_an_error_end_in_llamafactory(name, rooms, answers, said):
    said.now.clear()
    assert _said_of(rooms[name]), 'the package finds nothing'
    assert answers[name] and 'torchrun' not in answers[name], 'LLaMA-Factory runs it'
    _proves(said, set(said.proven))

@pytest.mark.parametrize('sharded', [False, True])
def test_weights_in_the_older_format_are_no_error(sharded, tiny, tmp_path):
    "LLaMA-Factory loads pytorch_model.bin, too."
    import torch
    from llamafactory.hparams import FinetuningArguments, ModelArguments
    from llamafactory.model import load_model, load_tokenizer
    from safetensors.torch import load_file
    model = shutil.copytree(tiny, tmp_path/'model')
    weights, file = load_file(model/'model.safetensors'), model/('pytorch_model-00001-of-00001.bin' if sharded else 'pytorch_model.bin')
    (model/'model.safetensors').unlink()
    torch.save(weights, file)
    if sharded: (model/'pytorch_model.bin.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': dict.fromkeys(weights, file.name)}))
    assert not model_findings(model)
    arguments = ModelArguments(model_name_or_path=str(model))
    loaded = load_model(load_tokenizer(arguments)['tokenizer'], arguments, FinetuningArguments(), False)
    assert loaded.get_input_embeddings().weight.isfinite().all()
    file.write_bytes(file.read_bytes()[:-1000])
    assert [f.what for f in model_findings(model)] == ['These weights are cut off or damaged.']

def test_the_sound_recipe_runs(rooms, answers, tmp_path): assert answers['sound'] is None and not _said_of(rooms['sound'] | {'output_dir': str(tmp_path)})

def _talk(rng, picture):
    "A dialogue of one to three turns of any length, with a picture somewhere."
    words = lambda: 'A car. '*rng.choice([1, 5, 20, 60])
    asked = [words() for _ in range(rng.choice([1, 1, 2, 3]))]
    at = rng.randrange(len(asked))
    asked[at] = rng.choice(['<image>' + asked[at], asked[at] + '<image>'])
    return {'messages': [turn for text in asked for turn in ({'role': 'user', 'content': text}, {'role': 'assistant', 'content': words()})], 'images': [str(picture)]}

def test_llamafactory_stops_at_rows_of_which_cutoff_len_cuts_a_picture_and_at_no_others(takes, tiny, tmp_path):
    rng, picture, found = random.Random(7), _save(tmp_path/'a.png'), []
    for _ in range(24):
        row = _talk(rng, picture)
        cut = bool(cut_samples([row], tiny, 128))
        try: takes([row], _entry([row]), cutoff_len=128)
        except ValueError as e: found.append((cut, 'Image features and image tokens do not match' in str(e)))
        else: found.append((cut, False))
    assert set(found) == {(True, True), (False, False)}, found

# --- ranks that wait for each other

def test_ranks_that_call_the_vision_tower_a_different_number_of_times_end(tiny, tmp_path, said):
    """Under ZeRO-3, one rank has a picture in each micro batch, the other a picture and a clip. On GPUs they would wait for each other; gloo sees that one rank sends the
    weights of another layer than the other expects, and ends the process. A rank that waits is at a step from which it gets no further: none is ever done."""
    write_rows(tmp_path/'data', 'pb'*8)
    recipe = train_recipe(tiny, 'rows', tmp_path/'run', dataset_dir=str(tmp_path/'data'), deepspeed=zero_config('z3'), max_steps=8, logging_steps=1, disable_shuffling=True,
                          bf16=None, gradient_accumulation_steps=1, preprocessing_num_workers=None, plot_loss=None, save_strategy='no')
    said.now.clear()
    assert [f.where for f in data_findings(recipe, 2)] == ['deepspeed']
    run = launch(recipe, nproc=2, force=True)
    with pytest.raises(RuntimeError, match='SIGABRT'): run.wait()
    assert run.status == 'failed' and run.progress.step == 0
    assert 'op.preamble.length <= op.nbytes' in run.log(0) + run.log(1)
    _proves(said, {line for line in said.now if line[0] in AFTERWARDS})

def test_ranks_that_do_so_in_an_evaluation_end(tiny, tmp_path, said):
    "The training has only pictures, and its steps up to the first evaluation are done."
    for name, kinds in (('rows', 'p'*8), ('checked', 'pb')): write_rows(tmp_path/'data', kinds, name)
    recipe = train_recipe(tiny, 'rows', tmp_path/'run', dataset_dir=str(tmp_path/'data'), deepspeed=zero_config('z3'), max_steps=8, logging_steps=1, bf16=None,
                          gradient_accumulation_steps=1, preprocessing_num_workers=None, plot_loss=None, save_strategy='no', eval_dataset='checked', eval_strategy='steps',
                          eval_steps=3, per_device_eval_batch_size=1)
    assert [(f.where, 'evaluation' in f.what) for f in data_findings(recipe, 2) if f.level == 'error'] == [('deepspeed', True)]
    run = launch(recipe, nproc=2, force=True)
    with pytest.raises(RuntimeError, match='SIGABRT'): run.wait()
    assert run.status == 'failed' and run.progress.step in (2, 3), 'the step before the evaluation may not be written down yet'
    assert 'op.preamble.length <= op.nbytes' in run.log(0) + run.log(1)

# --- all of them

ELSEWHERE = { # function, or more of the line → the test in which it is proven, or why it is not
    'checks.ask_llamafactory': 'these are the words of LLaMA-Factory and DeepSpeed themselves',
    "recipe_faults._output_findings: Finding('output_dir', 'There is no": 'a run is a folder: without one there is nothing that could be started',
    "faults.file_fault: Fault(f'The path is {path!r}, not text": 'check_samples says it before, in words of its own that are proven',
    "recipe_faults._config_findings: Finding('deepspeed'": 'test_failures.py::zero3_generates',
    "checks._template_findings: Finding(name, f'Under the template": 'test_family.py::test_templates_of_other_families',
    "checks._clip_findings: Finding(name, f'{len(lost)}": 'test_family.py::test_clips_that_llamafactory_cannot_place',
    'model_faults.quantized_findings': 'test_errors_proven.py::test_llamafactory_refuses_to_do_this_with_quantized_weights',
    'model_faults.head_findings': 'test_newest.py::test_tied_embeddings_as_transformers_4_writes_them_are_random',
    'check._refused_faults': 'test_family.py::test_clips_that_are_too_small',
    "recipe_faults._config_findings: Finding('use_cpu'": 'test_failures.py::use_cpu_with_zero3',
    "model_faults.hub_findings: Finding('model_name_or_path', f'There is no folder": 'test_hub.py::test_a_hub_that_cannot_be_reached_is_said_before_the_start',
    "model_faults.hub_findings: Finding('model_name_or_path', f'{address} does not provide": 'test_hub.py::test_a_name_that_the_hub_does_not_have_is_said_before_the_start',
    'start.failure': 'it is said of a run that has ended',
    'checks.half_findings': 'test_failures.py::bf16_on_the_cpu',
    'command.port_findings': 'test_failures.py::port_taken',
    'checks.disk_findings': 'test_failures.py::disk_full',
    'checks.memory_findings': 'test_memory.py::test_real_runs',
    'registry.entry_faults': 'test_registry.py::test_what_is_called_an_error_stops_the_loader_too',
    'registry._row_faults': 'test_registry.py::test_check_says_what_the_loader_says',
    'registry._check_row': 'test_registry.py::test_a_byte_order_mark_is_told_and_goes_with_the_next_write',
    'learning_rates.rate_findings': 'test_learning_rates.py::test_a_rank_refuses_what_was_forced',
    'stack._missing_findings': 'test_failures.py::no_llamafactory',
    'stack._pair_findings': 'test_failures.py::torch_2_9',
    'stack._built_for_findings': 'it takes other files than those that are installed: operator torchvision::nms does not exist',
    'stack.machine_findings': 'none of its rules says error',
}

# What is said when a run has failed, or before a prediction; it refuses no training
AFTERWARDS = 'run.failure', 'prediction.engines'

@pytest.mark.parametrize('given', [dict(quant_method='awq', bits=4), dict(quant_method='gptq', bits=4), dict(quant_method='bitsandbytes', load_in_4bit=True)], ids=lambda given: given['quant_method'])
def test_llamafactory_refuses_to_do_this_with_quantized_weights(given, tiny, tmp_path):
    "Its own functions are asked: the weights can be read only on a GPU, with other packages."
    from llamafactory.hparams import FinetuningArguments, ModelArguments
    from llamafactory.model.adapter import init_adapter
    from llamafactory.model.model_utils.quantization import configure_quantization
    from transformers import AutoModelForImageTextToText, PretrainedConfig
    from transformers.integrations import HfDeepSpeedConfig
    recipe = train_recipe(Room(tmp_path, tiny, None).model(quantization_config=given)['model_name_or_path'], 'cars', tmp_path/'run')
    found = lambda **changes: [f.where for f in recipe_findings(recipe | changes) if 'quantized already' in f.what]
    arguments, config = ModelArguments(model_name_or_path=str(tiny)), PretrainedConfig(quantization_config=given)
    def refuses(zero):
        try:
            with nullcontext(HfDeepSpeedConfig(zero_config(zero))): configure_quantization(config, None, arguments, True, {})  # transformers knows of it as long as it is kept
        except ValueError as e: return 'incompatible with PTQ-quantized' in str(e)
        except ImportError: return False  # that comes later
    assert [(found(deepspeed=zero_config(zero)) == ['deepspeed'], refuses(zero)) for zero in ('z2', 'z3')] == [(False, False if given['quant_method'] != 'bitsandbytes' else None), (True, True)]
    model = AutoModelForImageTextToText.from_pretrained(tiny)
    model.quantization_method = given['quant_method']
    for kind, refused in ('full', True), ('freeze', True), ('lora', False):
        assert found(finetuning_type=kind) == ['finetuning_type']*refused
        try: init_adapter(model.config, model, arguments, FinetuningArguments(finetuning_type=kind), True)
        except ValueError as e: assert refused and 'Quantized models can only be used' in str(e)
        else: assert not refused

@pytest.mark.parametrize('given, package', [(dict(quant_method='awq', bits=4), 'autoawq'), (dict(quant_method='gptq', bits=4), 'gptqmodel'), (dict(load_in_4bit=True), 'bitsandbytes')], ids=['awq', 'gptq', 'bitsandbytes'])
def test_packages_that_quantized_weights_need_are_missing_before_the_start(given, package, tiny, tmp_path):
    model = Room(tmp_path, tiny, None).model(quantization_config=given)['model_name_or_path']
    recipe = train_recipe(model, 'cars', tmp_path/'run', bf16=None)
    (found,) = [f for f in late_findings(recipe) if f.where == 'model_name_or_path']
    assert found.level == 'error' and package in found.what and 'use another model' in found.cure
    assert not [f for f in late_findings(recipe | {'model_name_or_path': str(tiny)})]

def test_what_is_proven_elsewhere_is_there():
    for about in ELSEWHERE.values():
        file, _, name = about.partition('.py::')
        assert not name or re.search(rf'^def {name}\b', (Path(__file__).parent/f'{file}.py').read_text(encoding='utf-8'), re.M), about

def test_every_error_is_proven(said):
    "After all of the above; a new finding that says error needs a case of its own, or a weaker word."
    unproven = [words for line, words in _error_lines().items() if line not in said.proven and line[0] not in AFTERWARDS and not words.startswith((*ELSEWHERE,))]
    assert not unproven, '\n'.join(['Is there a case in which LLaMA-Factory really fails? Else make it a warning:', *unproven])
