"Each model family against what LLaMA-Factory and the real classes make of it."
import importlib.metadata, json, random, shutil
from pathlib import Path

import pytest
from packaging.version import Version
from PIL import Image
from safetensors import safe_open
from transformers import AutoTokenizer

from conftest import until, write_clip
from qwen2vl_nb.all import attach, check_recipe, export, launch, predict, predict_recipe, read_log, score, train_recipe, zero_config, zero_table
from qwen2vl_nb.checks import ask_llamafactory, data_findings, quick_findings
from qwen2vl_nb.model_faults import model_findings
from qwen2vl_nb.data.check import check_samples
from qwen2vl_nb.data.registry import Registry, dataset_samples
from qwen2vl_nb.data.tokens import count_tokens, cut_samples
from qwen2vl_nb.memory.estimate import NotPredicted, predict_memory
from qwen2vl_nb.model import families, family_class, image_tokens, model_config, processor_config, processor_limits, tower_size, usual_template, video_tokens
from qwen2vl_nb.prediction.hf import token_budget
from qwen2vl_nb.tiny import tiny_model

@pytest.fixture(scope='session', params=['qwen2_5_vl', 'qwen3_vl'])
def family(request): return request.param

@pytest.fixture(scope='session')
def small(family, tmp_path_factory): return tiny_model(tmp_path_factory.mktemp('models')/family, family=family)

@pytest.fixture(scope='session')
def parts(small):
    "(LLaMA-Factory's plugin, the processor) of a family."
    from llamafactory.data.mm_plugin import get_mm_plugin
    from transformers import AutoProcessor
    name = usual_template(small).removesuffix('_nothink')
    return get_mm_plugin(name, image_token='<|image_pad|>', video_token='<|video_pad|>'), AutoProcessor.from_pretrained(small)

def _side(rng): return int(10**rng.uniform(0, 3.6))

def test_the_limits_are_those_of_the_published_processors(small, family, parts):
    real = parts[1].image_processor
    assert (real.patch_size*real.merge_size, real.size['shortest_edge'], real.size['longest_edge']) == (2*families[family].patch, *families[family].picture)

def test_a_folder_as_transformers_5_writes_it_is_a_model(small, tmp_path):
    "All processors in one file: it is loaded, nothing is missing, and the limits are those of the processors."
    from transformers import AutoProcessor
    folder = shutil.copytree(small, tmp_path/'model', ignore=shutil.ignore_patterns('*processor_config.json'))
    assert [Path(f.where).name for f in model_findings(folder)] == ['preprocessor_config.json']
    nested = dict(image_processor=processor_config(small), video_processor=processor_config(small, video=True))
    nested['image_processor']['size'] = dict(shortest_edge=5000, longest_edge=90_000)
    nested['video_processor']['size'] = dict(shortest_edge=6000, longest_edge=80_000)
    for part in nested.values(): part.pop('min_pixels', None), part.pop('max_pixels', None)
    (folder/'processor_config.json').write_text(json.dumps(nested | {'processor_class': type(AutoProcessor.from_pretrained(small)).__name__}))
    real = AutoProcessor.from_pretrained(folder)
    assert not model_findings(folder)
    for part, video in (real.image_processor, False), (real.video_processor, True):
        limits = processor_limits(folder, video)
        assert (limits['min_pixels'], limits['max_pixels']) == (part.size['shortest_edge'], part.size['longest_edge'])

