"Rows in memory: read like files, with the same findings; their pictures go to a folder that the user names; bad input gets clear words."
import hashlib, io, json, os, subprocess, sys
from collections import namedtuple
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from enum import Enum
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs

import datasets, numpy as np, pandas as pd, pyarrow as pa, pytest, torch
from PIL import Image

from conftest import COMMIT, HubHandler
from qwen2vl_nb.data.check import check_samples
from qwen2vl_nb.data.registry import Registry, dataset_samples
from qwen2vl_nb.data.sources import read_samples
from qwen2vl_nb.prediction.engines import predict
from qwen2vl_nb.recipe import predict_recipe

WORDS = ['A red car', '一辆蓝色的车', 'A red car', '007']
COLOURS = ['crimson', 'royalblue', 'crimson', 'gold']

def _pictures(): return [Image.new('RGB', (112, 84), colour) for colour in COLOURS]

def _png(picture):
    picture.save(out := io.BytesIO(), 'PNG')
    return out.getvalue()

def _table(pictures): return {'image': pictures, 'question': ['What is this?']*4, 'answer': WORDS, 'car': [17, 18, 19, 20]}

def _rows(pictures): return [dict(zip(_table(pictures), cells)) for cells in zip(*_table(pictures).values())]

def _data_set(pictures): return datasets.Dataset.from_dict(_table(pictures), features=datasets.Features(
    {'image': datasets.Image(), 'question': datasets.Value('string'), 'answer': datasets.Value('string'), 'car': datasets.Value('int64')}))

def _talks(pictures): return [{'messages': [{'role': 'user', 'content': [{'type': 'image', 'image': im}, {'type': 'text', 'text': 'What is this?'}]},
                                            {'role': 'assistant', 'content': [{'type': 'text', 'text': words}]}], 'car': car} for im, words, car in zip(pictures, WORDS, range(17, 21))]

SOURCES = { # name → what is read
    'a DataFrame of pictures': lambda: pd.DataFrame(_table(_pictures())),
    'a DataFrame of bytes': lambda: pd.DataFrame(_table([*map(_png, _pictures())])),
    'a DataFrame of dicts': lambda: pd.DataFrame(_table([{'bytes': _png(im), 'path': 'x/y.png'} for im in _pictures()])),
    'a DataFrame with another index': lambda: pd.DataFrame(_table(_pictures()), index=list('wxyz')),
    'a DataFrame whose named index is a column': lambda: pd.DataFrame(_table(_pictures())).set_index('car'),
    'a DataFrame with two index levels': lambda: pd.DataFrame(_table(_pictures())).set_index(['car', 'question']),
    'a DataFrame filtered and turned round': lambda: pd.concat([pd.DataFrame(_table(_pictures()))]*2).iloc[::-1].iloc[:4].iloc[::-1],
    'a DataFrame of categoricals and arrow text': lambda: pd.DataFrame(_table(_pictures())).astype({'answer': 'category', 'question': 'string[pyarrow]', 'car': 'Int64'}),
    'a DataFrame of Arrow': lambda: pa.table(_table([*map(_png, _pictures())])).to_pandas(types_mapper=pd.ArrowDtype),
    'lists of pictures in cells': lambda: pd.DataFrame(_table([[im] for im in _pictures()])),
    'a list of dicts': lambda: _rows(_pictures()),
    'a tuple of dicts with NumPy values': lambda: tuple(row | {'car': np.int16(row['car']), 'answer': np.str_(row['answer'])} for row in _rows(_pictures())),
    'a Dataset': lambda: _data_set(_pictures()),
    'a Dataset selected and formatted': lambda: _data_set(_pictures()*1).select([3, 2, 1, 0]).select([3, 2, 1, 0]).with_format('numpy'),
    'a DatasetDict of one split': lambda: datasets.DatasetDict({'all': _data_set(_pictures())}),
    'an Arrow table': lambda: pa.table(_table([*map(_png, _pictures())])),
    'an Arrow table as polars gives it': lambda: pa.table({'image': pa.array([*map(_png, _pictures())], pa.binary_view()), 'question': pa.array(['What is this?']*4, pa.string_view()),
        'answer': pa.array(WORDS, pa.large_string()).dictionary_encode(), 'car': pa.array([17, 18, 19, 20])}),
    'dialogues with pictures in their parts': lambda: _talks(_pictures()),
    'a Dataset of dialogues': lambda: datasets.Dataset.from_list([{'image': _png(im), **talk, 'messages': [{'role': t['role'], 'content': [{'type': p['type'], 'text': p.get('text')} for p in t['content']]} for t in talk['messages']]}
                                                              for im, talk in zip(_pictures(), _talks(_pictures()))]),
}

