"Rankings and marked answers, from the files of other tools through LLaMA-Factory's own loader; and bad input at these doors."
import csv, json

import pandas as pd
import pytest
from PIL import Image

from conftest import TRAINS_KTO
from qwen2vl_nb.data.check import check_samples
from qwen2vl_nb.data.describe import show_samples
from qwen2vl_nb.data.registry import Registry, dataset_rows, dataset_samples
from qwen2vl_nb.data.sources import read_samples
from qwen2vl_nb.data.split import split_samples
from qwen2vl_nb.data.tokens import count_tokens
from qwen2vl_nb.data.write import write_samples

GOOD, BAD = 'A red car.', 'One dog.'
ASKED, SAID, WRONG = ({'role': role, 'content': text} for role, text in (('user', 'What is this?'), ('assistant', GOOD), ('assistant', BAD)))
HUMAN, GPT, GPT_WRONG = ({'from': who, 'value': text} for who, text in (('human', 'What is this?'), ('gpt', GOOD), ('gpt', BAD)))
HELLO = '\n\nHuman: Hello.\n\nAssistant: Good day.\n\nHuman: What is this?\n\nAssistant:'

def _json(folder, *rows, name='rows.json'):
    (folder/name).write_text(json.dumps(rows))
    return folder/name

def _picture(folder):
    Image.new('RGB', (112, 84), 'crimson').save(folder/'a.png')
    return 'a.png'

def _table(folder, *rows):
    with open(folder/'rows.csv', 'w', newline='') as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder/'rows.csv'

def _parquet(folder, *rows):
    pd.DataFrame(rows).to_parquet(folder/'rows.parquet')
    return folder/'rows.parquet'

def _bytes(folder): return {'bytes': (folder/_picture(folder)).read_bytes(), 'path': 'a.png'}

QUESTION, VISION = {'instruction': 'What is this?', 'input': ''}, {'type': 'image'}
PAIR = {'chosen': GOOD, 'rejected': BAD}

RANKINGS = { # name → the file, arguments, number of pictures
    'LLaMA-Factory, alpaca': (lambda f: _json(f, QUESTION | PAIR), {}, 0),
    'LLaMA-Factory, alpaca with a picture': (lambda f: _json(f, QUESTION | PAIR | {'images': [_picture(f)], 'instruction': '<image>What is this?'}), {}, 1),
    'LLaMA-Factory, sharegpt': (lambda f: _json(f, {'conversations': [HUMAN], 'chosen': GPT, 'rejected': GPT_WRONG}), {}, 0),
    'LLaMA-Factory, sharegpt with a column prompt': (lambda f: _json(f, {'prompt': 'a topic', 'conversations': [HUMAN], 'chosen': GPT, 'rejected': GPT_WRONG}), {}, 0),
    'LLaMA-Factory v1': (lambda f: _json(f, {'chosen_messages': [ASKED, SAID], 'rejected_messages': [ASKED, WRONG]}), {}, 0),
    'RLHF-V in its registry': (lambda f: _parquet(f, {'conversations': [HUMAN | {'value': '<image>What is this?'}], 'chosen': GPT, 'rejected': GPT_WRONG, 'images': [_bytes(f)]}), {}, 1),
    'RLHF-V': (lambda f: _parquet(f, {'ds_name': 'RLHF-V', 'image': _bytes(f), 'text': json.dumps({'question': 'What is this?'} | PAIR), 'origin_split': '{}', 'idx': 0, 'image_path': 'x'}), {}, 1),
    'RLAIF-V': (lambda f: _parquet(f, {'image': _bytes(f), 'question': 'What is this?'} | PAIR), {}, 1),
    'HH-RLHF': (lambda f: _json(f, {'chosen': f'{HELLO} {GOOD}', 'rejected': f'{HELLO} {BAD}'}), {}, 0),
    'TRL, explicit prompt': (lambda f: _json(f, {'prompt': 'What is this?'} | PAIR), {}, 0),
    'TRL, implicit prompt': (lambda f: _json(f, {'chosen': f'What is this? {GOOD}', 'rejected': f'What is this? {BAD}'}), {}, 0),
    'TRL, conversational, explicit prompt': (lambda f: _json(f, {'prompt': [ASKED], 'chosen': [SAID], 'rejected': [WRONG]}), {}, 0),
    'TRL, conversational, implicit prompt': (lambda f: _json(f, {'chosen': [ASKED, SAID], 'rejected': [ASKED, WRONG]}), {}, 0),
    'TRL with a picture': (lambda f: _json(f, {'images': [_picture(f)], 'prompt': [{'role': 'user', 'content': [VISION, {'type': 'text', 'text': 'What is this?'}]}],
                                               'chosen': [{'role': 'assistant', 'content': [{'type': 'text', 'text': GOOD}]}], 'rejected': [WRONG]}), {}, 1),
    'UltraFeedback, binarized': (lambda f: _json(f, {'prompt': 'What is this?', 'messages': [ASKED, SAID], 'chosen': [ASKED, SAID], 'rejected': [ASKED, WRONG], 'score_chosen': 8.5}), {}, 0),
    'a table': (lambda f: _table(f, {'photo': _picture(f), 'good': GOOD, 'bad': BAD}), dict(image='photo', prompt='What is this?', chosen='good', rejected='bad'), 1),
    'a table with its usual names': (lambda f: _table(f, {'image': _picture(f), 'question': 'What is this?'} | PAIR), {}, 1),
}
MARKS = {
    'LLaMA-Factory, alpaca': (lambda f: _json(f, QUESTION | {'output': GOOD, 'kto_tag': True}), {}, True),
    'LLaMA-Factory, sharegpt': (lambda f: _json(f, {'messages': [ASKED, WRONG], 'label': False}), {}, False),
    'TRL, unpaired': (lambda f: _json(f, {'prompt': 'What is this?', 'completion': GOOD, 'label': True}), {}, True),
    'TRL, unpaired, conversational': (lambda f: _json(f, {'prompt': [ASKED], 'completion': [WRONG], 'label': False}), {}, False),
    'kto-mix': (lambda f: _json(f, {'completion': [ASKED, SAID], 'label': True}), {}, True),
    'a table': (lambda f: _table(f, {'image': _picture(f), 'q': 'What is this?', 'a': BAD, 'ok': 'FALSE'}), dict(prompt='q', response='a', kto_tag='ok'), False),
}

