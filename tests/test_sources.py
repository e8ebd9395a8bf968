"Every kind of source, made as people have it: read, registered, and loaded by LLaMA-Factory's own loader, it says the same."
import base64, json, os, shutil

import pandas as pd, pytest
from PIL import Image

from qwen2vl_nb.data.check import check_samples, drop_samples, mend_samples
from qwen2vl_nb.data.samples import as_list, is_dialogue, place_of
from qwen2vl_nb.data.sources import read_samples
from qwen2vl_nb.data.split import split_samples
from qwen2vl_nb.data.tokens import count_tokens
from qwen2vl_nb.data.registry import Registry
from qwen2vl_nb.prediction.question import asked_row

WORDS = ['A red car, nearly new', '一辆蓝色的车', '007', 'NA']
ASKED = 'What is this?'

def _pictures(folder):
    (folder/'photos').mkdir()
    for name, colour in zip('abcd', ('crimson', 'royalblue', 'gold', 'seagreen')): Image.new('RGB', (112, 84), colour).save(folder/'photos'/f'{name}.png')
    return [f'photos/{name}.png' for name in 'abcd']

def _table(between=',', encoding='utf-8'):
    quote = lambda words: f'"{words}"' if between in words else words
    def make(folder, paths):
        lines = [between.join(('photo', 'caption', 'car'))] + [between.join((p, quote(w), str(i))) for i, (p, w) in enumerate(zip(paths, WORDS))]
        file = folder/('labels.tsv' if between == '\t' else 'labels.csv')
        file.write_bytes('\n'.join(lines).encode(encoding))
        return dict(source=file, image='photo', prompt=ASKED, response='caption')
    return make

def _frame(paths):
    import pandas as pd
    return pd.DataFrame({'photo': paths, 'caption': WORDS, 'car': [1, 2, 3, 4]})

def _excel(folder, paths):
    _frame(paths).to_excel(folder/'labels.xlsx', index=False)
    return dict(source=folder/'labels.xlsx', image='photo', prompt=ASKED, response='caption')

def _parquet(folder, paths):
    _frame(paths).to_parquet(folder/'labels.parquet')
    return dict(source=folder/'labels.parquet', image='photo', prompt=ASKED, response='caption')

def _rows(name, write=json.dumps):
    def make(folder, paths):
        rows = [{'images': [p], 'question': ASKED, 'answer': w, 'car': i} for i, (p, w) in enumerate(zip(paths, WORDS))]
        (folder/name).write_text(write(rows), encoding='utf-8')
        return dict(source=folder/name)
    return make

def _lines(rows): return ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)

def _several(folder, paths):
    (folder/'labels.csv').write_text(f'image,instruction,output\n{paths[0]};{paths[1]},Which is newer?,The blue one\n,What has wheels?,A car\n{paths[2]},And this?,Gold\n"[""{paths[3]}""]",This?,Green\n')
    return dict(source=folder/'labels.csv')

def _saved(folder, paths):
    import datasets
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=WORDS), 'more': datasets.List(datasets.Image())})
    rows = {'image': [str(folder/p) for p in paths], 'label': [0, 1, 2, 3], 'more': [[str(folder/paths[0])], [], [], []]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder/'saved')
    shutil.rmtree(folder/'photos')  # the pictures stand in the data set
    return dict(source=folder/'saved', prompt=ASKED, response='label')

def _saved_parquet(folder, paths):
    _saved(folder, paths)
    import datasets
    datasets.load_from_disk(folder/'saved').to_parquet(folder/'hub.parquet')
    return dict(source=folder/'hub.parquet', prompt=ASKED, response='label')

def _classes(folder, paths):
    for path, words in zip(paths, WORDS):
        (folder/'by class'/words).mkdir(parents=True)
        shutil.copy(folder/path, folder/'by class'/words/'1.png')
    return dict(source=folder/'by class', prompt=ASKED)

def _llava(folder, paths):
    rows = [{'id': i, 'image': p, 'conversations': [{'from': 'human', 'value': f'<image>\n{ASKED}'}, {'from': 'gpt', 'value': w},
                                                    {'from': 'human', 'value': 'Sure?'}, {'from': 'gpt', 'value': 'Yes.'}]} for i, (p, w) in enumerate(zip(paths, WORDS))]
    (folder/'llava.json').write_text(json.dumps(rows))
    return dict(source=folder/'llava.json')