@pytest.mark.parametrize('make', SOURCES.values(), ids=SOURCES.keys())
def test_from_memory_to_llamafactory(make, factory, tiny, tmp_path, capsys):
    "Whatever the rows are kept in, LLaMA-Factory loads the same questions, answers and pixels."
    samples = read_samples(make(), media_dir=tmp_path/'pictures')
    assert '4 rows of ' in capsys.readouterr().out and len(list((tmp_path/'pictures').iterdir())) == 3, 'equal pictures once'
    assert [s['car'] for s in samples] == [17, 18, 19, 20] and not len(check_samples(samples, model=tiny).query("level in ('error', 'warning')"))
    Registry(tmp_path).add('cars', samples)
    loaded = factory.load(tmp_path, 'cars')
    assert [r['_prompt'][-1]['content'] for r in loaded] == ['<image>What is this?']*4 and [r['_response'][0]['content'] for r in loaded] == WORDS
    for row, picture in zip(loaded, _pictures()):
        with Image.open(row['_images'][0]) as im: assert im.tobytes() == picture.tobytes()
    assert read_samples(samples) == samples == [dict(s) for s in read_samples(make(), media_dir=tmp_path/'pictures')], 'samples come through unchanged, and the same pictures have the same names'

def test_the_rows_of_a_data_set_are_those_of_its_transform():
    rows = datasets.Dataset.from_list([{'question': 'q', 'answer': 3}]).with_transform(lambda batch: batch | {'answer': [f'{n} cars' for n in batch['answer']]})
    assert [s['output'] for s in read_samples(rows)] == ['3 cars']

def test_cells_of_all_dtypes():
    frame = pd.DataFrame({'question': ['q']*2, 'answer': pd.Categorical(['yes', None]), 'f32': np.array([1.5, np.nan], 'float32'), 'flag': pd.array([True, pd.NA], 'boolean'),
        'when': pd.to_datetime(['2026-03-01 10:00', None]), 'day': [date(2026, 3, 1), pd.NaT], 'price': [Decimal('1.50'), None], 'box': [np.array([1, 2, 3, 4]), None], 'text': [b'caf\xc3\xa9', None],
        'path': [Path('a/b.txt'), None], 'nested': [{'a': (1, np.float64('nan')), 2: [pd.NA]}, []], 'arrow': pd.array([['a', 'b'], None], pd.ArrowDtype(pa.list_(pa.string()))),
        'sparse': pd.arrays.SparseArray([0, 1]), 'period': pd.array([pd.Timedelta('1h'), pd.NaT])})
    one, two = read_samples(frame)
    assert one | {'box': one['box']} == {'f32': 1.5, 'flag': True, 'when': '2026-03-01 10:00:00', 'day': '2026-03-01', 'price': '1.50', 'box': [1, 2, 3, 4], 'text': 'café', 'path': 'a/b.txt',
        'nested': {'a': [1, None], '2': [None]}, 'arrow': ['a', 'b'], 'sparse': 0, 'period': '0 days 01:00:00', 'images': [], 'instruction': 'q', 'input': '', 'output': 'yes'}
    assert two['output'] == '' and [k for k, v in two.items() if v is None] == ['f32', 'flag', 'when', 'day', 'price', 'box', 'text', 'path', 'arrow', 'period']
    json.dumps([one, two], allow_nan=False)

def test_an_empty_cell_is_the_same_fault_in_a_table_and_in_its_file(tmp_path, monkeypatch):
    "pandas reads empty cells as NaN; a number that is missing is not made a text."
    monkeypatch.chdir(tmp_path)
    pd.DataFrame({'question': ['q', 'r', 's'], 'answer': ['yes', None, 'no'], 'n': [1, None, 3]}).to_excel('t.xlsx', index=False)
    told = [check_samples(read_samples(source))[['row', 'field', 'what', 'level']].to_numpy().tolist() for source in ('t.xlsx', pd.read_excel('t.xlsx'))]
    assert told[0] == told[1] and told[0][0][1:] == ['output', 'The answer is empty.', 'warning']
    assert read_samples(pd.read_excel('t.xlsx'))[1]['n'] is None

def test_columns_of_one_name_are_all_kept(capsys):
    frame = pd.DataFrame([['q', 'a', 1, 2]], columns=['question', 'answer', 'note', 'note'])
    assert [read_samples(t)[0]['note.1'] for t in (frame, pa.Table.from_arrays([[x] for x in ('q', 'a', 1, 2)], names=[*frame.columns]))] == [2, 2]
    assert "'note' occurs more than once" in capsys.readouterr().out

def test_pictures_of_every_mode_are_seen_as_those_of_files_are(tiny, tmp_path):
    "A picture that can be saved as it is gives the same finding as its file: 16 bits, transparency, orientation, tiny ones."
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((60, 40), 50).save(tmp_path/'turned.jpg', exif=exif)
    Image.effect_noise((60, 40), 50).convert('CMYK').save(tmp_path/'cmyk.tif')
    Image.effect_noise((60, 40), 50).convert('F').save(tmp_path/'float.tif')
    Image.fromarray(np.arange(2400, dtype='uint16').reshape(40, 60)*20).save(tmp_path/'deep.png')
    Image.new('RGBA', (60, 40), (255, 0, 0, 90)).save(tmp_path/'clear.png')
    Image.new('RGB', (600, 2)).save(tmp_path/'long.png')
    files = sorted(p for p in tmp_path.iterdir())
    rows = [{'image': str(p), 'question': 'What?', 'answer': 'x'} for p in files]
    drawn = [row | {'image': Image.open(row['image'])} for row in rows]
    seen = [check_samples(read_samples(r, media_dir=tmp_path/'drawn'), model=tiny) for r in (rows, drawn)]
    assert list(seen[0].row) == list(seen[1].row) and list(seen[0].level) == list(seen[1].level) and list(seen[0].cure) == list(seen[1].cure) and len({*seen[0].row}) >= 4