def _answer(turns): return [turn['content'] for turn in turns]

@pytest.mark.parametrize('make,how,pictures', RANKINGS.values(), ids=RANKINGS.keys())
def test_rankings_go_through_llamafactory_s_loader(make, how, pictures, factory, tiny, tmp_path):
    "Read, checked, registered, loaded by LLaMA-Factory, encoded as DPO trains on them, and read again."
    samples = read_samples(make(tmp_path), **how)
    assert check_samples(samples, model=tiny).empty and len(samples[0]['images']) == pictures
    registry = Registry(tmp_path/'data')
    entry = registry.add('rows', samples)
    assert entry['ranking'] and entry['columns']['chosen'] == 'chosen'
    row, = factory.load(registry.dataset_dir, 'rows', 'rm')
    assert _answer(row['_response']) == [GOOD, BAD]
    assert _answer(row['_prompt'])[-1] == '<image>'*pictures + 'What is this?'
    encoded, tokenizer = factory.encode(registry.dataset_dir, 'rows', 'rm')
    longest = max(len(encoded[0][f'{k}_input_ids']) for k in PAIR)
    assert count_tokens(samples, tiny).total[0] == longest
    assert [tokenizer.decode([i for i in encoded[0][f'{k}_labels'] if i >= 0]).split('<|im_end|>')[0] for k in PAIR] == [GOOD, BAD]
    assert dataset_samples(registry, 'rows') == samples and read_samples(registry.dataset_dir/'rows.json') == samples
    assert dataset_rows(registry, 'rows')[0]['label'] == GOOD
    assert f'chosen: {GOOD} | rejected: {BAD}' in repr(show_samples(samples))