def _openai(folder, paths):
    inside = 'data:image/png;base64,' + base64.b64encode((folder/paths[0]).read_bytes()).decode()
    urls = [inside, (folder/paths[1]).as_uri(), paths[2], str(folder/paths[3])]
    rows = [{'messages': [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': [{'type': 'text', 'text': 'What is '}, {'type': 'image_url', 'image_url': {'url': u}}, {'type': 'text', 'text': '?'}]},
                          {'role': 'assistant', 'content': [{'type': 'text', 'text': w}]}]} for u, w in zip(urls, WORDS)]
    (folder/'chat.jsonl').write_text(_lines(rows))
    return dict(source=folder/'chat.jsonl')

def _tool_calls(folder, paths):
    call = lambda plate: {'id': plate, 'type': 'function', 'function': {'name': 'look_up', 'arguments': json.dumps({'plate': plate})}}
    turns = [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': {'url': paths[0]}}, {'type': 'text', 'text': 'Whose are these?'}]},
             {'role': 'assistant', 'content': None, 'tool_calls': [call('AB1'), call('CD2')]}, {'role': 'tool', 'content': 'Ann', 'tool_call_id': 'AB1'}, {'role': 'tool', 'content': 'Bob', 'tool_call_id': 'CD2'},
             {'role': 'assistant', 'content': "Ann's and Bob's."}]
    tools = [{'type': 'function', 'function': {'name': 'look_up', 'description': 'Who owns a car.', 'parameters': {'type': 'object', 'properties': {'plate': {'type': 'string'}}}}}]
    (folder/'tools.jsonl').write_text(json.dumps({'messages': turns, 'tools': tools}))
    return dict(source=folder/'tools.jsonl')

def test_tool_calls_come_out_as_llamafactory_wants_them(factory, tiny, tmp_path):
    "OpenAI has arguments as text and an answer of a tool for each call; what is trained on are objects, and one observation."
    sample, = read_samples(**_tool_calls(tmp_path, _pictures(tmp_path)))
    assert [t['role'] for t in sample['messages']] == ['user', 'function_call', 'observation', 'assistant'] and not len(check_samples([sample], model=tiny))
    assert json.loads(sample['messages'][1]['content'])[0] == {'name': 'look_up', 'arguments': {'plate': 'AB1'}}
    Registry(tmp_path).add('x', [sample])
    ids, _ = factory.prepare(tmp_path, 'x')
    from transformers import AutoTokenizer
    text = AutoTokenizer.from_pretrained(tiny).decode(ids[0])
    assert '"arguments": {"plate": "CD2"}' in text and 'Ann\n</tool_response>\n<tool_response>\nBob' in text

def _coco(folder, paths):
    data = {'info': {}, 'images': [{'id': 100+i, 'file_name': os.path.basename(p)} for i, p in enumerate(paths)],
            'annotations': [{'id': i, 'image_id': 100+i, 'caption': w} for i, w in enumerate(WORDS)] + [{'id': 9, 'image_id': 100, 'caption': 'Again'}]}
    (folder/'captions.json').write_text(json.dumps(data))
    return dict(source=folder/'captions.json', prompt='Describe it.', media_dir=folder/'photos')

def _vqa(folder, paths):
    for i, path in enumerate(paths): Image.open(folder/path).save(folder/'photos'/(f'COCO_val2014_{i:012d}.jpg' if i%2 else f'{i:012d}.jpg'))
    questions = {'data_subtype': 'val2014', 'questions': [{'question_id': 10*i, 'image_id': i, 'question': ASKED} for i in range(4)]}
    annotations = {'annotations': [{'question_id': 10*i, 'image_id': i, 'multiple_choice_answer': w, 'answers': [{'answer': w}], 'answer_type': 'other'} for i, w in enumerate(WORDS)]}
    for name, data in (('q.json', questions), ('a.json', annotations)): (folder/name).write_text(json.dumps(data))
    return dict(source=(folder/'q.json', folder/'a.json'), media_dir=folder/'photos')