def test_the_same_findings_as_for_a_file(tiny, tmp_path):
    rows = [{'image': 'gone.png', 'question': 'q', 'answer': 'a'}, {'image': '', 'question': 'q', 'answer': None}, {'question': '', 'answer': 7}, {'image': None, 'question': '<image>q', 'answer': 'a<|im_end|>'}]
    (tmp_path/'rows.json').write_text(json.dumps(rows))
    from_file, from_list, from_frame = (check_samples(read_samples(s), model=tiny) for s in (tmp_path/'rows.json', rows, pd.DataFrame(rows, index=[9, 9, 8, 7]).fillna({'image': ''})))
    assert from_file.equals(from_list) and len(from_file) >= 5 and list(from_file.what) == list(from_frame.what)

def test_no_file_is_replaced(tmp_path):
    row = {'image': Image.new('RGB', (60, 40)), 'question': 'q', 'answer': 'a'}
    first = Path(read_samples([row], media_dir=tmp_path)[0]['images'][0])
    first.write_text('mine')
    second, third = (Path(read_samples([row], media_dir=tmp_path)[0]['images'][0]) for _ in range(2))
    assert first.read_text() == 'mine' and second == third != first and Image.open(second).size == (60, 40)
    (tmp_path/'link').symlink_to(tmp_path/'real')
    (tmp_path/'real').mkdir()
    assert read_samples([row], media_dir=tmp_path/'link')[0]['images'] == [str(tmp_path/'real'/first.name)]

def test_paths_are_looked_up_in_the_folder_that_is_named(tmp_path):
    _pictures()[0].save(tmp_path/'a.png')
    sample, = read_samples([{'image': 'a.png', 'question': 'q', 'answer': 'a'}], media_dir=tmp_path)
    assert sample['images'] == [str(tmp_path/'a.png')] and len(list(tmp_path.iterdir())) == 1

def test_lists_of_samples_come_through_unchanged():
    faulty = [{'instruction': 'q', 'images': ['a.png'], 'output': 7}, {'messages': 'x'}]
    sound = [{'images': ['a.png'], 'instruction': '<image>q', 'output': 'a', 'n': float('inf')}, {'messages': [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}]}]
    assert all(a is b for a, b in zip(read_samples(sound), sound))
    from qwen2vl_nb.data.sources import given_samples
    assert given_samples(faulty, None) == faulty and given_samples(iter(sound), None) == sound

def test_samples_kept_in_a_table_come_back_as_they_were(tmp_path):
    _pictures()[0].save(tmp_path/'a.png')
    questions = [{'images': [str(tmp_path/'a.png')], 'instruction': '<image>q', 'input': '', 'output': 'a', 'n': 1}]
    talks = [{'images': [str(tmp_path/'a.png')], 'messages': [{'role': 'user', 'content': '<image>q'}, {'role': 'assistant', 'content': 'a'}]}]
    for samples in (questions, talks):
        assert read_samples(pd.DataFrame(samples)) == read_samples(datasets.Dataset.from_list(samples)) == read_samples(pa.Table.from_pylist(samples)) == samples
    paths = datasets.Dataset.from_dict({'image': [str(tmp_path/'a.png')], 'question': ['q'], 'label': [1]},
        features=datasets.Features({'image': datasets.Image(), 'question': datasets.Value('string'), 'label': datasets.ClassLabel(names=['car', 'bus'])}))
    assert read_samples(paths, response='label') == [{'images': [str(tmp_path/'a.png')], 'instruction': '<image>q', 'input': '', 'output': 'bus'}], 'pictures that are files stay where they are'

def test_a_table_is_no_list_of_samples():
    for table in (pd.DataFrame([_row()]), _splits()['test'], pa.table({'question': ['q']})):
        with pytest.raises(TypeError, match='not files or tables: check_samples'): check_samples(table)

def test_the_registry_takes_the_same(factory, tmp_path):
    for name, source in (('frame', pd.DataFrame(_table(_pictures()))), ('set', _data_set(_pictures())), ('rows', _rows(_pictures())), ('arrow', pa.table(_table([*map(_png, _pictures())])))):
        Registry(tmp_path).add(name, source, file_name=f'{name}/train.json')
        assert [r['_response'][0]['content'] for r in factory.load(tmp_path, name)] == WORDS
        assert len(list((tmp_path/name/'train_media').iterdir())) == 3 and all(p.startswith(f'{name}/train_media/') for row in json.loads((tmp_path/name/'train.json').read_text()) for p in row['images'])
    assert [s['car'] for s in dataset_samples(Registry(tmp_path), 'frame')] == [17, 18, 19, 20]