@pytest.mark.parametrize('make,how,mark', MARKS.values(), ids=MARKS.keys())
def test_marked_answers_go_through_llamafactory_s_loader(make, how, mark, factory, tiny, tmp_path):
    samples = read_samples(make(tmp_path), **how)
    assert samples[0]['kto_tag'] is mark and set(check_samples(samples, model=tiny).level) == {'warning'}  # there is only one
    registry = Registry(tmp_path/'data')
    assert registry.add('rows', samples)['columns']['kto_tag'] == 'kto_tag'
    encoded, tokenizer = factory.encode(registry.dataset_dir, 'rows', 'kto')
    assert encoded[0]['kto_tags'] is mark and count_tokens(samples, tiny).total[0] == len(encoded[0]['input_ids'])
    assert tokenizer.decode([i for i in encoded[0]['labels'] if i >= 0]).split('<|im_end|>')[0] == (GOOD if mark else BAD)
    assert dataset_samples(registry, 'rows') == samples == read_samples(registry.dataset_dir/'rows.json')

def test_questions_and_dialogues_become_one_data_set(factory, tmp_path):
    mixed = [QUESTION | PAIR | {'images': [], 'input': 'Be brief.'}, {'images': [], 'messages': [ASKED], 'chosen': SAID, 'rejected': WRONG}]
    Registry(tmp_path).add('rows', mixed)
    loaded = factory.load(tmp_path, 'rows', 'rm')
    assert [_answer(row['_response']) for row in loaded] == [[GOOD, BAD]]*2 and _answer(loaded[0]['_prompt']) == ['What is this?\nBe brief.']

def test_dialogues_in_memory_with_marks_are_no_samples_yet(tmp_path):
    "As `json.load` returns LLaMA-Factory's own example for KTO: the mark must not be lost."
    rows = [{'messages': [ASKED, SAID], 'label': True}, {'messages': [ASKED, WRONG], 'label': False}]
    assert read_samples(rows) == read_samples(_json(tmp_path, *rows)) and [s['kto_tag'] for s in read_samples(rows)] == [True, False]

def test_a_response_that_is_named_makes_ordinary_samples(tmp_path):
    "As before: of a ranking, one column is the answer, and the other stays a column."
    sample, = read_samples(_json(tmp_path, QUESTION | PAIR), response='chosen')
    assert sample['output'] == GOOD and sample['rejected'] == BAD and 'chosen' not in sample
    assert check_samples([sample]).empty and 'ranking' not in Registry(tmp_path/'data').add('rows', [sample])

def test_a_column_label_of_a_table_is_no_mark(tmp_path):
    sample, = read_samples(_json(tmp_path, {'question': 'Is it red?', 'answer': 'Yes.', 'label': True}))
    assert sample['label'] is True and 'kto_tag' not in sample

def test_rows_with_one_prompt_stay_in_one_half():
    rows = [{'images': [], 'instruction': f'What is {i//3}?', 'chosen': GOOD, 'rejected': f'{i}'} for i in range(30)]
    for seed in range(10):
        train, test = split_samples(rows, 6, seed=seed)
        assert len(test) == 6 and not {s['instruction'] for s in train} & {s['instruction'] for s in test}

# --- what cannot be read: each message names the file, and the row or the column