FORMS = { # of the limits in the files of a processor: file → what it contains beside the rest; sizes are (least, most)
    'as the first folders': {'preprocessor': dict(min_pixels=5000, max_pixels=90_000)},
    'old names in size': {'preprocessor': dict(min_pixels=5000, max_pixels=90_000, size=dict(min_pixels=1, max_pixels=2))},
    'size alone': {'preprocessor': dict(size=dict(shortest_edge=5000, longest_edge=90_000))},
    'both': {'preprocessor': dict(min_pixels=5000, max_pixels=90_000, size=dict(shortest_edge=1, longest_edge=2))},
    'empty limits': {'preprocessor': dict(min_pixels=None, max_pixels=None, size=dict(shortest_edge=5000, longest_edge=90_000))},
    'clips, size alone': {'preprocessor': {}, 'video_preprocessor': dict(size=dict(shortest_edge=6000, longest_edge=80_000))},
    'clips, both': {'preprocessor': {}, 'video_preprocessor': dict(min_pixels=7000, max_pixels=70_000, size=dict(shortest_edge=6000, longest_edge=80_000))},
    'both layouts': {'preprocessor': dict(size=dict(shortest_edge=5000, longest_edge=90_000)), 'nested image': dict(size=dict(shortest_edge=5001, longest_edge=90_001)),
                     'nested video': dict(size=dict(shortest_edge=6001, longest_edge=80_001))},
    'both layouts, all': {'preprocessor': dict(size=dict(shortest_edge=5000, longest_edge=90_000)), 'video_preprocessor': dict(size=dict(shortest_edge=6000, longest_edge=80_000)),
                          'nested image': dict(size=dict(shortest_edge=5001, longest_edge=90_001)), 'nested video': dict(size=dict(shortest_edge=6001, longest_edge=80_001))},
}

@pytest.mark.parametrize('form', FORMS)
def test_limits_in_the_forms_of_published_folders(form, small, tmp_path):
    "Also where a folder has the files of transformers 4 and 5, and they disagree."
    from transformers import AutoProcessor
    folder = shutil.copytree(small, tmp_path/'model', ignore=shutil.ignore_patterns('*processor_config.json'))
    usual = {video: {k: v for k, v in processor_config(small, video).items() if k not in ('min_pixels', 'max_pixels', 'size')} for video in (False, True)}
    given = {name: usual['video' in name] | dict(size=dict(shortest_edge=4000, longest_edge=100_000)) | limits for name, limits in FORMS[form].items()}
    nested = {f'{name[7:]}_processor': given.pop(name) for name in [*given] if name.startswith('nested')}
    for name, values in given.items(): (folder/f'{name}_config.json').write_text(json.dumps(values))
    if nested: (folder/'processor_config.json').write_text(json.dumps(nested | {'processor_class': type(AutoProcessor.from_pretrained(small)).__name__}))
    real = AutoProcessor.from_pretrained(folder, use_fast=True)
    for part, video in (real.image_processor, False), (real.video_processor, True):
        limits = processor_limits(folder, video)
        assert (limits['min_pixels'], limits['max_pixels']) == (part.size['shortest_edge'], part.size['longest_edge']), video

# As transformers 4.44 to 4.51 saved them: what is the default of the config class is left out
TOWERS = {'qwen2_vl': {'in_chans': 3, 'model_type': 'qwen2_vl', 'spatial_patch_size': 14}, 'qwen2_5_vl': {'hidden_size': 1280, 'in_chans': 3, 'model_type': 'qwen2_5_vl', 'tokens_per_second': 2},
          'qwen3_vl': {'model_type': 'qwen3_vl', 'out_hidden_size': 4096}}

@pytest.mark.parametrize('kind', TOWERS)
def test_configs_that_leave_out_defaults(kind, tmp_path):
    config = model_config({'qwen2_vl': 'Qwen2-VL-7B', 'qwen2_5_vl': 'Qwen2.5-VL-7B', 'qwen3_vl': 'Qwen3-VL-8B'}[kind])
    (tmp_path/'config.json').write_text(json.dumps(config | {'vision_config': TOWERS[kind]}))
    real = family_class(kind, 'Config').from_pretrained(tmp_path).vision_config
    short = model_config(tmp_path)
    assert tower_size(short) == tower_size(config) == getattr(real, 'embed_dim', real.hidden_size)
    assert token_budget(short, 0, 80*2**30) == token_budget(config, 0, 80*2**30)

def test_a_processor_that_does_not_resize(tiny, tmp_path):
    "It is a warning: pictures with sides that are multiples of a token's are taken as they are."
    from transformers import AutoImageProcessor
    model = shutil.copytree(tiny, tmp_path/'model')
    (model/'preprocessor_config.json').write_text(json.dumps(processor_config(tiny) | {'do_resize': False}))
    assert [(f.level, 'do_resize is off' in f.what) for f in model_findings(model)] == [('warning', True)]
    real = AutoImageProcessor.from_pretrained(model)
    assert real(images=[Image.new('RGB', (112, 84))], return_tensors='pt')['image_grid_thw'].tolist() == [[1, 6, 8]]
    with pytest.raises(RuntimeError, match='is invalid for input of size'): real(images=[Image.new('RGB', (301, 203))], return_tensors='pt')