def test_nothing_is_written_for_a_name_that_is_taken(tmp_path):
    (tmp_path/'dataset_info.json').write_text('{"cars": {"hf_hub_url": "me/cars"}}')
    with pytest.raises(ValueError, match='is taken'): Registry(tmp_path).add('cars', _rows(_pictures()))
    assert [p.name for p in tmp_path.rglob('*.*') if p.name != '.dataset_info.lock'] == ['dataset_info.json']

def test_no_picture_is_written_for_a_file_that_is_refused(tmp_path):
    (tmp_path/'cars.json').write_text('mine')
    with pytest.raises(FileExistsError, match='was not written by this package'): Registry(tmp_path).add('cars', _rows(_pictures()))
    with pytest.raises(ValueError, match="media='move'"): Registry(tmp_path).add('others', pd.DataFrame(_table(_pictures())), media='move')
    assert [p.name for p in tmp_path.rglob('*.*')] == ['cars.json'] and (tmp_path/'cars.json').read_text() == 'mine'
    Registry(tmp_path).add('cars', _rows(_pictures()), overwrite=True)
    assert Registry(tmp_path).add('cars', _rows(_pictures())) and len(list((tmp_path/'cars_media').iterdir())) == 3, 'what it wrote itself is replaced'

def test_predict_takes_the_same(tiny, tmp_path):
    "Questions without answers; asked again, the same pictures are the same question."
    asked = _data_set(_pictures()).remove_columns('answer')
    recipe = predict_recipe(tiny, output_dir=tmp_path/'answers', max_new_tokens=4)
    found = predict(recipe, asked)
    assert [r['car'] for r in found] == [17, 18, 19, 20] and all(r['predict'] and r['label'] is None for r in found) and found[0]['predict'] == found[2]['predict']
    assert len({r['images'][0] for r in found}) == 3 and all(Path(r['images'][0]).is_relative_to(tmp_path/'answers') for r in found)
    assert list(predict(recipe, asked.to_pandas())) == list(found)

def _snapshot(folder): return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in folder.rglob('*') if p.name != '.asked.lock'}

def test_another_question_leaves_nothing(tiny, tmp_path):
    "What belongs to the first question stays, even a picture that is in both."
    recipe = predict_recipe(tiny, output_dir=tmp_path/'answers', max_new_tokens=4)
    first = [{'image': im, 'question': 'What is this?'} for im in _pictures()[:2]]
    predict(recipe, first)
    before = _snapshot(tmp_path/'answers')
    for other in (_rows(_pictures()), [row | {'question': 'What else?'} for row in first], [{'image': Image.new('RGB', (60, 40)), 'question': 'What is this?'}]*2):
        with pytest.raises(ValueError, match='another question'): predict(recipe, other)
        assert _snapshot(tmp_path/'answers') == before

def test_rows_that_are_refused_leave_nothing(tiny, tmp_path):
    "Pictures of the rows before have been written by then."
    talks = [*_talks(_pictures()), {'messages': [{'role': 'user', 'content': [{'type': 'sound', 'sound': 'x'}]}]}]
    for rows, more in ((talks, {}), (_rows(_pictures()), {'response': 'anser'}), ([{'frage': 'q', 'bild': im} for im in _pictures()], {})):
        with pytest.raises(ValueError): read_samples(rows, media_dir=tmp_path/'read', **more)
        if not more:
            with pytest.raises(ValueError): Registry(tmp_path/'data').add('x', rows)
            with pytest.raises(ValueError): predict(predict_recipe(tiny, output_dir=tmp_path/'out'), rows)
    assert not _snapshot(tmp_path)

def test_refused_rows_take_no_picture_of_others_along(tmp_path):
    "A picture that was there before stays, and so does what somebody else puts beside it."
    kept = Path(read_samples(_rows(_pictures()[:1]), media_dir=tmp_path)[0]['images'][0])
    with pytest.raises(ValueError): read_samples([{'frage': 'q', 'bild': im} for im in _pictures()], media_dir=tmp_path)
    assert [*tmp_path.iterdir()] == [kept]

# --- bad input

def _cut(n=400):
    Image.effect_noise((60, 40), 50).convert('RGB').save(out := io.BytesIO(), 'PNG')
    return Image.open(io.BytesIO(out.getvalue()[:n]))

def _closed():
    im = Image.open(io.BytesIO(_png(Image.new('RGB', (60, 40)))))
    im.close()
    return im

def _circle():
    circle = []
    circle.append(circle)
    return circle

def _row(**more): return {'question': 'q', 'answer': 'a'} | more

def _sides(): return pd.DataFrame([['q', 'a']], columns=pd.MultiIndex.from_tuples([('asked', 'question'), ('said', 'answer')]))

def _splits(): return datasets.DatasetDict({'train': datasets.Dataset.from_list([_row()]*2), 'test': datasets.Dataset.from_list([_row()])})

def _typed(row, **features): return datasets.Dataset.from_list([row], features=datasets.Features({k: datasets.Value('string') for k in row if k not in features} | features))

Pair = namedtuple('Pair', 'question answer')
Kind = Enum('Kind', 'CAR BUS')