HH = {'chosen': f'{HELLO} {GOOD}', 'rejected': f'{HELLO} {BAD}'}
UNREADABLE = { # name → rows or what makes the file, arguments, words
    'a chosen column that is not there': ([QUESTION | PAIR], dict(chosen='chosn'), "no column 'chosn' for chosen; did you mean 'chosen'"),
    'a rejected column that is not there': ([{'prompt': 'a', 'good': 'b', 'bad': 'c'}], dict(chosen='good'), "no column 'rejected' for rejected"),
    'both misspelt': ([{'prompt': 'a', 'good': 'b', 'bad': 'c'}], dict(chosen='goood', rejected='baad'), "did you mean 'good'.*did you mean 'bad'"),
    'a mark that is not there': ([QUESTION | {'output': 'b', 'kto_tags': True}], dict(kto_tag='kto_tag'), "no column 'kto_tag' for kto_tag; did you mean 'kto_tags'"),
    'both answers and a mark': ([QUESTION | PAIR | {'good': True}], dict(kto_tag='good'), 'chosen and rejected answers or a kto_tag: name one'),
    'a mark of a word': ([QUESTION | {'output': 'b', 'kto_tag': 'yes please'}], {}, "row 0: kto_tag is 'yes please', not true or false"),
    'a mark that is missing': ([QUESTION | {'output': 'b', 'kto_tag': True}, QUESTION | {'output': 'b'}], {}, 'row 1: kto_tag is None'),
    'a mark that is a score': ([QUESTION | {'output': 'b', 'kto_tag': .7}], {}, 'row 0: kto_tag is 0.7'),
    'a ranking without a prompt': ([PAIR | {'chosen': 'Blue.', 'rejected': 'Red.'}], {}, 'row 0: there is no prompt'),
    'a transcript whose earlier turns differ': ([HH, HH | {'rejected': HELLO.replace('Good day', 'Go away') + BAD}], {}, 'row 1: chosen and rejected differ from turn 1 on'),
    'a transcript beside a text': ([HH, HH | {'rejected': BAD}], {}, r'row 1: chosen or rejected has no turns'),
    'conversations of different lengths': ([{'chosen': [ASKED, SAID, ASKED, SAID], 'rejected': [ASKED, WRONG]}], {}, 'row 0: chosen and rejected differ from turn 1 on'),
    'a conversation without turns': ([{'prompt': [ASKED], 'chosen': [], 'rejected': [WRONG]}], {}, 'row 0: chosen or rejected has no turns'),
    'answers without a prompt': ([{'chosen': [SAID], 'rejected': [WRONG]}], {}, 'row 0: chosen and rejected are answers without a prompt'),
    'a conversation beside a number': ([{'chosen': [ASKED, SAID], 'rejected': 7}], {}, 'row 0: chosen is .* and rejected is 7: both must be answers'),
    'a text of RLHF-V that is cut off': ([{'text': json.dumps({'question': 'a'} | PAIR)}, {'text': '{"question": "a", "cho'}], {}, r'the text of 1 row\(s\), the first of them row 1, is not JSON with question, chosen and rejected'),
    'RLHF-V with other keys': ([{'text': json.dumps({'question': 'a'} | PAIR)}, {'text': '{"question": "a"}'}], {}, r'the text of 1 row\(s\), the first of them row 1,'),
    'an answer with a sound': ([{'prompt': [ASKED], 'chosen': [SAID], 'rejected': [{'role': 'assistant', 'content': [{'type': 'input_audio'}]}]}], {}, r'row 0: rejected\[0\] has a content part of an unknown kind'),
    'answers that are objects without turns': ([{'chosen': SAID, 'rejected': WRONG}], {}, "no column 'instruction' for the prompt"),
    'the picture misspelt': ([PAIR | {'prompt': 'a', 'photo': 'b'}], dict(image='foto'), "no column 'foto' for the picture; did you mean 'photo'"),
    'turns written as text': ([{'chosen': json.dumps([ASKED, SAID]), 'rejected': json.dumps([ASKED, WRONG])}], {}, 'row 0: chosen or rejected has turns that are written as text: json.loads'),
    'turns as Python prints them': ([{'prompt': 'a', 'chosen': str([SAID]), 'rejected': str([WRONG])}], {}, 'row 0: chosen or rejected has turns that are written as text: .* ast.literal_eval'),
    'a prompt under a name of its own': ([{'input': 'a', 'chosen': 'b', 'rejected': 'c'}], {}, "row 0: is the prompt in 'input'.* name the column of the prompts with prompt="),
    'a prompt whose name begins with a capital': ([{'Question': 'What is it?', 'chosen': 'The car is red.', 'rejected': 'The car is blue.'}], {}, "row 0: is the prompt in 'Question'.* with prompt="),
    'an answer written as JSON beside a text': ([{'prompt': 'a', 'chosen': json.dumps([SAID]), 'rejected': BAD}], {}, 'row 0: chosen or rejected has turns that are written as text'),
    'two answers at the end': ([{'prompt': [ASKED], 'chosen': [SAID, SAID], 'rejected': [WRONG, WRONG]}], {}, 'row 0: chosen and rejected differ from turn 0 on'),
    'an empty prompt of turns': ([{'prompt': [], 'chosen': [SAID], 'rejected': [WRONG]}], {}, 'row 0: chosen and rejected are answers without a prompt'),
    'a transcript that goes on': ([HH, {'chosen': f'{HELLO} {GOOD}', 'rejected': f'{HELLO} {BAD}\n\nHuman: No.\n\nAssistant: So?'}], {}, 'row 1: chosen and rejected differ from turn 3 on'),
    'questions that differ': ([{'chosen': [ASKED, SAID], 'rejected': [ASKED | {'content': 'And this?'}, WRONG]}], {}, 'row 0: chosen and rejected differ from turn 0 on'),
    'answers under names of their own': ([{'prompt': 'a', 'chosen_response': 'b', 'rejected_response': 'c'}], {}, "no column 'output' for the answer .if 'chosen_response' belongs to preferences, name the columns with chosen= and rejected="),
    'a winner and a loser': ([{'prompt': 'a', 'winner': 'b', 'loser': 'c'}], {}, "if 'winner' belongs to preferences"),
    'ranked completions': ([{'prompt': 'a', 'completions': ['b', 'c'], 'ranks': [1, 2]}], {}, "if 'completions' belongs to preferences"),
    'marks of TRL that are words': ([{'prompt': 'a', 'completion': 'b', 'label': 'good'}], {}, "if 'completion' belongs to preferences.* kto_tag="),
    'a mark in a list': ([QUESTION | {'output': 'b', 'kto_tag': [True]}], {}, r'row 0: kto_tag is \[True\], not true or false'),
    'a mark that is a dict': ([QUESTION | {'output': 'b', 'kto_tag': {'good': True}}], {}, "row 0: kto_tag is {'good': True}"),
    'a mark that is two': ([QUESTION | {'output': 'b', 'kto_tag': 2}], {}, 'row 0: kto_tag is 2, not'),
    'a mark below zero': ([QUESTION | {'output': 'b', 'kto_tag': -1}], {}, 'row 0: kto_tag is -1, not'),
    'a mark of no length': ([QUESTION | {'output': 'b', 'kto_tag': ''}], {}, "row 0: kto_tag is '', not"),
    'a mark that is no number': ([QUESTION | {'output': 'b', 'kto_tag': float('nan')}], {}, 'row 0: kto_tag is nan, not'),
    'many bad rows at once': ([{'chosen': f'{i}', 'rejected': 'x'} for i in range(9)], {}, r'has 9 row\(s\) that cannot be read. row 0: .* row 4: .*; and 4 more'),
}