def test_a_processor_under_its_first_name(tmp_path):
    "The first published folders of Qwen2.5-VL; and any other processor that cannot be loaded."
    from llamafactory.hparams import ModelArguments
    from llamafactory.model import load_tokenizer
    model = tiny_model(tmp_path/'model', family='qwen2_5_vl')
    file, recipe = model/'preprocessor_config.json', train_recipe(model, 'cars', tmp_path/'run')
    was = processor_config(model)
    (model/'processor_config.json').unlink(missing_ok=True)  # transformers 5 has written both processors there
    file.write_text(json.dumps(was))
    asked = lambda: [f for f in ask_llamafactory(recipe | dict(bf16=None)) if f.where == 'model_name_or_path']
    assert not model_findings(model) and not asked()
    for changes, words in (dict(image_processor_type='Qwen2_5_VLImageProcessor'), 'Unrecognized image processor'), (dict(size=dict(shortest_edge=336), min_pixels=None, max_pixels=None), 'longest_edge'):
        file.write_text(json.dumps(was | changes))
        assert ['has renamed' in f.what for f in model_findings(model)] == [True]*('image_processor_type' in changes)
        with pytest.raises(ValueError, match=words): load_tokenizer(ModelArguments(model_name_or_path=str(model)))
        assert ['cannot load the tokenizer or the processor' in f.what and words in f.what for f in asked()] == [True]

def test_image_tokens_are_those_of_the_trainer(small, parts):
    "2,000 random sizes and limits through LLaMA-Factory's steps and the real resize; every tenth through all of the processor."
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
    rng, plugin, real = random.Random(0), parts[0], parts[1].image_processor
    unit = real.patch_size*real.merge_size
    for i in range(2000):
        size, limits = (_side(rng), _side(rng)), dict(image_max_pixels=int(10**rng.uniform(4, 6.5)), image_min_pixels=int(10**rng.uniform(2, 4)))
        image = plugin._preprocess_image(Image.new('L', size), **limits)
        height, width = smart_resize(image.height, image.width, unit, real.size['shortest_edge'], real.size['longest_edge'])
        assert image_tokens(*size, **limits, model=small) == height*width//unit**2, (size, limits)
        if i % 10 == 0 and height*width < 400_000:
            grid = real(images=[plugin._preprocess_image(Image.new('RGB', size), **limits)], return_tensors='pt')['image_grid_thw'][0]
            assert int(grid.prod())//4 == height*width//unit**2, (size, limits)

@pytest.fixture(scope='session')
def clips(tmp_path_factory):
    "Thirty real clips of random sizes, lengths and rates, with limits on each."
    rng, folder, made = random.Random(0), tmp_path_factory.mktemp('clips'), []
    for i in range(30):
        frames, size = rng.randint(4, 60), (2*rng.randint(16, 200), 2*rng.randint(16, 200))
        write_clip(folder/f'{i}.mp4', frames, rng.choice([5, 8, 24, 30]), size)
        limits = dict(video_fps=rng.choice([.5, 1., 2., 4.]), video_maxlen=rng.choice([2, 4, 7, 128]), video_max_pixels=rng.choice([256*256, 20_000]), video_min_pixels=rng.choice([16*16, 10_000]))
        made.append((str(folder/f'{i}.mp4'), limits))
    return made