def _frames(folder, paths):
    (folder/'clips.json').write_text(json.dumps([{'videos': [paths[:3], paths[:2]], 'instruction': '<video><video>Which?', 'input': 'Look well.', 'output': 'The second'}]))
    return dict(source=folder/'clips.json')

SOURCES = {
    'CSV': (_table(), 4), 'CSV with semicolons': (_table(';'), 4), 'TSV': (_table('\t'), 4), 'UTF-8 with a mark': (_table(encoding='utf-8-sig'), 4), 'GB18030': (_table(encoding='gb18030'), 4),
    'UTF-16': (_table('\t', 'utf-16'), 4), 'Excel': (_excel, 4), 'Parquet': (_parquet, 4), 'JSON': (_rows('rows.json'), 4), 'JSON lines': (_rows('rows.jsonl', _lines), 4),
    'JSON lines named .json': (_rows('rows.json', _lines), 4), 'several pictures, or none': (_several, 4), 'a saved data set': (_saved, 4), 'Parquet with pictures': (_saved_parquet, 4),
    'a folder by class': (_classes, 4), 'LLaVA': (_llava, 4), 'OpenAI': (_openai, 4), 'COCO captions': (_coco, 5), 'VQA v2': (_vqa, 4), 'clips as frames': (_frames, 1),
}

def _turns(sample):
    "What LLaMA-Factory should make of a sample: (prompt, response, system), worked out by hand."
    turn = lambda role, content: {'role': role, 'content': content}
    if is_dialogue(sample):
        said = [turn({'function_call': 'function'}.get(t['role'], t['role']), t['content']) for t in sample['messages']]
        system = said.pop(0)['content'] if said[0]['role'] == 'system' else sample.get('system')
        return said[:-1], said[-1:], system or ''
    past = [turn(role, text) for pair in sample.get('history') or [] for role, text in zip(('user', 'assistant'), pair)]
    asked = '\n'.join(t for t in (sample['instruction'], sample['input']) if t)
    return [*past, turn('user', asked)], [turn('assistant', sample['output'])], sample.get('system') or ''

def _same(loaded, samples):
    assert [(r['_prompt'], r['_response'], r['_system'] or '') for r in loaded] == [_turns(s) for s in samples]
    for key, column in (('images', '_images'), ('videos', '_videos')): assert [r[column] or [] for r in loaded] == [as_list(s.get(key)) for s in samples]

@pytest.mark.parametrize('make,n', SOURCES.values(), ids=SOURCES.keys())
def test_from_each_source_to_llamafactory(make, n, factory, tiny, tmp_path, monkeypatch, capsys):
    folder = tmp_path/'店 shop'
    folder.mkdir()
    samples = read_samples(**make(folder, _pictures(folder)))
    said = capsys.readouterr().out
    assert f'{n} rows of ' in said and ' nowhere' not in said and len(samples) == n
    found = check_samples(samples, model=tiny)
    assert not len(found), found
    monkeypatch.chdir(tmp_path)  # any working folder
    registry = Registry(tmp_path/'注册 registry')
    registry.add('小车', samples)
    _same(factory.load(registry.dataset_dir, '小车'), samples)
    assert read_samples(registry.dataset_dir/'小车.json') == samples

def test_the_words_image_and_video_are_read_too(factory, tiny, tmp_path):
    paths = [str(tmp_path/p) for p in _pictures(tmp_path)]
    samples = [{'image': p, 'instruction': f'<image>Which is it, {i}?', 'input': '', 'output': 'A car.'} for i, p in enumerate(paths)]
    samples += [{'video': [paths[:2]], 'instruction': '<video>Which?', 'input': '', 'output': 'A bus.'}]
    renamed = [{'images': [p]} | {k: v for k, v in s.items() if k != 'image'} for s, p in zip(samples, paths)]
    renamed += [{'videos': [paths[:2]]} | {k: v for k, v in samples[-1].items() if k != 'video'}]
    found = check_samples(samples + [samples[0] | {'image': 'gone.png'}], model=tiny)
    assert found.field.tolist() == ['image'] and found.row.tolist() == [5], found
    assert count_tokens(samples, tiny).equals(count_tokens(renamed, tiny))
    assert [asked_row(i, s) for i, s in enumerate(samples)] == [asked_row(i, s) for i, s in enumerate(renamed)]
    registry = Registry(tmp_path/'data')
    registry.add('cars', samples)
    _same(factory.load(registry.dataset_dir, 'cars'), renamed)
    assert [{k: v for k, v in s.items() if v != []} for s in read_samples(registry.dataset_dir/'cars.json')] == renamed