@pytest.mark.parametrize('rows,how,words', UNREADABLE.values(), ids=UNREADABLE.keys())
def test_what_cannot_be_read_is_said(rows, how, words, tmp_path):
    with pytest.raises(ValueError, match=words) as e: read_samples(_json(tmp_path, *rows), **how)
    assert str(tmp_path/'rows.json') in str(e.value), 'it says which file'

def test_samples_of_two_kinds_are_not_written(tmp_path):
    for rows in ([QUESTION | PAIR, QUESTION | {'output': GOOD}], [QUESTION | {'output': GOOD, 'kto_tag': True}, QUESTION | {'output': BAD}]):
        for write in (lambda: write_samples(rows, tmp_path/'a.json'), lambda: Registry(tmp_path).add('rows', rows)):
            with pytest.raises(ValueError, match='of one kind: row 0 has .* row 1 has neither'): write()
    assert not list(tmp_path.glob('*.json'))

# --- what is wrong with samples; those of level error are proven in test_errors_proven.py

def _talk(i=0, **changes): return {'images': [], 'messages': [ASKED | {'content': f'What is {i}?'}], 'chosen': SAID, 'rejected': WRONG} | changes
def _pair(i=0, **changes): return {'images': [], 'instruction': f'What is {i}?', 'input': '', **PAIR} | changes
def _mark(i=0, **changes): return {'images': [], 'instruction': f'What is {i}?', 'input': '', 'output': GOOD, 'kto_tag': i % 2 == 0} | changes
def _without(sample, key): return {k: v for k, v in sample.items() if k != key}

