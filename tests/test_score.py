"""Scores and comparisons.

What the figures must be is said by others: LLaMA-Factory's own metric, scipy, and counting in another way."""
import json, random, re
from collections.abc import Sequence
from weakref import WeakSet

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from qwen2vl_nb.prediction.scores import compare, is_right, score

def rows_of(pairs):
    "Rows of (label, prediction) pairs."
    return [dict(id=i, row=i, images=[], prompt='<image>?', label=label, predict=predict)
            for i,(label, predict) in enumerate(pairs)]

# As LLaMA-Factory

ODD = [('The truck is yellow.', 'The truck is yellow.'), ('The bus is red.', 'A green bus, isn\'t it?'),
       ('一辆蓝色的小车停在门口。', '一辆红色的小车停在门口。'), ('白色的卡车', 'The 白色 truck 卡车！'),
       ('nothing', ''), ('blank', ' \n '), ('.', '.'), ('a', 'b'), ('ab', 'ab'), ('…？！', '。。。'),
       ('{"item": "car", "color": "red"}', '{"item":"car","color":"red"}'), ('{"价格": 12.5}', '{"价格": 12.50}'),
       ('ends with a newline\n', 'ends with a newline\n'), ('  indented', 'indented'),
       ('cafe\u0301 au lait', 'caf\u00e9 au lait'), ('🚗🚙', '🚙🚗'),
       ('第一句。第二句！第三句？', '第二句！第一句。第四句？'), ('tabs\tand\nlines\n\nof text', 'tabs and lines of text'),
       ('<b>bold</b> & "quoted"', '<b>bold</b>'), ('a b c d e f g ' * 20, 'g f e d c b a ' * 15)]

@pytest.fixture(scope='module')
def metric(tiny):
    "LLaMA-Factory's own figures of (label, prediction) pairs, by row and overall, from token ids."
    from llamafactory.extras.constants import IGNORE_INDEX
    from llamafactory.train.sft.metric import ComputeSimilarity
    from transformers import AutoTokenizer, EvalPrediction
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    def padded(texts, fill):
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        return np.array([[fill, fill, *i, *[fill]*(max(map(len, ids)) - len(i))] for i in ids])
    def figures(pairs):
        labels = padded([f'{label}<|im_end|>\n' for label,_ in pairs], IGNORE_INDEX)
        answers = padded([f'{answer}<|im_end|>' for _,answer in pairs], tokenizer.pad_token_id)
        compute = ComputeSimilarity(tokenizer)
        compute(EvalPrediction(answers, labels), compute_result=False)
        by_row = {name: list(values) for name,values in compute.score_dict.items()}
        return by_row, compute(EvalPrediction(answers, labels))  # which adds the rows once more: the same means
    return figures

def test_bleu_and_rouge_are_llamafactorys(metric):
    by_row, means = metric(ODD)
    ours = score(rows_of(ODD))
    for name in ('bleu-4', 'rouge-1', 'rouge-2', 'rouge-l'):
        assert ours.rows[name].tolist() == pytest.approx(by_row[name], abs=1e-9), name
        assert ours[name] == pytest.approx(means[name], abs=1e-6), name
    assert 20 < ours['rouge-l'] < 90, 'the texts tell good from bad'

def test_bleu_and_rouge_of_many_random_texts(metric):
    rng = random.Random(1)
    words = ['red', 'car', '卡车', '的', '。', 'truck', '12', ',', '!', '蓝色']
    text = lambda least: rng.choice(['', ' ']).join(rng.choices(words, k=rng.randint(least, 12)))
    pairs = [(text(1), text(0)) for _ in range(150)]
    means, ours = metric(pairs)[1], score(rows_of(pairs))
    assert {k: ours[k] for k in means} == pytest.approx(means, abs=1e-6)

