"Samples against what LLaMA-Factory and the real processor make of them."
import json, random
from types import SimpleNamespace

from PIL import Image

from conftest import write_clip
from qwen2vl_nb.model import image_tokens, video_tokens
from qwen2vl_nb.data.check import check_samples, mend_samples
from qwen2vl_nb.data.sources import read_samples
from qwen2vl_nb.data.tokens import count_tokens
from qwen2vl_nb.model import sampled_frames
from qwen2vl_nb.data.registry import Registry

def _true_tokens(plugin, processor, size, **limits):
    "Tokens by LLaMA-Factory's own picture steps and the real processor."
    image = plugin._preprocess_image(Image.new('RGB', size), **limits)
    grid = processor.image_processor(images=[image], return_tensors='pt')['image_grid_thw'][0]
    return int(grid.prod()) // processor.image_processor.merge_size**2

def _side(rng): return int(10**rng.uniform(0, 3.6))

def test_image_tokens_are_those_of_the_trainer(plugin, processor, tiny):
    "2,000 random sizes and limits through LLaMA-Factory's own steps and the real processor's resize; every tenth through all of the processor."
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
    rng, real = random.Random(0), processor.image_processor
    corners = [(112, 84), (28, 28), (27, 29), (1, 1), (1999, 9), (9, 1999), (42, 42), (70, 98), (4032, 3024)]
    for i in range(2000):
        size = corners[i] if i < len(corners) else (_side(rng), _side(rng))
        limits = dict(image_max_pixels=int(10**rng.uniform(4, 6.5)), image_min_pixels=int(10**rng.uniform(2, 4)))
        image = plugin._preprocess_image(Image.new('L', size), **limits)
        height, width = smart_resize(image.height, image.width, 28, real.size['shortest_edge'], real.size['longest_edge'])
        assert image_tokens(*size, **limits, model=tiny) == height*width//28**2, (size, limits)
        if i % 10 == 0 and height*width < 400_000: assert _true_tokens(plugin, processor, size, **limits) == height*width//28**2, (size, limits)