@pytest.mark.parametrize('media', ['link', 'copy'])
def test_pictures_come_along(media, factory, tmp_path, monkeypatch):
    "Linked or copied beside the data set; copies are still there when the data set has moved and the source is gone."
    samples = read_samples(**_table()(tmp_path, _pictures(tmp_path)))
    Registry(tmp_path/'data').add('x', samples, media=media)
    folder = tmp_path/'data'
    if media == 'copy':
        shutil.rmtree(tmp_path/'photos')
        folder = (tmp_path/'data').rename(tmp_path/'moved')
    monkeypatch.chdir('/')
    loaded = factory.load(folder, 'x')
    assert [r['_images'] for r in loaded] == [[str(folder/'x_media'/f'{name}.png')] for name in 'abcd'] and all(os.path.isfile(p) for r in loaded for p in r['_images'])

OWN = {
    'alpaca': ({'columns': {'prompt': 'instruction', 'query': 'input', 'response': 'output', 'system': 'system', 'history': 'history', 'images': 'images'}},
               [{'instruction': 'And this?', 'input': 'Look: <image>', 'output': 'A bus.', 'system': 'Be brief.', 'history': [['<image>This?', 'A car.'], ['Sure?', 'Yes.']], 'images': ['photos/a.png', 'photos/b.png']},
                {'instruction': 'Hello', 'input': '', 'output': 'Hi', 'system': None, 'history': [], 'images': []}]),
    'sharegpt': ({'formatting': 'sharegpt', 'columns': {'messages': 'conversations', 'tools': 'tools', 'system': 'system'}},
                 [{'conversations': [{'from': 'human', 'value': 'Where?'}, {'from': 'function_call', 'value': '{"name": "look", "arguments": {}}'}, {'from': 'observation', 'value': '{"seen": 1}'},
                                     {'from': 'gpt', 'value': 'There.'}], 'tools': '[{"name": "look", "description": "", "parameters": {"type": "object", "properties": {}}}]', 'system': 'Look.'}]),
    'sharegpt with roles': ({'formatting': 'sharegpt', 'columns': {'messages': 'messages', 'images': 'images'}, 'tags': {'role_tag': 'role', 'content_tag': 'content', 'user_tag': 'user', 'assistant_tag': 'assistant'}},
                            [{'messages': [{'role': 'user', 'content': '<image>This?'}, {'role': 'assistant', 'content': 'A car.'}], 'images': ['photos/a.png']}]),
}

@pytest.mark.parametrize('entry,rows', OWN.values(), ids=OWN.keys())
def test_llamafactorys_own_files_lose_nothing(entry, rows, factory, tmp_path):
    "Its rows as it loads them, before and after they went through samples."
    _pictures(tmp_path)
    registry = Registry(tmp_path)
    registry['own'] = {'file_name': 'own.json'} | entry
    (tmp_path/'own.json').write_text(json.dumps(rows))
    registry.add('again', read_samples(tmp_path/'own.json'))
    before, after = factory.load(tmp_path, 'own'), factory.load(tmp_path, 'again')
    if 'system' not in entry['columns'] and entry.get('tags'): before = [r | {'_system': r['_system'] or ''} for r in before]
    assert [{k: v or None for k, v in r.items()} for r in before] == [{k: v or None for k, v in r.items()} for r in after]

def test_both_forms_in_one_data_set(factory, tmp_path):
    question = {'images': [], 'instruction': 'What has wheels?', 'input': '', 'output': 'A car.'}
    talk = {'images': [], 'messages': [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]}
    Registry(tmp_path).add('x', [question, talk])
    _same(factory.load(tmp_path, 'x'), [question, talk])

def _workbook(folder, rows):
    "A workbook with cells at the given row numbers, as Excel counts them."
    import openpyxl
    book = openpyxl.Workbook()
    for number, cells in rows.items():
        for column, value in enumerate(cells, 1): book.active.cell(number, column, value)
    book.save(folder/'labels.xlsx')
    return folder/'labels.xlsx'