def test_answers_with_hundreds_of_boxes_are_scored():
    "A table with an entry for each pair of words would have 80 million of them."
    rng, n = random.Random(2), 600
    boxes = [{'bbox_2d': rng.choices(range(1000), k=4), 'label': 'car'} for _ in range(n)]
    s = score(rows_of([(json.dumps(boxes[:n//2]), json.dumps(boxes))]))
    assert s['rouge-l'] == pytest.approx(100*2*.5/1.5, abs=.1), 'half of the words, in their order'

# Which rows count

def test_rows_that_failed_are_wrong_and_rows_without_a_label_are_left_out():
    rows = rows_of([('a', 'a'), ('', None), ('a', None), (None, 'a'), ('a', ' a\n')])
    s = score(rows, measures={'long': lambda row: len(row['predict'])})
    assert (s['rows'], s['failed'], s['exact'], s['long']) == (4, 2, 50, (1 + 3)/4)
    assert list(s.rows.index) == [0, 1, 2, 4]
    assert s.rows.loc[2, ['exact', 'bleu-4', 'rouge-1', 'rouge-2', 'rouge-l']].eq(0).all()
    assert '1 more without a label' in repr(s) and '2 of them failed' in repr(s)
    assert not is_right(rows[1]), 'an empty label is not what a row that failed has said'

@pytest.mark.parametrize('rows, said', [
    ([], 'no predictions'),
    ([dict(label='a')], 'Row 0 is not a prediction'),
    (['text'], 'Row 0 is not a prediction'),
    ([dict(id='x', label=3, predict='3')], 'Row x: its label is 3, not text'),
    (rows_of([(None, 'a')]*3), 'None of the 3 rows has a label')])
def test_what_cannot_be_scored_is_said(rows, said):
    with pytest.raises(ValueError, match=re.escape(said)): score(rows)

def test_own_measures():
    rows = rows_of([('a', 'a'), ('b', 'bb')])
    own = {'ratio': lambda row: len(row['predict'])/len(row['label']), 'is b': lambda row: row['label'] == 'b'}
    s = score(rows, measures=own)
    assert (s['ratio'], s['is b']) == (1.5, .5) and s.rows['ratio'].tolist() == [1, 2]
    assert set(own) <= set(s.overall.index)

@pytest.mark.parametrize('f, said', [
    (lambda row: row['nix'], "Measure 'f', row 0: KeyError"),
    (lambda row: 1/(row['id'] - 1), "Measure 'f', row 1: ZeroDivisionError"),
    (lambda row: 'good', "gave 'good'"),
    (lambda row: float('nan'), 'gave nan')])
def test_own_measures_that_fail_say_where(f, said):
    rows = rows_of([('a', 'a'), ('b', 'bb')])
    with pytest.raises(ValueError, match=re.escape(said)): score(rows, measures={'f': f})

# JSON

def test_fields_are_counted_as_pairs_are():
    "Against another way to count: pairs of field and value that labels and answers have in common."
    rng, names = random.Random(2), ['a', 'b', 'c', 'd']
    some = lambda k: {n: rng.choice([1, 2, 'x', None, [1, 2]]) for n in rng.sample(names, k)}
    answer = lambda: some(rng.randint(0, 4)) if rng.random() < .9 else None
    pairs = [(some(rng.randint(0, 3)), answer()) for _ in range(300)]
    s = score(rows_of([(json.dumps(w), 'no JSON' if g is None else json.dumps(g)) for w,g in pairs]))
    for name, fields in [(n, [n]) for n in names] + [('(all)', names)]:
        part = lambda said: {f: json.dumps(v) for f,v in said.items() if f in fields}
        wanted = {(i, *item) for i,(w,_) in enumerate(pairs) for item in part(w).items()}
        got = {(i, *item) for i,(_,g) in enumerate(pairs) if g for item in part(g).items()}
        precision, recall = len(wanted & got)/len(got), len(wanted & got)/len(wanted)
        line = s.fields.loc[name]
        assert line.support == len(wanted)
        f1 = 200*precision*recall/(precision + recall)
        assert [line.precision, line.recall, line.f1] == pytest.approx([100*precision, 100*recall, f1])
        right = 100*np.mean([g is not None and part(w) == part(g) for w,g in pairs])
        assert line.accuracy == pytest.approx(right)
        assert s['json' if name == '(all)' else f'field.{name}'] == pytest.approx(right)
    assert s['malformed'] == pytest.approx(100*np.mean([g is None for _,g in pairs]))

@pytest.mark.parametrize('answer, right, malformed', [
    ('{"a": 1, "b": "x"}', 1, 0), ('{"b": "x", "a": 1.0}', 1, 0), ('```json\n{"a": 1, "b": "x"}\n```', 1, 0),
    ('{"a": 1, "b": "X"}', 0, 0), ('{"a": true, "b": "x"}', 0, 0), ('{"a": "1", "b": "x"}', 0, 0),
    ('{"a": 1, "b": "x", "c": 2}', 0, 0), ('{}', 0, 0), ('{"a": 1, "b": "x"', 0, 1), ("{'a': 1}", 0, 1),
    ('{"a": NaN, "b": "x"}', 0, 1), ('[1]', 0, 1), ('', 0, 1), (None, 0, 1), ('{"a":' * 2000, 0, 1),
    ('{"a": 1e99999999999999999999, "b": "x"}', 0, 1), ('{"a": ' + '9'*9999 + ', "b": "x"}', 0, 1)])
def test_kinds_of_answers(answer, right, malformed):
    s = score(rows_of([('{"a": 1, "b": "x"}', answer)]))
    assert (s['json'], s['malformed']) == (100*right, 100*malformed)

def test_tolerance():
    answers = ('{"km": 12.6, "box": [1, {"x": 2}]}', '{"km": 12.5, "box": [1.1, {"x": 1.9}]}',
               '{"km": 12.61, "box": [1, {"x": 2}]}')
    rows = rows_of([('{"km": 12.5, "box": [1, {"x": 2.0}]}', answer) for answer in answers])
    assert score(rows)['json'] == 0
    s = score(rows, tolerance=.1)
    assert s.rows['field.km'].tolist() == [100, 100, 0] and s['field.box'] == 100
    numbers = rows_of([('1', '1.10'), ('-3', '-3'), ('2', 'two'), ('1e3', '1000')])
    assert score(numbers)['number'] == 50 and score(numbers, tolerance=.1)['number'] == 75
    for wrong in (-1, float('nan'), float('inf')):
        with pytest.raises(ValueError, match='give a number that is at least 0'): score(numbers, tolerance=wrong)

@pytest.mark.parametrize('pairs', [[('12.5 km', '12.5 km')], [('1', '1'), ('one', 'one')], [('{"a": 1}', '1')]])
def test_what_is_not_all_numbers_is_not_compared_as_such(pairs): assert 'number' not in score(rows_of(pairs))

def test_fields_that_are_too_many_have_no_columns_but_lines():
    cards = [json.dumps({f'key {i}': i}) for i in range(30)]
    s = score(rows_of(zip(cards, cards)))
    assert not [c for c in s.rows if c.startswith('field.')] and len(s.fields) == 31 and s['json'] == 100

def test_labels_that_are_not_all_objects_are_named():
    s = score(rows_of([('{"a": 1}', ''), ('red', '')]))
    said = "1 of 2 labels are not JSON objects, the first that of row 1: 'red'"
    with pytest.raises(ValueError, match=said): s.fields

# Intervals and columns

def coins(rng, n, share): return rows_of([('a', 'a' if x else 'b') for x in rng.random(n) < share])

def test_intervals_are_scipys():
    rows = coins(np.random.default_rng(3), 60, .7)
    score_of = lambda: score(rows, measures={'graded': lambda row: row['id'] % 7})
    s, ends = score_of(), ['low', 'high']
    theirs = stats.bootstrap((s.rows['graded'].to_numpy(),), np.mean, n_resamples=1000, method='percentile',
                             rng=np.random.default_rng(0)).confidence_interval
    assert s.overall.loc['graded', ends].tolist() == pytest.approx(list(theirs))
    n = sum(row['predict'] == 'a' for row in rows)
    wilson = stats.binomtest(n, 60).proportion_ci(method='wilson')
    assert s.overall.loc['exact', ends].tolist() == pytest.approx([100*wilson.low, 100*wilson.high])
    assert s.overall.loc['exact', 'value'] == s['exact']
    assert score_of().overall.equals(s.overall), 'the same each time'

def test_few_right_answers_do_not_look_less_certain_than_none():
    "Wilson's interval grows with the share, so that a measure of 5 % does not end lower than one of 0 %."
    some, none = (score(rows_of([('a', 'a' if i < n else 'b') for i in range(20)])).overall.loc['exact'] for n in (1, 0))
    assert some.high > none.high > 10 and some.low > none.low == 0

def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(4)
    lines = [score(coins(rng, 60, .6)).overall.loc['exact'] for _ in range(100)]
    assert 88 <= sum(line.low <= 60 <= line.high for line in lines) <= 100

def test_intervals_of_rows_that_are_alike_and_of_one():
    "A share of all or none is not a point."
    for answer, k in (('a', 5), ('b', 0)):
        wilson = stats.binomtest(k, 5).proportion_ci(method='wilson')
        assert score(rows_of([('a', answer)]*5)).overall.loc['exact'].tolist() == pytest.approx([20*k, 100*wilson.low, 100*wilson.high])
    assert score(rows_of([('a', 'a')])).overall.loc['exact', ['low', 'high']].isna().all()

@pytest.fixture(scope='module')
def cards():
    rng = random.Random(5)
    colours = rng.choices(['red', 'blue', '绿'], k=80)
    card = lambda colour: json.dumps({'color': colour})
    rows = [r | {'camera': rng.choice(['n', 's']), 'tags': [rng.randint(0, 1)]}
            for r in rows_of([(card(c), card(rng.choice([c, 'red']))) for c in colours])]
    rows[3]['label'] = None
    return rows

@pytest.mark.parametrize('column, value_of', [
    ('camera', lambda r: r['camera']),
    ('label.color', lambda r: json.loads(r['label'])['color']),
    ('tags', lambda r: json.dumps(r['tags']))])
def test_by_is_the_score_of_the_part(cards, column, value_of):
    table = score(cards).by(column)
    for value in table.index:
        part = score([r for r in cards if r['label'] and value_of(r) == value])
        names = [k for k in part.rows if k != 'id']
        assert table.loc[value, ('rows', '')] == part['rows']
        assert [table.loc[value, (k, 'value')] for k in names] == pytest.approx([part[k] for k in names])
        assert table.loc[value, ('json', 'low')] <= part['json'] <= table.loc[value, ('json', 'high')]
    assert table['json', 'value'].is_monotonic_increasing and table['rows'].sum() == 79

def test_by_takes_functions_and_values(cards):
    s, cameras = score(cards), [r['camera'] for r in cards]
    for same in (lambda r: r['camera'], cameras, pd.Series(cameras)):
        assert s.by(same).to_numpy() == pytest.approx(s.by('camera').to_numpy(), nan_ok=True)
    for column, said in (('colour', "no column 'colour'; available: id, row"),
                         ('label.item', 'tags, label.color'), ([1], '1 values for 80 rows')):
        with pytest.raises(ValueError, match=re.escape(said)): s.by(column)

def test_scores_are_a_dict_of_their_figures():
    s = score(rows_of([('a', 'a'), ('b', 'c')]))
    assert pd.DataFrame({'before': s, 'after': s}).loc['exact'].tolist() == [50, 50]
    assert json.loads(json.dumps(s))['rows'] == 2 and list(s)[:2] == ['rows', 'failed']

# Comparison

def test_mcnemar():
    first = rows_of([('a', 'a' if i < 36 else 'b') for i in range(100)])
    second = rows_of([('a', 'a' if i < 93 and i else f'c {i}') for i in range(100)])
    c = compare(first, second[::-1])
    assert repr(c).startswith('exact: 36 of 100 right before, 92 after, +56.0 points (')
    assert repr(c).endswith('); 57 better, 1 worse; p = 4.1e-16 (exact McNemar)')
    assert c.p == stats.binomtest(57, 58).pvalue and c.table.to_numpy().tolist() == [[35, 1], [57, 7]]
    assert c.changed.what.value_counts().to_dict() == {'better': 57, 'other wrong': 7, 'worse': 1}
    line = c.changed.set_index('id').loc[0, ['label', 'before', 'after', 'change']]
    assert line.tolist() == ['a', 'a', 'c 0', -100] and [(r['id'], r['predict']) for r in c.worse] == [(0, 'c 0')]
    assert c.difference['low'] < 56 < c.difference['high']

@pytest.mark.parametrize('n', [2, 30, 100])
def test_a_change_of_all_rows_is_not_certain(n):
    wrong, right = (rows_of([('a', answer)]*n) for answer in 'ba')
    least = 200*.025**(1/n) - 100
    found, back = compare(wrong, right).difference, compare(right, wrong).difference
    assert [found[k] for k in ('value', 'low', 'high')] == pytest.approx([100, least, 100]) and least < 97
    assert [back[k] for k in ('value', 'low', 'high')] == pytest.approx([-100, -100, -least])

@pytest.mark.parametrize('same', [0, 5, 200])
def test_the_interval_of_a_difference_says_what_its_test_says(same):
    "Whatever the numbers of rows that got better and worse, the interval has 0 in it if p is above 0.05, and only then."
    said = set()
    for better in range(12):
        for worse in range(12):
            if not same + better + worse: continue
            first = rows_of([('a', 'b')]*(same + better) + [('a', 'a')]*worse)
            second = rows_of([('a', 'b')]*same + [('a', 'a')]*better + [('a', 'b')]*worse)
            c = compare(first, second)
            low, value, high = (c.difference[k] for k in ('low', 'value', 'high'))
            assert low <= value <= high and (low <= 0 <= high) == (c.p > .05), (better, worse, c)
            said.add(c.p > .05)
    assert said == {True, False}

def test_permutation():
    rng = random.Random(6)
    labels = [' '.join(rng.choices('red blue car truck bus van'.split(), k=6)) for _ in range(12)]
    spoilt = lambda text, noise: ' '.join('no' if rng.random() < noise else word for word in text.split())
    first, second = (rows_of([(label, spoilt(label, noise)) for label in labels]) for noise in (.5, .3))
    c = compare(first, second, 'rouge-1')
    d = (score(second).rows['rouge-1'] - score(first).rows['rouge-1']).to_numpy()
    signs = np.array(np.meshgrid(*[[-1, 1]]*len(d))).reshape(len(d), -1)
    sums = d @ signs  # all of them, as there are few rows
    p = 2*min(np.mean(sums >= d.sum() - 1e-9), np.mean(sums <= d.sum() + 1e-9))
    assert c.p == pytest.approx(p, rel=.02) and .001 < p < .9 and c.test == 'paired permutation'
    assert c.difference['value'] == pytest.approx(d.mean())
    assert c.table['rows'].tolist() == [sum(d < 0), sum(d == 0), sum(d > 0)]

def test_rows_that_do_not_match_are_named():
    rows = rows_of([('a', 'a')]*12)
    other = [r | {'label': 'b'} if r['id'] == 2 else r for r in rows]
    same = [r | {'id': 1, 'row': 1} for r in rows]
    for second, said in ((rows[9:], '9 of the first are not in the second (0, 1, 2, 3, 4, and 4 more). Compare'),
                         (other, '1 row(s) have another label in the second (2)'),
                         (same, 'Neither `id` nor `row`')):
        with pytest.raises(ValueError, match=re.escape(said)): compare(rows, second)
    assert compare([r | {'id': 'same'} for r in rows], rows).p == 1, 'the rows\' numbers tell them apart'
    with pytest.raises(ValueError, match='no measure'): compare(rows, rows, 'malformed')

def test_compare_holds_few_rows_in_memory():
    "Of predictions that are read when they are accessed, no more than the rows at hand are held, in whatever order the second one is."
    class Row(dict): __hash__ = object.__hash__
    alive, most = WeakSet(), [0]
    class Rows(Sequence):
        def __init__(self, order): self.order = order
        def __len__(self): return len(self.order)
        def __getitem__(self, k):
            alive.add(row := Row(id=self.order[k], label='a', predict='a'))
            most[0] = max(most[0], len(alive))
            return row
    assert compare(Rows(range(500)), Rows(range(499, -1, -1))).after == 100
    assert most[0] < 10, most

def test_thoughts_are_left_out_where_the_label_has_none():
    "A thinking model that LLaMA-Factory trained on plain labels begins each answer with an empty thought, because its template adds one to the label."
    box, other = '[{"bbox_2d": [1, 2, 3, 4], "label": "car"}]', '[{"bbox_2d": [5, 6, 7, 8], "label": "car"}]'
    for label in ('A red car.', '{"color": "red"}', '7', box):
        plain, thought = ([{'id': i, 'label': label, 'predict': f'{before}{label}', 'box_frame': [1000, 1000]} for i in range(3)]
                          for before in ('', f'<think>\nIt may be {other} or {{"color": "blue"}}.\n</think>\n\n'))
        assert score(thought).overall.equals(score(plain).overall) and score(thought)['exact'] == 100
    kept = {'id': 0, 'label': '<think>\nRed.\n</think>\n\nA car.', 'predict': '<think>\nBlue.\n</think>\n\nA car.'}
    assert score([kept])['exact'] == 0, 'a label with thoughts is compared as a whole'
    assert score([kept | {'label': 'A car.', 'predict': '<think>\nA car.'}])['exact'] == 0, 'an answer that ended within its thoughts'
