"Batches: what is computed of them before the start, against LLaMA-Factory's collator, transformers' sampler and real runs on two ranks."
import json, re

import numpy as np
import pytest
from PIL import Image

from conftest import write_clip
from qwen2vl_nb.checks import data_findings
from qwen2vl_nb.data.batches import packed_padding_share, padding_share
from qwen2vl_nb.data.preprocessing import preprocessing_bytes
from qwen2vl_nb.data.tokens import count_tokens
from qwen2vl_nb.recipe import train_recipe
from qwen2vl_nb.run.loss import read_log
from qwen2vl_nb.run.start import launch
from qwen2vl_nb.zero import zero_config

def write_rows(folder, kinds, name='rows'):
    "A registered data set: a row for each letter, p for a picture, c for a clip, b for both, f for the frames of a clip as pictures, t for text; a registry keeps the data sets that it has."
    folder.mkdir(exist_ok=True)
    Image.new('RGB', (112, 84), 'red').save(folder/'a.png')
    write_clip(folder/'c.mp4', 4, 2, (112, 84))
    shown = {'p': ('<image>', ['a.png'], []), 'c': ('<video>', [], ['c.mp4']), 'b': ('<image><video>', ['a.png'], ['c.mp4']), 'f': ('<image>'*4, ['a.png']*4, []), 't': ('', [], [])}
    rows = [dict(instruction=f'{tags}What is this?', input='', output='A red car', images=images, videos=videos) for tags, images, videos in map(shown.get, kinds)]
    (folder/f'{name}.json').write_text(json.dumps(rows))
    columns = {'prompt': 'instruction', 'query': 'input', 'response': 'output', 'images': 'images', 'videos': 'videos'}
    file = folder/'dataset_info.json'
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | {name: {'file_name': f'{name}.json', 'columns': columns}}))

@pytest.fixture
def on_two_ranks(tiny, tmp_path):
    "A recipe for a few steps on two ranks, whose micro batches are those of the rows, in turn."
    def make(kinds, zero, **changes):
        folder = tmp_path/f'{kinds[:4]}-{zero}'
        write_rows(folder, kinds)
        return train_recipe(tiny, 'rows', folder/'run', **dict(dataset_dir=str(folder), deepspeed=zero_config(zero), max_steps=3, logging_steps=1, disable_shuffling=True, bf16=None,
            gradient_accumulation_steps=1, preprocessing_num_workers=None, plot_loss=None, save_strategy='no') | changes)
    return make

def test_the_cures_of_a_hang_work(on_two_ranks):
    """What is proven to end in test_errors_proven.py runs under ZeRO-2; under ZeRO-3 so do pictures, clips and text in micro batches of their own, and pictures with the
    frames of clips as pictures, in trainings and in evaluations. The runs start at the same time."""
    evaluated = dict(eval_strategy='steps', eval_steps=1, eval_dataset='rows')
    cures = [on_two_ranks('pb'*6, 'z2'), on_two_ranks('pcctpt'*2, 'z3', per_device_eval_batch_size=1, **evaluated),
             on_two_ranks('pfpptfpf', 'z3', per_device_train_batch_size=2, per_device_eval_batch_size=2, **evaluated)]
    assert not [f for recipe in cures for f in data_findings(recipe, 2) if f.level != 'note']
    runs = [launch(recipe, nproc=2) for recipe in cures]
    for run, recipe in zip(runs, cures):
        run.wait()
        assert run.status == 'done', run.failure
        assert read_log(run).dropna(subset=['loss']).loss.between(.5, 10).sum() == recipe['max_steps']

@pytest.fixture
def uneven(tmp_path, data):
    "Rows of very different lengths, each with a picture of its own size."
    rng, rows = np.random.default_rng(3), []
    for i in range(240):
        size = int(rng.integers(40, 400)), int(rng.integers(40, 300))
        Image.new('RGB', size).save(tmp_path/f'{i}.png')
        rows.append(dict(instruction='<image>What is this?', input='', output='A red car. '*int(rng.integers(1, 60)), images=[f'{i}.png']))
    (tmp_path/'uneven.json').write_text(json.dumps(rows))
    columns = {'prompt': 'instruction', 'query': 'input', 'response': 'output', 'images': 'images'}
    (tmp_path/'dataset_info.json').write_text(json.dumps({'uneven': {'file_name': 'uneven.json', 'columns': columns}}))
    return rows

def test_padding_is_what_the_collator_makes(uneven, tiny, tmp_path, factory, processor):
    "In random order and in that of transformers' own sampler, with pictures, every batch through LLaMA-Factory's collator."
    import torch
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask
    from llamafactory.data.template import TEMPLATES
    from torch.utils.data import RandomSampler
    from transformers.trainer_pt_utils import LengthGroupedSampler
    rows, tokenizer = factory.encode(tmp_path, 'uneven', 'sft')
    lengths = np.array([len(row['input_ids']) for row in rows])
    samples = [row | {'images': [str(tmp_path/p) for p in row['images']]} for row in uneven]
    assert list(lengths) == list(count_tokens(samples, tiny).total)
    collate = SFTDataCollatorWith4DAttentionMask(template=TEMPLATES['qwen2_vl'], model=None, tokenizer=tokenizer, processor=processor, pad_to_multiple_of=8)
    torch.manual_seed(1)
    shares = []
    for sampler in (RandomSampler(rows), LengthGroupedSampler(4*8, dataset=rows, model_input_name='input_ids')):
        order = list(sampler)
        batches = [collate([dict(rows[i]) for i in order[at:at + 4]]) for at in range(0, len(order), 4)]
        shares.append(1 - lengths.sum()/sum(batch['input_ids'].numel() for batch in batches))
        assert padding_share(lengths[order], 4) == pytest.approx(shares[-1])
    said, = data_findings(train_recipe(tiny, 'uneven', tmp_path/'run', dataset_dir=str(tmp_path), per_device_train_batch_size=4))
    random, grouped = (float(n)/100 for n in re.findall(r'(\d+)%', said.what)[:2])
    assert said.where == 'group_by_length' and said.level == 'note'
    assert random == pytest.approx(shares[0], abs=.05) and grouped == pytest.approx(shares[1], abs=.05)

def test_what_preprocessing_writes_is_predicted(uneven, tmp_path, factory):
    "The cache of datasets after LLaMA-Factory's preprocessing. It comes before packing, after which LLaMA-Factory writes wider numbers in the same process."
    lengths = [len(row['input_ids']) for row in factory.encode(tmp_path, 'uneven', 'sft')[0]]
    written = sum(p.stat().st_size for p in (tmp_path/'.cache').rglob('*') if p.is_file())
    assert preprocessing_bytes((tmp_path/'uneven.json').stat().st_size, lengths)[0] == pytest.approx(written, rel=.1)

def test_packed_rows_are_those_of_llamafactory(uneven, tmp_path, factory):
    packed, tokenizer = factory.encode(tmp_path, 'uneven', 'sft', neat_packing=True, cutoff_len=1024)
    lengths = np.array([len(row['input_ids']) for row in factory.encode(tmp_path, 'uneven', 'sft')[0]])
    used = sum(sum(1 for m in row['attention_mask'] if m) for row in packed)
    assert packed_padding_share(lengths, 1024) == pytest.approx(1 - used/(1024*len(packed)))