ROWS = {2: ('photo', 'caption'), 3: ('a.png', 'a car'), 6: ('b.png', 'a bus'), 9: ('c.png', None)}
FILES = {
    'labels.csv': ('\nphoto,caption\na.png,a car\n\n,\nb.png,a bus\n\n\nc.png,\n', 'row', [3, 6, 9]),
    'cells.csv': ('photo,caption\r\na.png,"a car,\r\nred"\r\nb.png,a bus\r\nc.png,a van\r\n', 'row', [2, 3, 4]),
    'excel.csv': ('sep=;\nphoto;caption\na.png;a car\n\nb.png;a bus\nc.png;a van\n', 'row', [2, 4, 5]),
    'labels.tsv': ('photo\tcaption\na.png\ta car\nb.png\ta bus\nc.png\ta van\n', 'row', [2, 3, 4]),
    'rows.jsonl': ('\n'.join(['', '{"photo": "a.png", "caption": "a car"}', '', '{"photo": "b.png", "caption": "a bus"}',
                              '{"photo": "c.png", "caption": "a van"}']), 'line', [2, 4, 5]),
    'lines.json': ('{"photo": "a.png", "caption": "a car"}\n{"photo": "b.png", "caption": ""}\n{"photo": "c.png", "caption": ""}', 'line', [1, 2, 3]),
}

@pytest.mark.parametrize('name', [*FILES, 'labels.xlsx'])
def test_samples_know_their_row_as_the_spreadsheet_counts(name, tmp_path):
    if name == 'labels.xlsx': path, unit, numbers = _workbook(tmp_path, ROWS), 'row', [3, 6, 9]
    else:
        path, (text, unit, numbers) = tmp_path/name, FILES[name]
        path.write_bytes(text.encode())
    samples = read_samples(path, image='photo', prompt='What is this?', response='caption')
    places = [f'{unit} {n} of {name}' for n in numbers]
    assert list(check_samples(samples).query("field == 'images'").source) == places
    train, test = split_samples(samples, test=1)
    mended, _ = mend_samples(train)
    assert sorted([*check_samples(mended).query("field == 'images'").source, *check_samples(test).query("field == 'images'").source]) == places

def test_the_place_of_a_row_is_not_written(tmp_path):
    path = _workbook(tmp_path, ROWS)
    samples = read_samples(path, image='photo', prompt='What is this?', response='caption')
    plain = [dict(s) for s in samples]
    assert samples == plain
    registry = Registry(tmp_path/'data')
    assert registry.add('rows', samples)['columns'] == registry.add('plain', plain)['columns']
    assert (tmp_path/'data'/'rows.json').read_bytes() == (tmp_path/'data'/'plain.json').read_bytes()

def test_messages_about_rows_name_their_place(tmp_path):
    (tmp_path/'twice.csv').write_text('photo,caption,id\na.png,a car,1\nb.png,a bus,2\nb.png,a bus,2\n')
    samples = read_samples(tmp_path/'twice.csv', image='photo', prompt='What is this?', response='caption')
    said = ' '.join(check_samples(samples).what)
    assert 'also that of row 3 of twice.csv' in said and 'same content as row 3 of twice.csv' in said
    (tmp_path/'boxes.csv').write_text('photo,label,xmin,ymin,xmax,ymax\na.png,car,1,2,3,4\na.png,car,x,2,3,4\n')
    with pytest.raises(ValueError, match=r'row 3 of boxes.csv has something that is not a number'):
        read_samples(tmp_path/'boxes.csv', image='photo', family='qwen2_vl')

def test_a_path_that_leads_nowhere_among_others_is_not_blamed_on_the_folder(tmp_path, capsys):
    for name in ('a.png', 'c.png'): Image.new('RGB', (56, 56)).save(tmp_path/name)
    read_samples(_workbook(tmp_path, ROWS), image='photo', prompt='What is this?', response='caption')
    assert '1 of 3 paths leads nowhere; the first is b.png: `check_samples` names the rows.' in capsys.readouterr().out
    for path in tmp_path.glob('*.png'): path.unlink()
    read_samples(tmp_path/'labels.xlsx', image='photo', prompt='What is this?', response='caption')
    assert '3 of 3 paths lead nowhere; the first is a.png: pass the folder of the pictures as media_dir.' in capsys.readouterr().out