BAD_ROWS = { # name → (stage, a row between two sound ones, its field, words, level)
    'a chosen answer that is missing': ('rm', _pair(1, chosen=None), 'chosen', 'is None, not text', 'error'),
    'a rejected answer that is a number': ('rm', _pair(1, rejected=3), 'rejected', 'is 3, not text', 'error'),
    'a rejected answer that is a turn': ('rm', _pair(1, rejected=WRONG), 'rejected', 'not text', 'error'),
    'an answer of a dialogue that is text': ('rm', _talk(1, chosen=GOOD), 'chosen', 'not a turn', 'error'),
    'an answer of a dialogue that is missing': ('rm', _talk(1, rejected=None), 'rejected', 'not a turn', 'error'),
    'an answer in the role of the user': ('rm', _talk(1, rejected=WRONG | {'role': 'user'}), 'rejected', "role of the answer is 'user'", 'error'),
    'an answer in an unknown role': ('rm', _talk(1, chosen=SAID | {'role': 'bot'}), 'chosen', "role of the answer is 'bot'", 'error'),
    'messages that end with an answer': ('rm', _talk(1, messages=[ASKED, SAID]), 'messages[1]', 'chosen and rejected are the answers', 'error'),
    'no messages': ('rm', _talk(1, messages=[]), 'messages', 'no turns', 'error'),
    'a tag in the rejected answer': ('rm', _pair(1, rejected='<image>'), 'rejected', 'has <image> in it', 'error'),
    'a row without rejected answer': ('rm', _without(_pair(1), 'rejected'), '', 'no chosen and rejected answers', 'error'),
    'a mark that is text': ('kto', _mark(1, kto_tag='true'), 'kto_tag', "is 'true', neither true nor false", 'error'),
    'a mark that is a number': ('kto', _mark(1, kto_tag=1), 'kto_tag', 'is 1, neither', 'error'),
    'a mark that is missing': ('kto', _mark(1, kto_tag=None), 'kto_tag', 'is None, neither', 'error'),
    'a row without a mark': ('kto', _without(_mark(1), 'kto_tag'), '', 'have no kto_tag', 'error'),
    'a good answer that is empty': ('kto', _mark(1, output='', kto_tag=True), 'output', 'treats it as a bad one', 'error'),
    'a chosen answer in a list': ('rm', _pair(1, chosen=[GOOD]), 'chosen', 'not text', 'error'),
    'a chosen answer that is true': ('rm', _pair(1, chosen=True), 'chosen', 'is True, not text', 'error'),
    'a prompt that is a turn': ('rm', _pair(1, instruction=ASKED), 'instruction', 'not text', 'error'),
    'a tag in both answers': ('rm', _pair(1, chosen='<image>', rejected='<image> '), 'chosen', 'has <image> in it', 'error'),
    'an answer without a role': ('rm', _talk(1, chosen={'content': GOOD}), 'chosen', 'role of the answer is None', 'error'),
    'an answer without text': ('rm', _talk(1, chosen=SAID | {'content': None}), 'chosen', 'is None, not text', 'error'),
    'an answer in the role of the system': ('rm', _talk(1, chosen=SAID | {'role': 'system'}), 'chosen', "role of the answer is 'system'", 'error'),
    'an answer that is a list of turns': ('rm', _talk(1, rejected=[WRONG]), 'rejected', 'not a turn', 'error'),
    'a turn that is text': ('rm', _talk(1, messages=['What is this?']), 'messages[0]', 'not a dict', 'error'),
    'a turn without text': ('rm', _talk(1, messages=[ASKED | {'content': None}]), 'messages[0]', 'is None, not text', 'error'),
    'a system prompt and no question': ('rm', _talk(1, messages=[ASKED | {'role': 'system'}]), 'messages', 'no turns', 'error'),
    'two questions in a row': ('rm', _talk(1, messages=[ASKED, ASKED]), 'messages[1]', "role is 'user', where", 'error'),
    'a marked answer that is missing': ('kto', _mark(1, output=None), 'output', 'is None, not text', 'error'),
    'a marked answer that is a number': ('kto', _mark(1, output=7), 'output', 'is 7, not text', 'error'),
    'a mark in a list of its own': ('kto', _mark(1, kto_tag=[True]), 'kto_tag', 'neither true nor false', 'error'),
    'a rejected answer of blanks': ('rm', _pair(1, rejected=' \n'), 'rejected', 'The answer is empty', 'warning'),
    'a prompt without words': ('rm', _pair(1, instruction=''), 'instruction', 'The prompt is empty', 'warning'),
    'equal answers': ('rm', _pair(1, rejected=f' {GOOD}'), 'rejected', 'The two answers are equal', 'warning'),
    'equal answers of a dialogue': ('rm', _talk(1, rejected=SAID), 'rejected', 'The two answers are equal', 'warning'),
    'an empty chosen answer': ('rm', _pair(1, chosen=''), 'chosen', 'The answer is empty', 'warning'),
    'a bad answer that is empty': ('kto', _mark(1, output='', kto_tag=False), 'output', 'The answer is empty', 'warning'),
    'the opposite of a row before': ('rm', _pair(0, chosen=BAD, rejected=GOOD), '', 'the opposite of row 0', 'warning'),
    'both marks for one answer': ('kto', _mark(0, kto_tag=False), '', 'the opposite of row 0', 'warning'),
}
SOUND = {'question': _pair, 'dialogue': _talk, 'mark': _mark}