@dataclass
class Labelled:
    question:str = 'q'
    answer:str = 'a'

PHOTO = Image.new('RGB', (60, 40))
class Failing:
    "As the result of a query whose connection is closed; each library has exceptions of its own."
    def __arrow_c_stream__(self, schema=None): raise RuntimeError('the connection is closed')

BAD = { # name → source, other arguments, words
    'a picture and no folder': (lambda: [_row(), _row(image=PHOTO)], {}, r"The list: row 1, column 'image' contains a picture or clip itself. media_dir=… names"),
    'pictures of a Dataset and no folder': (lambda: _data_set(_pictures()), {}, "The Dataset: row 0, column 'image' contains a picture"),
    'bytes of a picture and no folder': (lambda: pa.table({**_table([*map(_png, _pictures())])}), {}, "The Table: row 0, column 'image' contains a picture"),
    'a picture in an address and no folder': (lambda: [_row(image='data:image/png;base64,AAAA')], {}, 'A row contains a picture or clip: media_dir='),
    'a folder that is a file': (lambda: [_row(image=PHOTO)], {'media_dir': __file__}, 'is not a folder'),
    'an array for a picture': (lambda: pd.DataFrame([_row(image=np.zeros((84, 112, 3), 'uint8'))]), {'media_dir': 'out'}, r"row 0, column 'image', holds an array of shape \(84, 112, 3\).*Image.fromarray"),
    'a tensor for a picture': (lambda: [_row(image=torch.zeros(3, 84, 112))], {'media_dir': 'out'}, r"row 0, column 'image', holds an array of shape \(3, 84, 112\)"),
    'a picture cut off': (lambda: [_row(), _row(image=_cut())], {'media_dir': 'out'}, r"row 1, column 'image', holds a picture that cannot be saved \(.*truncated"),
    'a picture of no pixels': (lambda: [_row(image=Image.new('RGB', (0, 5)))], {'media_dir': 'out'}, "row 0, column 'image', holds a picture that cannot be saved"),
    'a picture that was closed': (lambda: [_row(image=_closed())], {'media_dir': 'out'}, "row 0, column 'image', holds a picture that cannot be saved"),
    'bytes that are nothing': (lambda: [_row(image=b'\x00\x01\xff')], {'media_dir': 'out'}, "The list: the column 'image' holds bytes that are neither pictures, clips nor text"),
    'a set in a cell': (lambda: [_row(), _row(tags={'a'})], {}, "row 1, column 'tags', holds an object of type set, which cannot be written as JSON"),
    'an object in a cell': (lambda: pd.DataFrame([_row(model=object())]), {}, "row 0, column 'model', holds an object of type object"),
    'a function deep in a cell': (lambda: [_row(meta={'a': [{'b': print}]})], {}, "row 0, column 'meta', holds an object of type builtin"),
    'complex numbers': (lambda: pd.DataFrame({'question': ['q'], 'answer': ['a'], 'z': [1j]}), {}, "row 0, column 'z', holds an object of type complex"),
    'a list within itself': (lambda: [_row(meta=_circle())], {}, "row 0, column 'meta', is nested too deeply"),
    'rows that are none': (lambda: [_row(), 'x', None], {}, r'2 cell\(s\) or row\(s\) that cannot be read. row 1 is a str, not a dict; row 2 is a NoneType'),
    'several faults': (lambda: [_row(a={1}, b=1j)]*400, {}, r"800 cell\(s\).*row 0, column 'a'.*row 0, column 'b'.*row 1, column 'a'.* and 795 more"),
    'columns of two levels': (_sides, {}, r"column names with 2 levels, such as \('asked', 'question'\).*frame.columns ="),
    'a column misnamed': (lambda: pd.DataFrame([_row(image='a')]), {'response': 'anser'}, "The DataFrame has no column 'anser' for the answer; did you mean 'answer'"),
    'a number that names no column': (lambda: pd.DataFrame([['q', 'a']]), {'prompt': 'q', 'response': 7}, "no column '7' for the answer.*Its columns: 0, 1"),
    'no column for answers': (lambda: _data_set(_pictures()).remove_columns(['answer', 'image']), {'media_dir': 'out'}, "The Dataset has no column 'output' for the answer.*Its columns: question, car"),
    'paths in a column of another name': (lambda: pd.DataFrame([_row(photo='a.png')]), {}, "no column for the picture; 'photo' holds paths: pass image='photo'"),
    'a DataFrame without rows': (lambda: pd.DataFrame(_table(_pictures()))[:0], {}, 'The DataFrame has no rows'),
    'a DataFrame without columns': (lambda: pd.DataFrame(index=[1, 2]), {}, 'The DataFrame has no rows'),
    'an empty list': (lambda: [], {}, 'The list has no rows'),
    'a dict of columns': (lambda: _table(_pictures()), {}, r'a dict of columns: wrap it in pd.DataFrame\(…\)'),
    'nothing': (lambda: None, {}, 'this is nothing'),
    'a number': (lambda: 7, {}, 'this is an object of type int'),
    'a path that is empty': (lambda: '', {}, 'The path of the samples is empty'),  # Path('') would be the working folder
    'one column': (lambda: pd.Series(['a']), {}, r'series.to_frame\(\)'),
    'a generator': (lambda: (row for row in [_row()]), {}, 'this is an object of type generator'),
    'a picture alone': (lambda: PHOTO, {}, 'this is an object of type Image'),
    'a NumPy array': (lambda: np.array([['q', 'a']]), {}, 'this is an object of type ndarray'),
    'a stream': (lambda: datasets.Dataset.from_list([_row()]).to_iterable_dataset(), {}, r'The IterableDataset is a stream.*take\(1000\)'),
    'several splits': (_splits, {}, r"The DatasetDict has more than one split. Its splits: train \(2 rows\), test \(1 rows\). Say which to read, as in read_samples\(…, split='train'\)"),
    'a split that is not there': (_splits, {'split': 'dev'}, "no split 'dev'. Its splits: train"),
    'a split of a Dataset': (lambda: _splits()['train'], {'split': 'train'}, 'has no splits: leave out split='),
    'a split of a DataFrame': (lambda: pd.DataFrame([_row()]), {'split': 'train'}, "split='train' is for a DatasetDict"),
    'a split of a file': (lambda: 'labels.csv', {'split': 'train'}, "split='train' is for a DatasetDict"),
    'objects as polars exports them': (lambda: pa.table({'image': pa.array([b'12345678'], pa.binary(8))}), {}, r"Python objects or fixed-size bytes in the column 'image'.*to_dicts\(\)"),
    'an Arrow column': (lambda: pa.chunked_array([['a']]), {}, 'The ChunkedArray is not a table with named columns'),
    'a time that Python has no room for': (lambda: pa.table({'question': ['q'], 'answer': pa.array([2**62], pa.timestamp('s'))}), {}, "The Table: the column 'answer' has a value that Python cannot represent .*Write it as text"),
    'a time zone that nobody knows': (lambda: pa.table({'question': ['q'], 'answer': pa.array([0], pa.timestamp('s', tz='Nowhere/Else'))}), {}, "column 'answer' has a value that Python cannot represent .'Nowhere/Else'"),
    'text that is not UTF-8': (lambda: pa.table({'question': ['q'], 'answer': pa.array([b'\xff']).view(pa.string())}), {}, "column 'answer' has a value that Python cannot represent .*utf-8"),
    'a table of another library that fails': (Failing, {}, 'The Failing is not a table with named columns .the connection is closed'),
    'a part of an unknown kind': (lambda: [{'messages': [{'role': 'user', 'content': [{'type': 'sound', 'sound': 'x'}]}]}], {}, r"row 0: messages\[0\] has a content part of an unknown kind"),
    # rows that are no dicts
    'named tuples': (lambda: [Pair('q', 'a')], {}, 'row 0 is a Pair, not a dict'),
    'objects of a class': (lambda: [_row(), Labelled()], {}, 'row 1 is a Labelled, not a dict'),
    'lists of cells': (lambda: [['q', 'a'], ['q', 'b']], {}, 'row 0 is a list, not a dict; row 1 is a list'),
    'columns of pandas for rows': (lambda: [pd.Series(_row())], {}, 'row 0 is a Series, not a dict'),
    'arrays for rows': (lambda: [np.array(['q', 'a'])], {}, 'row 0 is a ndarray, not a dict'),
    # what is no table
    'rows by name': (lambda: {'one': _row(), 'two': _row()}, {}, 'a dict of columns: wrap it'),
    'a set': (lambda: {'q', 'a'}, {}, 'this is an object of type set'),
    'bytes of a file': (lambda: b'question,answer\nq,a\n', {}, 'this is an object of type bytes'),
    'an open text': (lambda: io.StringIO('question,answer\nq,a\n'), {}, 'this is an object of type StringIO'),
    'a mapped iterator': (lambda: map(dict, [_row()]), {}, 'this is an object of type map'),
    'a structured array': (lambda: np.array([('q', 'a')], [('question', 'O'), ('answer', 'O')]), {}, 'this is an object of type ndarray'),
    'groups of a DataFrame': (lambda: pd.DataFrame([_row()]).groupby('question'), {}, 'this is an object of type DataFrameGroupBy'),
    'the class in place of the table': (lambda: pd.DataFrame, {}, 'this is an object of type type'),
    'a module': (lambda: io, {}, 'this is an object of type module'),
    'a DatasetDict of nothing': (lambda: datasets.DatasetDict(), {}, 'The DatasetDict has no splits'),
    'a DatasetDict of lists': (lambda: datasets.DatasetDict({'train': [_row()]}), {}, 'has a split that is a list, not a Dataset'),
    'a DatasetDict of streams': (lambda: datasets.IterableDatasetDict({'train': _splits()['train'].to_iterable_dataset()}), {}, r'is a stream.*take\(1000\)'),
    'a split without rows': (lambda: datasets.DatasetDict({'train': _splits()['train'].select([])}), {}, 'The DatasetDict has no rows'),
    # columns
    'columns without names': (lambda: pd.DataFrame([['a.png', 'q', 'a']]), {}, "no column 'instruction' for the prompt.*'0' holds paths: pass image='0'"),
    'keys that are numbers': (lambda: [{0: 'q', 1: 'a'}], {}, "no column 'instruction' for the prompt.*Its columns: 0, 1"),
    'keys that are one text': (lambda: [_row() | {1: 'x', '1': 'y'}], {}, "row 0 has two columns with the name '1'"),
    'rows without columns': (lambda: [{}, {}], {}, "no column 'instruction' for the prompt"),
    'a translation': (lambda: _typed({'translation': {'en': 'q', 'fr': 'a'}}, translation=datasets.Translation(['en', 'fr'])), {}, 'Its columns: translation'),
    'names with spaces at their ends': (lambda: pd.DataFrame([['q', 'a']], columns=[' question', 'answer ']), {}, "no column 'output' for the answer"),
    # cells
    'a choice': (lambda: [_row(kind=Kind.CAR)], {}, "row 0, column 'kind', holds an object of type Kind"),
    'a frozen set': (lambda: [_row(tags=frozenset('a'))], {}, 'an object of type frozenset'),
    'a range': (lambda: [_row(n=range(3))], {}, 'an object of type range'),
    'an error in a cell': (lambda: [_row(note=ValueError('x'))], {}, 'an object of type ValueError'),
    'an open file for a picture': (lambda: [_row(image=io.BytesIO(_png(PHOTO)))], {'media_dir': 'out'}, "row 0, column 'image', holds an object of type BytesIO"),
    'a tensor in half precision': (lambda: [_row(x=torch.ones(2, dtype=torch.bfloat16))], {}, r'type Tensor that NumPy cannot read .*\.tolist\(\)'),
    'a tensor with a gradient': (lambda: [_row(x=torch.ones(2, requires_grad=True))], {}, 'type Tensor that NumPy cannot read .*requires grad'),
    'a tensor without data': (lambda: [_row(x=torch.empty(2, device='meta'))], {}, 'type Tensor that NumPy cannot read'),
    'answers in another encoding': (lambda: [_row(answer='café au lait'.encode('latin-1'))], {}, "column 'answer' holds bytes that are neither pictures, clips nor text in UTF-8"),
    'a document for a picture': (lambda: [_row(image=b'%PDF-1.4 \x00\xff')], {'media_dir': 'out'}, "column 'image' holds bytes that are neither pictures"),
    'grey pixels': (lambda: [_row(image=np.zeros((200, 200), 'uint8'))], {'media_dir': 'out'}, r'holds an array of shape \(200, 200\)'),
    'a list of arrays': (lambda: [_row(image=[np.zeros((84, 112, 3), 'uint8')])], {'media_dir': 'out'}, r'holds an array of shape \(84, 112, 3\)'),
    'an array of pictures': (lambda: [_row(image=np.array([PHOTO, PHOTO], dtype=object))], {'media_dir': 'out'}, "row 0, column 'image', holds an array"),
    'a picture of no height': (lambda: pd.DataFrame([_row(image=Image.new('RGB', (5, 0)))]), {'media_dir': 'out'}, 'holds a picture that cannot be saved'),
    # turns
    'turns that are text': (lambda: [{'messages': '[{"role": "user", "content": "q"}]'}], {}, "no turns: the column 'messages' holds str, not lists of turns .see json.loads"),
    'a single turn': (lambda: [{'messages': {'role': 'user', 'content': 'q'}}], {}, "the column 'messages' holds dict, not lists of turns"),
    'turns that are missing': (lambda: pd.DataFrame({'conversations': [None, None]}), {}, "the column 'conversations' holds nothing, not lists of turns"),
    'a hub in offline mode': (lambda: 'someone/cars', {}, 'no file or folder someone/cars here.*hub .* cannot be reached.*HF_ENDPOINT to a mirror.*give its folder'),
}