def test_findings_of_other_samples_are_refused_before_anything_is_dropped(tmp_path, capsys):
    samples = read_samples(_workbook(tmp_path, ROWS), image='photo', prompt='What is this?', response='caption')
    findings = check_samples(samples)
    assert drop_samples(samples, findings) == [] and '- row 6 of labels.xlsx: There is no file b.png.' in capsys.readouterr().out
    with pytest.raises(ValueError, match='about 3 rows, and these are 2'): drop_samples(samples[1:], findings)
    part = findings[findings.row == 2]
    assert drop_samples(samples, part) == samples[:2]

@pytest.mark.parametrize('blank, said', [([], ''), ([3], ' (1 blank row left out)'), ([3, 4, 6], ' (3 blank rows left out)')])
def test_blank_rows_of_a_sheet_are_counted(tmp_path, capsys, blank, said):
    import openpyxl
    sheet = (book := openpyxl.Workbook()).active
    sheet.append(['photo', 'caption'])
    for n in (n for n in range(2, 8) if n not in blank):
        for column, cell in enumerate(('a.png', f'A car {n}'), 1): sheet.cell(n, column, cell)
    book.save(tmp_path/'labels.xlsx')
    read_samples(tmp_path/'labels.xlsx', image='photo', prompt='What is this?', response='caption')
    assert f"labels.xlsx: {6 - len(blank)} rows of the sheet 'Sheet' of an Excel workbook{said};" in capsys.readouterr().out

@pytest.mark.parametrize('ending', ['xlsx', 'csv'])
def test_rows_that_repeat_the_header_are_left_out(tmp_path, capsys, ending):
    Image.new('RGB', (56, 56)).save(tmp_path/'a.png')
    rows = [['photo', 'caption', ''], ['a.png', 'a car', ''], ['photo ', 'caption', ''], [], ['photo', 'caption'], ['photo', 'a photo'], ['a.png', 'caption']]
    samples = read_samples(_written(tmp_path, rows, ending), image='photo', prompt='What is this?', response='caption')
    assert [(s.number, s['output']) for s in samples] == [(2, 'a car'), (6, 'a photo'), (7, 'caption')]
    blank = '1 blank row and '*(ending == 'xlsx')  # an empty line of a CSV file is not a row
    assert f'({blank}2 repeated header rows left out)' in capsys.readouterr().out

TITLED = { # name → the rows of a table whose header is not the first row, arguments of `read_samples`
    'a title': ([['Cars of 2026'], [], ['photo', 'caption'], ['a.png', 'a car']], {}),
    'a title with separators': ([['Cars, trucks, buses', ''], ['photo', 'caption'], ['a.png', 'a car']], {}),
    'a title and a version': ([['Cars', 'v2', '2026-11-30'], ['photo', 'caption', 'id'], ['a.png', 'a car', '1']], {}),
    'usual names': ([['Cars'], ['image', 'answer'], ['a.png', 'a car']], dict(image=None, response=None)),
    'a question in a column': ([['Cars'], ['asked', 'said'], ['What is this?', 'a car']], dict(image=None, prompt='asked', response='said')),
    'boxes': ([['Cars'], ['filename', 'class', 'xmin', 'ymin', 'xmax', 'ymax'], ['a.png', 'car', 1, 2, 30, 40]], dict(image=None, response=None, family='qwen2_vl')),
    'boxes, with one name given': ([['Cars'], ['photo', 'part', 'xmin', 'ymin', 'xmax', 'ymax', 'filename'], ['a', 'car', 1, 2, 30, 40, 'a.png']], dict(image=None, response='part', family='qwen2_vl')),
    'names that occur again in a cell': ([['Cars'], ['photo', 'caption'], ['photo', 'a caption'], ['a.png', 'a car']], {}),
}

def _written(folder, rows, ending, mark=','):
    frame = pd.DataFrame(rows).fillna('').astype(str)
    if ending == 'xlsx': frame.to_excel(folder/'a.xlsx', header=False, index=False)
    else: (folder/'a.csv').write_text('\n'.join(mark.join(f'"{cell}"' if mark in cell else cell for cell in map(str, row)) for row in rows))
    return folder/f'a.{ending}'