def between(row, stage):
    "A bad row between two sound ones of its form."
    make = _mark if stage == 'kto' else _talk if 'messages' in row else _pair
    return [make(0), row, make(3)]

@pytest.mark.parametrize('stage,row,field,words,level', BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_rows_are_found(stage, row, field, words, level):
    found = check_samples(between(row, stage))
    told = found[(found.row == 1) & (found.field == field)]
    assert words in ' '.join(told.what) and level in set(told.level), found.to_string()

@pytest.mark.parametrize('make', SOUND.values(), ids=SOUND.keys())
def test_sound_rows_have_no_findings(make, tiny): assert check_samples([make(i) for i in range(4)], model=tiny).empty

def test_marks_of_one_kind_and_of_very_different_numbers():
    all_good = check_samples([_mark(i, kto_tag=True, output=f'{i}') for i in range(3)])
    assert list(all_good.level) == ['warning'] and 'All answers are marked as good' in all_good.what[0]
    few_bad = check_samples([_mark(i, kto_tag=i > 0, output=f'{i}') for i in range(6)])
    assert list(few_bad.level) == ['note'] and 'kto_rejected_weight: 5.0' in few_bad.cure[0]

def test_the_longer_answer_counts_against_cutoff_len(factory, tiny, tmp_path):
    "And a picture that LLaMA-Factory leaves whole, cutting the answer, is no error."
    row = {'images': [str(tmp_path/_picture(tmp_path))], 'instruction': '<image>What is this?', 'input': '', 'chosen': GOOD, 'rejected': 'A dog. '*40}
    total = int(count_tokens([row], tiny).total[0])
    assert check_samples([row], model=tiny, cutoff_len=total).empty
    cutoff = total - 20
    short = check_samples([row], model=tiny, cutoff_len=cutoff)
    assert list(short.level) == ['warning'] and f'It takes {total} tokens' in short.what[0]
    Registry(tmp_path/'data').add('rows', [row])
    (encoded,), tokenizer = factory.encode(tmp_path/'data', 'rows', 'rm', cutoff_len=cutoff)
    pads = tokenizer.convert_tokens_to_ids('<|image_pad|>')
    assert len(encoded['rejected_input_ids']) == cutoff and encoded['chosen_input_ids'].count(pads) == count_tokens([row], tiny).media[0]
    tiny_cutoff = check_samples([row], model=tiny, cutoff_len=8)
    assert list(tiny_cutoff.level) == ['error']

# --- recipes

STAGES = {'dpo': _pair, 'rm': _pair, 'kto': _mark}

def _recipe(tiny, folder, stage, rows, **changes):
    from qwen2vl_nb.recipe import train_recipe
    Registry(folder/'data').add('rows', rows)
    return train_recipe(tiny, 'rows', folder/'run', **dict(stage=stage, dataset_dir=str(folder/'data'), bf16=None, use_cpu=True, preprocessing_num_workers=None) | changes)

@pytest.mark.parametrize('stage', STAGES)
def test_a_sound_recipe_has_no_findings_and_a_bad_row_is_named(stage, tiny, tmp_path):
    from qwen2vl_nb.checks import quick_findings, slow_findings
    make = STAGES[stage]
    rows = [make(i) for i in range(4)]
    recipe = _recipe(tiny, tmp_path, stage, rows)
    too_new = [] if stage != 'kto' or TRAINS_KTO else ['KTO needs an older release']  # of transformers, which is said before the start
    assert [f.what.partition(':')[0] for f in quick_findings(recipe) + slow_findings(recipe)] == too_new
    bad = _recipe(tiny, tmp_path, stage, [*rows, make(5, **({'kto_tag': 'no'} if stage == 'kto' else {'rejected': 3}))])
    errors = [f.what for f in slow_findings(bad) if f.level == 'error']
    assert len(errors) == 1 and 'the first is row 4' in errors[0]

REFUSED = {
    'a reward model that keeps its best': ('rm', dict(load_best_model_at_end=True, eval_strategy='steps', save_strategy='steps', val_size=.5), 'load_best_model_at_end'),
    'smoothed labels without sigmoid': ('dpo', dict(pref_loss='ipo', dpo_label_smoothing=.1), 'dpo_label_smoothing'),
    'history masked': ('kto', dict(mask_history=True), 'mask_history'),
}

@pytest.mark.parametrize('stage,changes,words', REFUSED.values(), ids=REFUSED.keys())
def test_what_llamafactory_s_parser_refuses_is_said(stage, changes, words, tiny, tmp_path):
    from qwen2vl_nb.checks import ask_llamafactory
    found = ask_llamafactory(_recipe(tiny, tmp_path, stage, [STAGES[stage](i) for i in range(4)], **changes))
    assert any(words in f'{f.where} {f.what}' and f.level == 'error' for f in found), found

def test_llamafactory_trains_other_losses_as_sigmoid():
    "Its own trainer without its set-up, on the numbers of four pairs."
    import torch
    from types import SimpleNamespace
    from llamafactory.train.dpo.trainer import CustomDPOTrainer
    def loss(name):
        trainer = object.__new__(CustomDPOTrainer)
        vars(trainer).update(loss_type=name, beta=.1, label_smoothing=0, reference_free=False, f_divergence_type='reverse_kl', bco_gemma=0, simpo_gamma=.5,
                             finetuning_args=SimpleNamespace(use_ref_model=name not in ('orpo', 'simpo')), accelerator=SimpleNamespace(device='cpu'))
        return trainer.compute_preference_loss(*torch.tensor([[-1., -2, -3, -4], [-4., -3, -2, -1], [-2.]*4, [-2.]*4]))[0].tolist()
    assert loss('hinge') == loss('ipo') == loss('sigmiod') == loss('sigmoid') != loss('simpo') != loss('orpo')

# --- runs

SHOWN = {'dpo': {'accuracy', 'rewards/chosen', 'rewards/rejected', 'rewards/margins', 'eval_rewards/margins', 'eval_rewards/accuracies'}, 'rm': {'eval_accuracy'}, 'kto': {'rewards/margins'}}
PANELS = {'dpo': ['loss', 'reward', 'accuracy'], 'rm': ['loss', 'accuracy'], 'kto': ['loss', 'reward']}

@pytest.mark.parametrize('stage', ['dpo', *(pytest.param(stage, marks=pytest.mark.soak) for stage in ('rm', *['kto']*TRAINS_KTO))])
def test_a_run_logs_its_rewards_and_they_are_drawn(stage, tiny, tmp_path):
    from qwen2vl_nb.run.loss import plot_loss, read_log
    from qwen2vl_nb.run.preview import read_previews, show_previews
    from qwen2vl_nb.run.start import launch
    rows = [STAGES[stage](i) for i in range(12)]
    recipe = _recipe(tiny, tmp_path, stage, rows, max_steps=4, logging_steps=2, val_size=4, eval_strategy='steps', eval_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    run = launch(recipe, preview=2, env={'QWEN2VL_NB_PREVIEW': '1'}).wait()
    assert run.status == 'done', run.failure
    assert SHOWN[stage] <= {*read_log(run)}
    assert [ax.get_ylabel() for ax in plot_loss(run).axes] == PANELS[stage]
    if stage == 'rm': assert [line['note'] for line in read_previews(run)] == ['At stage rm, there are no answers to show.'] and 'At stage rm' in str(show_previews(run))
    else:
        answered = [line for line in read_previews(run) if 'rows' in line]
        assert answered and all(row['label'] == GOOD and row['prompt'].startswith('What is') for row in answered[-1]['rows']), read_previews(run)
        assert any(row['predict'] for row in answered[-1]['rows'])