def test_video_tokens_are_those_of_the_trainer(plugin, processor, tiny, tmp_path, monkeypatch):
    "Real clips of random sizes, lengths and rates, through LLaMA-Factory's counting and through its frames and the real processor."
    rng = random.Random(0)
    for i in range(30):
        frames, rate, size = rng.randint(1, 60), rng.choice([5, 8, 24, 30]), (2*rng.randint(8, 200), 2*rng.randint(8, 200))
        limits = dict(video_fps=rng.choice([.5, 1., 2., 4.]), video_maxlen=rng.choice([1, 4, 7, 128]), video_max_pixels=rng.choice([256*256, 20_000]), video_min_pixels=rng.choice([16*16, 10_000]))
        for key, value in limits.items(): monkeypatch.setattr(processor, key, value, raising=False)
        path = str(tmp_path/f'{i}.mp4')
        write_clip(path, frames, rate, size)
        sample = {'videos': [path], 'instruction': '<video>What?', 'output': 'x'}
        counted = int(count_tokens([sample], tiny, **limits).media[0])
        promised = plugin._get_mm_token_metadata([], [path], [], processor)['video_grid_thw']
        given = plugin._get_mm_inputs([], [path], [], processor)['video_grid_thw']
        assert [counted]*2 == [int(grid[0].prod())//4 for grid in (promised, given)], (frames, rate, size, limits)
        assert not len(check_samples([sample], model=tiny, **limits))

def test_video_tokens_of_many_sizes(plugin, processor, tiny):
    "The arithmetic alone, on 2,000 sizes, lengths and limits."
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
    rng, real = random.Random(1), processor.video_processor
    for _ in range(2000):
        size, total, seconds = (_side(rng), _side(rng)), rng.randint(1, 3000), rng.uniform(.1, 100)
        low, high, fps, most = int(10**rng.uniform(2, 4)), int(10**rng.uniform(4, 6.5)), rng.choice([.5, 1., 2., 3.3]), rng.randint(1, 200)
        stream = SimpleNamespace(frames=total, duration=seconds, time_base=1)
        taken = plugin._get_video_sample_indices(stream, video_fps=fps, video_maxlen=most)
        assert sampled_frames(total, seconds, fps, most) == taken.tolist()
        w, h = plugin._get_qwen_video_size_after_regularization(*size, high, low)
        h, w = smart_resize(h, w, 28, real.size['shortest_edge'], real.size['longest_edge'])
        assert video_tokens(len(taken), *size, high, low, tiny) == (len(taken)+1)//2*h*w//28**2, (size, low, high)

TALK = ['Hello', ' what is\nthis? ', '一辆车 😀', 'a  b\t', '{"a": 1}', '<b>', "don't"]

def test_tokens_are_those_of_llamafactory(factory, tiny, data, tmp_path):
    "Rows of both forms, every turn and picture, against the length that LLaMA-Factory's own preprocessing gives them."
    rng, picture = random.Random(0), str(data/'car_item'/'images'/'0001.png')
    def words(): return ''.join(rng.choices(TALK, k=rng.randint(1, 4)))
    def question(n): return {'images': [picture]*n, 'instruction': words() + '<image>'*n, 'input': rng.choice(['', words()]), 'output': words(), 'system': rng.choice([None, words()]),
                             'history': [[words(), words()] for _ in range(rng.randint(0, 2))]}
    def talk(n): return {'images': [picture]*n, 'messages': [*([{'role': 'system', 'content': words()}]*rng.randint(0, 1)), {'role': 'user', 'content': '<image>'*n + words()}, {'role': 'assistant', 'content': words()},
                                                           *[{'role': ('observation', 'assistant')[i%2], 'content': words()} for i in range(2*rng.randint(0, 1))]]}
    for name, make in (('questions', question), ('talks', talk)):
        samples = [make(rng.randint(0, 2)) for _ in range(60)]
        Registry(tmp_path).add(name, samples)
        ids, _ = factory.prepare(tmp_path, name, cutoff_len=4096)
        assert list(count_tokens(samples, tiny).total) == list(map(len, ids))

def test_a_row_is_too_long_exactly_when_it_is_cut(factory, tiny, data, tmp_path):
    row = read_samples(data/'car_item'/'test.json')[0]
    n = int(count_tokens([row], tiny).total[0])
    Registry(tmp_path).add('x', [row])
    for cutoff, is_cut in ((n, False), (n-1, True)):
        assert (len(factory.prepare(tmp_path, 'x', cutoff_len=cutoff)[0][0]) < n) == is_cut == bool(len(check_samples([row], model=tiny, cutoff_len=cutoff)))

def test_a_row_is_an_error_exactly_when_its_picture_is_cut(factory, tiny, data, tmp_path):
    "A long answer is cut before a short prompt, so its row is trained."
    row = read_samples(data/'car_item'/'test.json')[0] | {'output': 'A car. '*100}
    Registry(tmp_path).add('x', [row])
    media, cut = count_tokens([row], tiny).media[0], {}
    for n in (20, 40, 60, 80, 120, 200, 400):
        [kept], tokenizer = factory.encode(tmp_path, 'x', 'sft', cutoff_len=n)
        cut[n] = kept['input_ids'].count(tokenizer.convert_tokens_to_ids('<|image_pad|>')) < media
    found = {n: check_samples([row], model=tiny, cutoff_len=n).level.tolist() for n in cut}
    assert found == {n: ['error' if is_cut else 'warning'] for n, is_cut in cut.items()} and len({*cut.values()}) == 2

def test_llamafactory_trains_on_rows_that_only_look_like_mistakes_beside_the_others(factory, data, tmp_path):
    "A row without a picture, another answer to the same question, blanks and another case: each is trained as it is, so each is a warning, in its own row."
    sound = [s | {'instruction': '<image>Which vehicle?', 'output': json.loads(s['output'])['item']} for s in read_samples(data/'car_item'/'train.json')[:40]]
    assert check_samples(sound).empty
    changes = {30: {'output': ' ' + sound[30]['output'] + '\n'}, 31: {'output': sound[31]['output'].title()}, 32: {'images': [], 'instruction': 'Which vehicle?'}, 33: {'images': sound[0]['images'], 'output': 'plane'}, 34: {'images': sound[1]['images'], 'output': sound[1]['output']}}
    odd = [s | changes.get(i, {}) for i, s in enumerate(sound)]
    found = check_samples(odd).query("level != 'note'")
    assert [*zip(found.row, found.level)] == [(i, 'warning') for i in (0, 30, 31, 32, 33)]  # 34 is a copy of 1, which is a note
    for name, rows in (('sound', sound), ('odd', odd)): Registry(tmp_path).add(name, rows)
    one, other = (factory.prepare(tmp_path, name)[0] for name in ('sound', 'odd'))
    assert len(one) == len(other) == 40 and [i for i in range(40) if one[i] != other[i] and i not in (33, 34)] == [30, 31, 32]
    mended, found = mend_samples(odd)
    assert found.query("level == 'mended'").row.tolist() == [30] and mended[30] == sound[30] and mended[:30] + mended[31:] == odd[:30] + odd[31:]

def test_image_tokens_follow_the_model_folder(plugin, tiny, tmp_path):
    import shutil
    from transformers import AutoProcessor
    folder = shutil.copytree(tiny, tmp_path/'model')
    config = json.loads((folder/'preprocessor_config.json').read_text())
    config = {k:v for k,v in config.items() if k not in ('size',)} | {'min_pixels': 20_000, 'max_pixels': 100_000}
    (folder/'preprocessor_config.json').write_text(json.dumps(config))
    processor = AutoProcessor.from_pretrained(folder)
    limits = dict(image_max_pixels=768*768, image_min_pixels=32*32)
    for size in [(112, 84), (640, 480), (1000, 100), (50, 50)]:
        assert image_tokens(*size, model=folder) == _true_tokens(plugin, processor, size, **limits), size

def test_the_stored_data_is_deterministic_and_does_not_leak(data, tmp_path):
    from qwen2vl_nb.tiny import make_car_item
    make_car_item(tmp_path/'car_item')
    stored = {p.relative_to(data): p for p in sorted((data/'car_item').rglob('*')) if p.is_file()}
    made = {p.relative_to(tmp_path): p for p in sorted(tmp_path.rglob('*')) if p.is_file()}
    assert list(stored) == list(made)
    for name, path in stored.items():
        if path.suffix == '.png': assert Image.open(path).tobytes() == Image.open(made[name]).tobytes(), name
        else: assert path.read_bytes() == made[name].read_bytes(), name
    halves = [{Image.open(p).tobytes() for s in read_samples(data/'car_item'/f'{half}.json') for p in s['images']} for half in ('train', 'test')]
    assert len(halves[0]) >= 200 and len(halves[1]) >= 100 and not halves[0] & halves[1]