@pytest.mark.parametrize('ending,mark', [('xlsx', ''), ('csv', ','), ('csv', ';'), ('csv', '\t')])
@pytest.mark.parametrize('rows,how', TITLED.values(), ids=TITLED)
def test_a_header_below_a_title_is_found_or_given(rows, how, ending, mark, tmp_path, capsys):
    Image.new('RGB', (56, 56)).save(tmp_path/'a.png')
    at = next(i for i, row in enumerate(rows, 1) if {*row} & {'caption', 'answer', 'said', 'class', 'part'})
    path, how = _written(tmp_path, rows, ending, mark), dict(image='photo', prompt='What is this?', response='caption') | how
    found = read_samples(path, **how)
    assert f'(header in row {at})' in capsys.readouterr().out
    assert found == read_samples(path, header=at, **how) and [s.number for s in found] == [*range(at + 1, len(rows) + 1)]
    with pytest.raises(ValueError, match=f'row {len(rows) + 1} is blank, or there is no such row'): read_samples(path, header=len(rows) + 1, **how)

@pytest.mark.parametrize('rows', [[['photo', 'caption'], ['a.png', 'caption'], ['photo', 'a caption']], [['photo', 'caption'], ['x'], ['a.png', 'a car']], [['photo', 'other', 'caption'], ['photo', 'caption', 'x']]])
def test_a_first_row_that_fits_is_the_header(rows, tmp_path, capsys):
    for ending in ('xlsx', 'csv'):
        samples = read_samples(_written(tmp_path, rows, ending), image='photo', prompt='What is this?', response='caption')
        assert len(samples) == len(rows) - 1 and 'in row' not in capsys.readouterr().out

def test_a_header_that_is_not_found_can_be_given(tmp_path):
    rows = [['Cars of 2026'], ['photo', 'caption'], ['a.png', 'a car']]
    for ending in ('xlsx', 'csv'):
        with pytest.raises(ValueError, match='header=2 takes the second row of a file'): read_samples(_written(tmp_path, rows, ending), image='picture', prompt='What is this?', response='text')
        with pytest.raises(ValueError, match=r"has no column 'picture' for the picture\. Its columns: photo, caption\.$"): read_samples(_written(tmp_path, rows, ending), image='picture', prompt='What is this?', response='caption')
    with pytest.raises(ValueError, match="did you mean 'photo'"): read_samples(tmp_path/'a.xlsx', image='foto', prompt='What is this?', response='caption', header=2)
    (tmp_path/'a.json').write_text('[{"image": "a.png", "output": "x"}]')
    for source in (tmp_path/'a.json', tmp_path, [{'output': 'x'}]):
        with pytest.raises(ValueError, match='header=2 is a row of a CSV file or an Excel sheet'): read_samples(source, prompt='What?', header=2)

def _dice(folder):
    "A folder by class whose files have the same names in each class."
    for k, words in enumerate(('five', 'six', 'two')):
        (folder/words).mkdir(parents=True)
        for i in range(6): Image.effect_noise((60, 60), 20 + 6*k + i).save(folder/words/f'die_{i}.png')

def test_rows_of_a_folder_by_class_are_named_by_their_file(tmp_path, capsys):
    _dice(tmp_path/'dice')
    for name in ('five/die_3.png', 'five/die_x.png'): (tmp_path/'dice'/name).write_bytes(b'no picture')
    samples = read_samples(tmp_path/'dice', prompt='Which side?')[2:]
    found = check_samples(samples)
    assert [*zip(found.source, found.what)] == [(f'five/{name}', f'{said} cannot be read: Pillow does not recognize it as a picture.')
                                               for name, said in (('die_3.png', 'five/die_3.png'), ('die_x.png', 'die_x.png'))]
    left = drop_samples(samples, found)
    assert '- five/die_3.png: five/die_3.png cannot be read' in capsys.readouterr().out
    assert set(check_samples(left[:1], against=left).what) == {'It is the same file as five/die_2.png of the other split.'}