@pytest.mark.parametrize('source,more,words', BAD.values(), ids=BAD.keys())
def test_bad_input(source, more, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=words): read_samples(source(), **more)
    assert not list(tmp_path.rglob('*.*')), 'nothing was written'

REFUSED = { # rows that `Registry.add` and `predict` are given → words
    'other names of columns': (lambda: pd.DataFrame([{'frage': 'q', 'antwort': 'a'}]), "The DataFrame has no column.*`read_samples` takes other names of columns"),
    'no rows': (lambda: pd.DataFrame(columns=['question', 'answer']), 'The DataFrame has no rows'),
    'an object': (lambda: [_row(x=object())], "row 0, column 'x', holds an object"),
    'splits': (_splits, r'more than one split.*read_samples\(…, split='),
    'a path': (lambda: 'labels.csv', "'labels.csv' is the path of a file or folder: give the samples that `read_samples` returns"),
    'a folder': (lambda: Path('.'), "'.' is the path of a file or folder"),
}

@pytest.mark.parametrize('source,words', REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_to_the_others(source, words, tiny, tmp_path):
    with pytest.raises(ValueError, match=words): Registry(tmp_path).add('x', source())
    with pytest.raises(ValueError, match=words): predict(predict_recipe(tiny, output_dir=tmp_path/'out'), source())
    assert not list(tmp_path.rglob('*.*')), 'nothing was written'

# --- a hub on this machine

@pytest.fixture
def hub(tmp_path):
    "A hub with `me/cars`, and `me/alone` without its test split, that speaks as much as `datasets` asks for: the environment in which it is used."
    there = tmp_path/'hub'
    (there/'data').mkdir(parents=True)
    for split, rows in (('train', slice(0, 3)), ('test', slice(3, 4))):
        pd.DataFrame(_table([{'bytes': _png(im), 'path': None} for im in _pictures()])).iloc[rows].to_parquet(there/'data'/f'{split}-00000-of-00001.parquet')
    files = [p.relative_to(there).as_posix() for p in there.rglob('*.parquet')]
    held = lambda name: [f for f in files if name == 'cars' or 'train' in f]
    entry = lambda f: {'type': 'file', 'path': f, 'size': (there/f).stat().st_size, 'oid': '0'*40}
    class Hub(HubHandler):
        def json(self, value): self.answer(200, json.dumps(value).encode(), Content_Type='application/json')
        def do_GET(self):
            posted = self.rfile.read(int(self.headers.get('Content-Length') or 0)).decode()
            match self.path.partition('?')[0].strip('/').split('/'):
                case ['api', 'datasets', 'me', 'cars' | 'alone' as name] | ['api', 'datasets', 'me', 'cars' | 'alone' as name, 'revision', _]:
                    self.json({'id': f'me/{name}', 'sha': COMMIT, 'private': False, 'gated': False, 'disabled': False, 'downloads': 0, 'likes': 0, 'tags': [], 'siblings': [{'rfilename': f} for f in held(name)]})
                case ['api', 'datasets', 'me', 'cars' | 'alone' as name, 'tree', _, *folder]: self.json([entry(f) for f in held(name) if f.startswith('/'.join(folder))])
                case ['api', 'datasets', 'me', 'cars' | 'alone' as name, 'paths-info', _]:
                    asked = parse_qs(posted)['paths']
                    self.json([entry(p) for p in asked if p in held(name)] + [{'type': 'directory', 'path': p, 'oid': '0'*40} for p in asked if p == 'data'])
                case ['datasets', 'me', 'cars' | 'alone' as name, 'resolve', _, *path] if '/'.join(path) in held(name):
                    body = (there/'/'.join(path)).read_bytes()
                    self.answer(200, body, ETag=f'"{hashlib.sha256(body).hexdigest()}"')
                case ['datasets', 'me', 'cars' | 'alone', *_]: self.answer(404, X_Error_Code='EntryNotFound')
                case _: self.answer(404, X_Error_Code='RepoNotFound')
        do_HEAD = do_POST = do_GET
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield {'HF_ENDPOINT': f'http://127.0.0.1:{server.server_port}', 'HF_HOME': str(tmp_path/'hf'), 'HF_HUB_OFFLINE': '0', 'HF_HUB_DISABLE_XET': '1'}
    server.shutdown()
    server.server_close()

def _reading(env, folder, call):
    "What a fresh Python prints that evaluates a call; the variables of a hub are read when `datasets` is imported."
    code = f'import json, sys; from qwen2vl_nb.all import *\ntry: print("\\n" + json.dumps({call}))\nexcept Exception as e: sys.exit(f"{{type(e).__name__}}: {{e}}")'
    done = subprocess.run([sys.executable, '-c', code], env=os.environ | env, cwd=folder, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if not done.returncode else done.stderr.splitlines()[-1]

def test_a_data_set_on_a_hub(hub, tmp_path):
    found = _reading(hub, tmp_path, "read_samples('me/cars', split='train', media_dir='cars')")
    assert [s['output'] for s in found] == WORDS[:3] and len(list((tmp_path/'cars').iterdir())) == 2
    with Image.open(found[1]['images'][0]) as im: assert im.tobytes() == _pictures()[1].tobytes()
    assert _reading(hub | {'HF_HUB_OFFLINE': '1'}, tmp_path, "len(read_samples('me/cars', split='test', media_dir='cars'))") == 1, 'from the cache of datasets'
    said = _reading(hub, tmp_path, "read_samples('me/cars', media_dir='cars')")
    assert 'me/cars has more than one split. Its splits: train (3 rows), test (1 rows)' in said, said
    assert "read_samples(…, split='train')" in _reading(hub, tmp_path, "Registry('data').add('cars', 'me/cars')") and not (tmp_path/'data').exists()
    entry = _reading(hub, tmp_path, "Registry('data').add('one', 'me/alone')")
    assert entry['file_name'] == 'one.json' and len(json.loads((tmp_path/'data'/'one.json').read_text())) == 3 and len([*(tmp_path/'data'/'one_media').iterdir()]) == 2
    said = _reading(hub, tmp_path, "read_samples('me/gone')")
    assert 'There is no file or folder me/gone here' in said and f"{hub['HF_ENDPOINT']} does not provide it" in said, said