def test_video_tokens_are_those_of_the_trainer(small, parts, clips, monkeypatch):
    plugin, processor = parts
    for path, limits in clips:
        for key, value in limits.items(): monkeypatch.setattr(processor, key, value, raising=False)
        sample = {'videos': [path], 'instruction': '<video>What?', 'output': 'x'}
        promised = plugin._get_mm_token_metadata([], [path], [], processor)['video_grid_thw']
        given = plugin._get_mm_inputs([], [path], [], processor)['video_grid_thw']
        assert [int(count_tokens([sample], small, **limits).media[0])]*2 == [int(grid[0].prod())//4 for grid in (promised, given)], (path, limits)
        assert not len(check_samples([sample], model=small, **limits))

@pytest.mark.parametrize('name', ['flv', 'mkv', 'webm', 'avi', 'mpg', 'ts'])
def test_clips_whose_header_lacks_something(name, small, parts, tmp_path):
    "Some of these containers do not say how many frames a clip has, others not how long it is either: counted as LLaMA-Factory does, and an error where it stops."
    plugin, processor = parts
    codec, rate = {'webm': 'libvpx', 'mpg': 'mpeg2video', 'avi': 'mpeg4'}.get(name, 'libx264'), 25 if name == 'mpg' else 8
    for frames in (15, 40, 130):
        write_clip(path := tmp_path/f'{frames}.{name}', frames, rate, (64, 64), codec)
        sample = {'videos': [str(path)], 'instruction': '<video>What?', 'output': 'x'}
        given, expanded = plugin._get_mm_inputs([], [str(path)], [], processor), plugin._get_mm_token_metadata([], [str(path)], [], processor)
        given, expanded = (int(found['video_grid_thw'][0].prod())//4 for found in (given, expanded or given))
        found = check_samples([sample], model=small, cutoff_len=100_000)
        assert count_tokens([sample], small).media[0] == expanded and ('error' in set(found.level)) is (given != expanded), (frames, found)

def test_clips_that_are_too_small(small, family, parts, tmp_path):
    "After LLaMA-Factory's resize, a side has at least 28 pixels; the processor of Qwen3-VL needs 32."
    plugin, processor = parts
    for size in (2, 2), (28, 28), (30, 34), (400, 16), (16, 400), (2000, 38), (4000, 38):
        write_clip(path := tmp_path/'{}x{}.mp4'.format(*size), 4, 4, size)
        sample = {'videos': [str(path)], 'instruction': '<video>What?', 'output': 'x'}
        found = check_samples([sample], model=small)
        assert list(found.level) == ['error']*len(found), found
        if len(found):
            assert families[family].has_times and 'each direction' in found.what[0]
            with pytest.raises(ValueError, match='must be larger than factor'): plugin._get_mm_inputs([], [str(path)], [], processor)
        else: assert count_tokens([sample], small).media[0] == int(plugin._get_mm_inputs([], [str(path)], [], processor)['video_grid_thw'][0].prod())//4

def test_video_tokens_of_many_sizes(small, family, parts, tmp_path):
    "The arithmetic alone, on 2,000 sizes, lengths and limits: of a frame, or of all frames together."
    folder, rng, plugin = shutil.copytree(small, tmp_path/'model'), random.Random(1), parts[0]
    file, patch = folder/'video_preprocessor_config.json', families[family].patch
    least, most = (200_000, 1_000_000) if families[family].has_times else (10_000, 40_000)
    file.write_text(json.dumps(processor_config(folder, video=True) | dict(min_pixels=least, max_pixels=most, size=dict(shortest_edge=least, longest_edge=most))))
    scaled = 0
    for _ in range(2000):
        size, n = (_side(rng), _side(rng)), 2*rng.randint(1, 64)
        low, high = int(10**rng.uniform(2, 4)), int(10**rng.uniform(4, 6.5))
        w, h = plugin._get_qwen_video_size_after_regularization(*size, high, low)
        if min(w, h) < 2*patch:  # then Qwen3-VL's processor stops LLaMA-Factory
            for refused in (lambda: plugin._get_qwen_video_resize(n, h, w, patch, 2, 2, least, most), lambda: video_tokens(n, *size, high, low, folder)):
                with pytest.raises(ValueError): refused()
            continue
        height, width = plugin._get_qwen_video_resize(n, h, w, patch, 2, 2, least, most)
        scaled += abs(width - w) > patch
        assert video_tokens(n, *size, high, low, folder) == n//2*height*width//(2*patch)**2, (size, n, low, high)
    assert scaled > 100

TALK = ['Hello', ' what is\nthis? ', '一辆车 😀', 'a  b\t', '<b>', "don't"]
THOUGHTS = ['', '', '<think>\nIt is red.\n</think>\n\n']

@pytest.fixture(scope='session')
def talks(clips, data):
    "Forty dialogues with pictures and a clip, with thoughts and without."
    rng, picture = random.Random(0), str(data/'car_item'/'images'/'0001.png')
    words = lambda: ''.join(rng.choices(TALK, k=rng.randint(1, 4)))
    def talk():
        pictures, films = [picture]*rng.randint(0, 2), [clip for clip, _ in rng.sample(clips, rng.randint(0, 1))]
        turns = [('user', words() + '<video>'*len(films) + '<image>'*len(pictures) + words())] + [('assistant', rng.choice(THOUGHTS) + words()), ('user', words())]*rng.randint(0, 1)
        turns.append(('assistant', rng.choice(THOUGHTS) + words()))
        system = [('system', words())]*rng.randint(0, 1)
        return {'images': pictures, 'videos': films, 'messages': [{'role': role, 'content': text} for role, text in system + turns]}
    return [talk() for _ in range(40)]

def test_tokens_are_those_of_llamafactory(small, family, factory, talks, tmp_path):
    "Rows with pictures and a clip, every turn, under each template of the family, with thoughts and without."
    Registry(tmp_path).add('talks', talks)
    for template in families[family].templates:
        for thinks in (None, True, False):
            about = dict(template=template) | ({} if thinks is None else dict(enable_thinking=thinks))
            ids, _ = factory.prepare(tmp_path, 'talks', cutoff_len=8192, model_name_or_path=str(small), **about)
            counted = count_tokens(talks, small, **about)
            assert list(counted.total) == list(map(len, ids)), about

def test_what_is_cut_is_what_llamafactory_cuts(small, family, factory, talks, tmp_path):
    "The rows that are too long, and those of them in which a picture or clip is cut."
    Registry(tmp_path).add('talks', talks)
    template = usual_template(small)
    encode = lambda cutoff: [row['input_ids'] for row in factory.encode(tmp_path, 'talks', 'sft', cutoff_len=cutoff, model_name_or_path=str(small), template=template)[0]]
    pads = {AutoTokenizer.from_pretrained(small).convert_tokens_to_ids(f'<|{kind}_pad|>') for kind in ('image', 'video')}
    of_media, whole, total = lambda ids: sum(i in pads for i in ids), encode(8192), count_tokens(talks, small).total
    seen = set()
    for cutoff in sorted(map(len, whole))[2::6]:
        left = encode(cutoff)
        assert [n > cutoff for n in total] == [len(a) < len(b) for a, b in zip(left, whole, strict=True)]
        is_cut = [of_media(a) < of_media(b) for a, b in zip(left, whole)]
        assert cut_samples(talks, small, cutoff) == [i for i, cut in enumerate(is_cut) if cut], cutoff
        seen |= {(n > cutoff, cut) for n, cut in zip(total, is_cut)}
    assert seen == {(False, False), (True, False), (True, True)}

def test_templates_of_other_families(small, family, clips, data, tmp_path):
    "A template that is called an error stops LLaMA-Factory, or gives a clip's frames wrong positions; the others run."
    other = 'qwen2_vl' if families[family].has_times else 'qwen3_vl_nothink'
    rows = {'text': {'instruction': 'What?', 'output': 'A car.'},
            'picture': {'images': [str(data/'car_item'/'images'/'0001.png')], 'instruction': '<image>What?', 'output': 'A car.'}}
    for name, frames in ('short clip', 32), ('clip', 48):
        write_clip(tmp_path/f'{name}.mp4', frames, 16, (64, 64))
        rows[name] = {'videos': [str(tmp_path/f'{name}.mp4')], 'messages': [{'role': 'user', 'content': '<video>What?'}, {'role': 'assistant', 'content': 'A car.'}]}
    for name, row in rows.items(): Registry(tmp_path/'data').add(name, [row])
    recipe = lambda name, template: train_recipe(small, name, tmp_path/'run', dataset_dir=str(tmp_path/'data'), template=template)
    called = lambda *about: [f.level for f in data_findings(recipe(*about)) if 'template' in f.what]
    assert [called(name, 'qwen3') for name in rows] == [[], ['error'], ['error'], ['error']] == [called(name, 'default') for name in rows]
    assert [called(name, other) for name in rows] == [[], [], ['error'], ['error']] and not any(called(name, families[family].templates[0]) for name in rows)
    own, theirs, text = (spoilt_by(small, tmp_path/'data', rows, template) for template in (families[family].templates[0], other, 'qwen3'))
    assert own == {name: None for name in rows} and theirs['text'] is theirs['picture'] is text['text'] is None
    assert all('does not support' in text[name] for name in rows if name != 'text'), text
    is_newer = Version(importlib.metadata.version('transformers')) >= Version('5')  # it stops at any such clip, before positions are wrong
    lost = dict.fromkeys(['short clip', 'clip'], 'shape mismatch') if is_newer else {'short clip': 'wrong positions', 'clip': 'do not match'}
    expected = lost if families[family].has_times else dict.fromkeys(['short clip', 'clip'], '_calculate_timestamps')
    assert all(words in theirs[name] for name, words in expected.items()), theirs

def spoilt_by(model, folder, names, template):
    "What LLaMA-Factory's preprocessing, its collator or the model say of a row, by data set; `None` if the model can train on it."
    import torch
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_template_and_fix_tokenizer
    from llamafactory.data.loader import get_dataset
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer
    from transformers import AutoModelForImageTextToText
    real = AutoModelForImageTextToText.from_pretrained(model)
    def say(name):
        given = dict(model_name_or_path=str(model), stage='sft', do_train=True, dataset=name, dataset_dir=str(folder), template=template, overwrite_cache=True, use_cpu=True,
                     output_dir=str(folder/'out'), report_to='none', cache_dir=str(folder/f'.cache-{template}-{name}'))
        model_args, data_args, training_args = get_train_args(given)[:3]
        loaded = load_tokenizer(model_args)
        shaped = get_template_and_fix_tokenizer(loaded['tokenizer'], data_args)
        batch = SFTDataCollatorWith4DAttentionMask(template=shaped, model=real, **loaded)([get_dataset(shaped, model_args, data_args, training_args, 'sft', **loaded)['train_dataset'][0]])
        with torch.no_grad(): assert real(**batch).loss.isfinite()
        time, _, column = batch['position_ids'][-3:, 0, batch['input_ids'][0] == real.config.video_token_id]
        rows_of_four = column.reshape(-1, 2, 2) if len(column) else column  # 64×64 pixels are two by two tokens
        is_even = not len(column) or bool((rows_of_four[:, 0] == rows_of_four[:, 1]).all())
        return None if is_even else 'wrong positions'
    def tried(name):
        try: return say(name)
        except Exception as e: return f'{type(e).__name__}: {e}'
    return {name: tried(name) for name in names}

@pytest.mark.parametrize('is_usual', [True, pytest.param(False, marks=pytest.mark.soak)])
def test_from_a_start_to_scored_answers(is_usual, small, family, data, tmp_path):
    "Two ranks with z2 or z3, stopped and resumed; both engines give the same answers to all of the test set; the export has a chat template with pictures."
    zero = ('z3', 'z2')[(family == 'qwen2_5_vl') is is_usual]
    recipe = train_recipe(small, 'car_item', tmp_path/'run', dataset_dir=str(data), max_steps=24, logging_steps=1, learning_rate=1e-3, bf16=None, max_samples=64,
                          gradient_accumulation_steps=1, preprocessing_num_workers=None, deepspeed=zero_config(zero))
    assert recipe['template'] == families[family].templates[0]
    assert not (found := check_recipe(recipe, 2)).size, found
    run = launch(recipe, nproc=2)
    until(lambda: run.progress.step >= 4 or not run.is_running)
    assert run.stop().status == 'stopped' and attach(run).resume().wait().status == 'done'
    losses = read_log(run).loss.dropna()
    assert len(losses) == 24 and losses.iloc[-4:].mean() < .8*losses.iloc[:4].mean()
    asking = dict(adapter=run, dataset_dir=str(data), max_new_tokens=12, use_cpu=True, preprocessing_num_workers=None)
    answers = {engine: predict(predict_recipe(small, 'car_item_test', tmp_path/engine, **asking), engine=engine) for engine in ('hf', 'llamafactory')}
    own, theirs = ([row['predict'] for row in p] for p in answers.values())
    assert own == theirs and len(own) == len(dataset_samples(Registry(data), 'car_item_test')) and len(score(answers['hf']).overall)
    merged = export(run, tmp_path/'merged')
    exported = json.loads((merged/'config.json').read_text())
    assert exported['model_type'] == family and exported['tie_word_embeddings'] is True  # where transformers 5 looks for it
    assert '_pad|>' in (merged/'chat_template.jinja').read_text()

@pytest.mark.parametrize('kind', ['qwen3_vl_moe', 'qwen3_5', 'qwen3_5_moe'])
def test_families_whose_memory_is_not_predicted(kind, factory, data, tmp_path):
    "Data, training and prediction work; where transformers does not know the family, that is found before the start."
    knows = kind == 'qwen3_vl_moe' or Version(importlib.metadata.version('transformers')) >= Version('5')
    model = tiny_model(tmp_path/'model', family=kind if knows else 'qwen3_vl')
    if not knows: (model/'config.json').write_text(json.dumps(json.loads((model/'config.json').read_text()) | {'model_type': kind}))
    recipe = train_recipe(model, 'car_item', tmp_path/'run', dataset_dir=str(data), max_steps=6, logging_steps=1, learning_rate=1e-3, bf16=None, use_cpu=True, max_samples=8,
                          gradient_accumulation_steps=1, preprocessing_num_workers=None)
    with pytest.raises(NotPredicted, match=f'memory of {families[kind].name} is not predicted; that of Qwen2-VL, '): predict_memory(recipe)
    assert {row.fits for row in zero_table(recipe, gpus=2, gpu_gib=24)} == {'not predicted', 'not chosen'}
    found = [f.what for f in quick_findings(recipe) if f.level == 'error']
    assert found == ([] if knows else ['transformers 4 does not know Qwen3.5.'])
    run = launch(recipe, force=True)
    if not knows:
        with pytest.raises(RuntimeError, match='does not recognize this architecture'): run.wait()
        return
    run.wait()
    with safe_open(run.output_dir/'adapter_model.safetensors', 'np') as f: assert not [key for key in f.keys() if '.experts.' in key]
    assert [f.where for f in quick_findings(recipe) if 'experts' in f.what] == ['finetuning_type']*kind.endswith('_moe')
    losses = read_log(run).loss.dropna()
    assert len(losses) == 6 and losses.iloc[-2:].mean() < losses.iloc[:2].mean()
    ids, _ = factory.prepare(data, 'car_item', model_name_or_path=str(model), template=recipe['template'], max_samples=8, cache_dir=str(tmp_path/'cache'), output_dir=str(tmp_path/'out'))
    assert list(count_tokens(dataset_samples(Registry(data), 'car_item', 8), model).total) == list(map(len, ids))
    asking = dict(adapter=run, dataset_dir=str(data), max_samples=4, max_new_tokens=6, use_cpu=True, preprocessing_num_workers=None)
    own = predict(predict_recipe(model, 'car_item_test', tmp_path/'hf', skip_special_tokens=False, **asking))
    theirs = predict(predict_recipe(model, 'car_item_test', tmp_path/'llamafactory', **asking), engine='llamafactory')
    up_to_special = [row['predict'].partition('<|')[0] for row in own]  # where LLaMA-Factory ends an answer, and these models are hardly trained
    assert up_to_special == [row['predict'] for row in theirs] and len(own) == 4 and not own.failed

def test_clips_that_llamafactory_cannot_place(small, family, factory, clips, tmp_path):
    "Qwen3-VL's clips get their times by the number of the turn: what is called an error stops LLaMA-Factory, and nothing else does."
    (one, _), (two, _) = clips[:2]
    said = lambda *turns: [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(turns)]
    rows = {'first turn': {'videos': [one], 'messages': said('<video>What?', 'A car.', 'And?', 'Yes.')},
            'later turn': {'videos': [one], 'messages': said('Hello', 'Hi', '<video>What?', 'A car.')},
            'several': {'videos': [one, two], 'messages': said('<video><video>What?', 'A car.')}}
    registry, has_times = Registry(tmp_path/'data'), families[family].has_times
    for name, row in rows.items():
        registry.add(name, [row])
        found = [f for f in data_findings(train_recipe(small, name, tmp_path/'run', dataset_dir=str(tmp_path/'data'), cutoff_len=8192)) if 'clip' in f.what]
        assert [f.level for f in found] == {'first turn': [], 'later turn': ['error'], 'several': ['warning']}[name]*has_times, (name, found)
        prepare = lambda: factory.prepare(tmp_path/'data', name, cutoff_len=8192, model_name_or_path=str(small), template=usual_template(small))
        if found and found[0].level == 'error':
            with pytest.raises(IndexError): prepare()
        else: prepare()