def test_rows_of_a_folder_of_an_annotation_tool_are_named_by_their_file(tmp_path):
    (tmp_path/'classes.txt').write_text('car')
    for name in ('a/1', 'b/1'):
        for kind in ('images', 'labels'): (tmp_path/kind/name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((60, 60), 20).save(tmp_path/'images'/f'{name}.png')
        (tmp_path/'labels'/f'{name}.txt').write_text('0 .5 .5 .2 .2')
    samples = read_samples(tmp_path, family='qwen2_vl')
    assert [place_of(s) for s in samples] == ['a/1.png', 'b/1.png']
    (tmp_path/'voc').mkdir()
    (tmp_path/'voc'/'a.xml').write_text('<annotation><filename>../images/a/1.png</filename><size><width>60</width><height>60</height></size></annotation>')
    assert place_of(*read_samples(tmp_path/'voc', family='qwen2_vl')) == 'a.xml'

def test_names_of_files_are_as_long_as_they_must_be(tmp_path):
    names = 'a/1/x.png', 'b/1/x.png', 'b/1/y.png'
    for name in names:
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).touch()
    (tmp_path/'labels.csv').write_text('photo,caption\n' + ''.join(f'{name},a car\n' for name in names))
    samples = read_samples(tmp_path/'labels.csv', image='photo', prompt='What is this?', response='caption')
    assert list(check_samples(samples).what) == ['a/1/x.png is empty.', 'b/1/x.png is empty.', 'y.png is empty.']
    Image.new('CMYK', (60, 60)).save(tmp_path/'cmyk.jpg')
    for name in names[:2]: shutil.copy(tmp_path/'cmyk.jpg', tmp_path/name)
    assert [what[:13] for what in check_samples(samples).what if 'CMYK' in what] == ['a/1/x.png: It', 'b/1/x.png: It']

def test_copies_of_a_picture_are_one_picture(tmp_path):
    _dice(dice := tmp_path/'dice')
    shutil.copy(dice/'six'/'die_5.png', dice/'two'/'die_1.png')
    shutil.copy(dice/'six'/'die_2.png', dice/'six'/'die_9.png')
    for words in ('five', 'two'): (dice/words/'broken.png').write_bytes(b'no picture')  # of which more is said already
    found = check_samples(samples := read_samples(dice, prompt='Which side?')).query("level != 'error'")
    assert [*zip(found.source, found.level, found.what)] == [
        ('six/die_5.png', 'warning', "The answer is 'six', and that of two/die_1.png to the same prompt about the same picture is 'two'."),
        ('six/die_9.png', 'note', 'The row has the same content as six/die_2.png.'),
        ('two/die_1.png', 'warning', "The answer is 'two', and that of six/die_5.png to the same prompt about the same picture is 'six'.")]
    plain = check_samples([dict(s) for s in samples]).query("level != 'error'")
    assert [what[what.index(' (a copy: '):] for what in plain.what] == [f' (a copy: {dice}/{end}' for end in ("two/die_1.png) is 'two'.", 'six/die_2.png).', "six/die_5.png) is 'six'.")]
    asked = [s | {'instruction': f'<image>Which side, {i}?'} for i, s in enumerate(samples)]
    assert check_samples(asked).query("level != 'error'").empty  # other questions
    assert check_samples(samples, media=False).empty
    pair = {'instruction': '<image>Which side?', 'chosen': 'two', 'rejected': 'six'}
    swapped = [pair | {'images': [str(dice/'two'/'die_1.png')]}, pair | {'images': [str(dice/'six'/'die_5.png')], 'chosen': 'six', 'rejected': 'two'}]
    assert list(check_samples(swapped).what) == ['The row says the opposite of row 0.']

def test_prices_that_are_no_numbers_are_named(tmp_path):
    odd = {30: '#DIV/0!', 31: 'n/a', 32: '12,50'}
    (tmp_path/'prices.csv').write_text('item,price\n' + ''.join(f'item {n},"{odd.get(n, 4.5)}"\n' for n in range(2, 33)))
    found = check_samples(read_samples(tmp_path/'prices.csv', prompt='How much is it?', response='price'))
    assert not found.what.str.contains('is the answer of').any()
    found = found.query("level != 'note'").reset_index()  # the notes are about rows with the same content
    assert [*zip(found.source, found.level)] == [(f'row {n} of prices.csv', 'warning') for n in odd]
    assert "is '#DIV/0!', which Excel shows" in found.what[0] and 'Correct the cell' in found.cure[0]
    assert "is '12,50', and 28 of 30 to the same prompt are numbers" in found.what[2]
