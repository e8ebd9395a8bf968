"The stored clips, and LLaMA-Factory's own hands on them: its plugin, a training and a prediction."
import json, math

import av
import pytest

from qwen2vl_nb.model import sampled_frames, video_tokens
from qwen2vl_nb.prediction.engines import predict
from qwen2vl_nb.recipe import predict_recipe, train_recipe
from qwen2vl_nb.data.registry import Registry
from qwen2vl_nb.run.loss import read_log
from qwen2vl_nb.run.start import launch
from qwen2vl_nb.tiny import FPS, SECONDS, SIZE, make_car_video

@pytest.fixture(scope='module')
def samples(data): return {half: json.loads((data/'car_video'/f'{half}.json').read_text()) for half in ('train', 'test')}

@pytest.fixture(scope='module')
def clips(data, samples): return [data/path for half in samples.values() for s in half for path in s['videos']]

def _decoded(path):
    with av.open(str(path)) as clip: return [frame.to_ndarray(format='rgb24').astype(int) for frame in clip.decode(video=0)]

def test_the_stored_clips_are_whole(data, clips):
    assert len(set(clips)) == 32 and sorted(clips) == sorted((data/'car_video'/'videos').iterdir())
    for path in clips:
        with av.open(str(path)) as clip:
            stream, = clip.streams
            assert (stream.codec_context.name, stream.pix_fmt) == ('h264', 'yuv420p')
            assert (stream.width, stream.height, stream.frames, stream.average_rate, stream.duration*stream.time_base) == (*SIZE, FPS*SECONDS, FPS, SECONDS)
        assert len(_decoded(path)) == FPS*SECONDS, path
    assert sum(p.stat().st_size for p in (data/'car_video').rglob('*') if p.is_file()) < 200_000

def test_they_are_what_is_drawn(data, samples, clips, tmp_path):
    assert make_car_video(tmp_path/'car_video') == (samples['train'], samples['test'])
    assert (data/'car_video'/'labels.csv').read_text() == (tmp_path/'car_video'/'labels.csv').read_text()
    for path in clips:
        made = tmp_path/path.relative_to(data)
        assert all(abs(a - b).mean() < 3 for a, b in zip(_decoded(path), _decoded(made), strict=True)), path

def test_clips_come_out_the_same_each_time(tmp_path):
    for name in ('once', 'again'): make_car_video(tmp_path/name, n_train=6, n_test=2, seed=3)
    once, again = ({p.name: p.read_bytes() for p in (tmp_path/name/'videos').iterdir()} for name in ('once', 'again'))
    assert len(once) == 8 and once == again

def test_llamafactory_takes_every_clip(plugin, processor, samples, data, tiny):
    expected = video_tokens(len(sampled_frames(FPS*SECONDS, SECONDS)), *SIZE, model=tiny)
    for s in samples['train'] + samples['test']:
        path = str(data/s['videos'][0])
        asked = plugin.process_messages(s['messages'], [], [path], [], processor)[0]['content']
        assert asked.count('<|video_pad|>') == expected == 24, path
        inputs = plugin._get_mm_inputs([], [path], [], processor)
        assert inputs['video_grid_thw'].tolist() == [[2, 6, 8]], 'four frames are two steps in time; 112×84 pixels are 8×6 patches'
        first, last = inputs['pixel_values_videos'].chunk(2)
        assert first.isfinite().all() and last.isfinite().all() and not first.equal(last), 'it moves'

@pytest.fixture(scope='module')
def ran(tmp_path_factory, tiny, data, samples):
    "A training of three steps and a prediction of four rows, on two clips, in folders with a space and Chinese characters."
    home = tmp_path_factory.mktemp('video')/'我的 clips'
    registry = Registry(home/'数据')
    rows = [{'messages': [dict(role='user', content=f'<video>{asked}'), dict(role='assistant', content=f'{s["messages"][1]["content"]} {asked}')],
             'videos': [str(data/s['videos'][0])]} for s in samples['train'][:2] for asked in ('Which way does it drive?', 'What is this?')]
    registry['clips'] = Registry(data)['car_video'] | {'file_name': 'clips.json'}
    (registry.dataset_dir/'clips.json').write_text(json.dumps(rows), encoding='utf-8')
    common = dict(dataset_dir=str(registry.dataset_dir), use_cpu=True, preprocessing_num_workers=None, cutoff_len=256)
    run = launch(train_recipe(tiny, 'clips', home/'run', bf16=None, max_steps=3, learning_rate=5e-3, lr_scheduler_type='constant', warmup_ratio=None,
                              per_device_train_batch_size=4, gradient_accumulation_steps=1, logging_steps=1, **common)).wait()
    asked = predict_recipe(tiny, 'clips', home/'predict', adapter=run, max_new_tokens=8, per_device_eval_batch_size=4, **common)
    return dict(rows=rows, run=run, predictions=predict(asked))

def test_it_trains_on_clips(ran):
    losses = read_log(ran['run']).loss.dropna().tolist()
    assert len(losses) == 3 and all(map(math.isfinite, losses)) and losses[-1] < losses[0], losses
    assert (ran['run'].output_dir/'adapter_model.safetensors').is_file()

def test_it_answers_every_row_in_order(ran):
    told = [(r['prompt'], r['label']) for r in ran['predictions']]
    assert told == [tuple(turn['content'] for turn in row['messages']) for row in ran['rows']]
    assert all(isinstance(r['predict'], str) for r in ran['predictions']) and any(r['predict'].strip() for r in ran['predictions'])
