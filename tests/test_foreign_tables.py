"Tables and dialogues as other tools write them: no label is cut, swallowed or turned into something else without a word."
import datetime, decimal, io, json, zipfile

import openpyxl, pyarrow as pa, pyarrow.parquet as pq, pytest
from PIL import Image

from qwen2vl_nb.data.check import check_samples
from qwen2vl_nb.data.sources import read_samples
from qwen2vl_nb.data.registry import Registry

def _picture(seed=0):
    out = io.BytesIO()
    Image.new('RGB', (40, 30), (seed*40, 0, 0)).save(out, 'PNG')
    return out.getvalue()

def _text(text, encoding='utf-8', name='a.csv'):
    def make(folder):
        (folder/name).write_bytes(text.encode(encoding))
        return folder/name
    return make

def _parquet(columns, metadata=None, **how):
    def make(folder):
        table = pa.table(columns)
        pq.write_table(table.replace_schema_metadata(metadata or {}), folder/'a.parquet', **how)
        return folder/'a.parquet'
    return make

def _excel(*sheets):
    "Sheets of (title, state, rows)."
    def make(folder):
        book = openpyxl.Workbook()
        book.remove(book.active)
        for title, state, rows in sheets:
            sheet = book.create_sheet(title)
            for row in rows: sheet.append(row)
            sheet.sheet_state = state
        book.save(folder/'a.xlsx')
        return folder/'a.xlsx'
    return make

def _formatted(folder):
    book = openpyxl.Workbook()
    sheet = book.active
    for row in [('q', 'output'), ('a', 7), ('b', 0.5), ('c', datetime.date(2024, 1, 2)), ('d', datetime.datetime(2024, 1, 2, 3, 4)), ('e', '#N/A'), ('f', True), ('g', '007'), ('h', 12.0)]: sheet.append(row)
    sheet['B2'].number_format = '000'
    book.save(folder/'a.xlsx')
    return folder/'a.xlsx'

def _far_cell(folder):
    "One forgotten cell in the last corner of the sheet."
    book = openpyxl.Workbook()
    for row in (('q', 'output'), ('a', 'A car')): book.active.append(row)
    book.active.cell(400_000, 1, ' ')
    book.save(folder/'a.xlsx')
    return folder/'a.xlsx'

HEAD, ROWS = ('q', 'output'), [('a', 'A car'), ('b', 'A bus')]
BOTH = ['A car', 'A bus']
HUGGINGFACE = lambda features: {b'huggingface': json.dumps({'info': {'features': features}}).encode()}
CLASSES = {'output': {'names': ['A car', 'A bus'], '_type': 'ClassLabel'}, 'gone': {'names': ['x'], '_type': 'ClassLabel'}}
Q = pa.array(['a', 'b'])

READ = { # name → what makes the file, the answers that it has, words that are printed
    'text stored as bytes': (_parquet({'q': Q, 'output': pa.array([b'A car', '红色的车'.encode()], pa.binary())}), ['A car', '红色的车'], ''),
    'text stored as large bytes': (_parquet({'q': Q, 'output': pa.array([b'A car', None], pa.large_binary())}), ['A car', None], ''),
    'text stored as bytes of one length': (_parquet({'q': Q, 'output': pa.array([b'car', b'bus'], pa.binary(3))}), ['car', 'bus'], ''),
    'text stored as bytes in a dictionary': (_parquet({'q': Q, 'output': pa.array([b'A car', b'A bus']).dictionary_encode()}), BOTH, ''),
    'lists of text stored as bytes': (_parquet({'q': Q, 'output': pa.array([[b'A car'], []], pa.list_(pa.binary()))}), [['A car'], []], ''),
    'text stored as bytes, one that is none': (_parquet({'q': pa.array(list('ab'*300)), 'output': pa.array([b'A car']*599 + [b'\xff\0'])}), None, '1 file(s) written'),
    'large text and decimals': (_parquet({'q': pa.array(['a', 'b'], pa.large_string()), 'output': pa.array([decimal.Decimal('1.50'), None])}), ['1.50', None], ''),
    'a map': (_parquet({'q': Q, 'output': pa.array([[('a', 1)], []], pa.map_(pa.string(), pa.int64()))}), [[['a', 1]], []], ''),
    'a class that was dropped': (_parquet({'q': Q, 'output': pa.array([0, 1])}, HUGGINGFACE(CLASSES)), BOTH, ''),
    'a class that has become text': (_parquet({'q': Q, 'output': pa.array(BOTH)}, HUGGINGFACE(CLASSES)), BOTH, ''),
    'a class number without a name': (_parquet({'q': Q, 'output': pa.array([0, 7])}, HUGGINGFACE(CLASSES)), ['A car', 7], ''),
    'a class without names': (_parquet({'q': Q, 'output': pa.array(BOTH)}, HUGGINGFACE({'output': {'names': None, '_type': 'ClassLabel'}})), BOTH, ''),
    'features that are a list': (_parquet({'q': Q, 'output': pa.array(BOTH)}, HUGGINGFACE(['output'])), BOTH, ''),
    'metadata that are damaged': (_parquet({'q': Q, 'output': pa.array(BOTH)}, {b'huggingface': b'{"info": \xff'}), BOTH, ''),
    'NUL in a cell': (_text('q,output\na,A \0red car\n'), ['A \0red car'], ''),
    'NUL in JSON lines': (_text('{"q": "a", "output": "A \\u0000red car"}\n', name='a.jsonl'), ['A \0red car'], ''),
    **{f'{encoding} without a mark': (_text('q,output\na,A car\nb,一辆蓝色的车\n', encoding), ['A car', '一辆蓝色的车'], encoding[:6].upper()) for encoding in ('utf-16-le', 'utf-16-be', 'utf-32-le', 'utf-32-be')},
    'UTF-32 with a mark': (_text('q,output\na,A car\nb,A bus\n', 'utf-32'), BOTH, 'UTF-32'),
    'JSON in UTF-16 without a mark': (_text(json.dumps([{'q': 'a', 'output': '红'}], ensure_ascii=False), 'utf-16-le', 'a.json'), ['红'], 'UTF-16'),
    'a quote that closes rows later': (_text('q,output\nx,y\na,"A car\nb,A bus\nc,A van"\nd,A tram\n'), ['y', 'A car\nb,A bus\nc,A van', 'A tram'], 'the first quote opens in line 3'),
    'cells of several lines': (_text('q,output\na,"A car.\nIt is red."\nb,"A ""bus"""\n'), ['A car.\nIt is red.', 'A "bus"'], ''),
    'a quote within a cell': (_text('q,output\na,5" wide\nb,A bus\n'), ['5" wide', 'A bus'], ''),
    'bars between cells': (_text('q|output\na|A car, red\nb|A bus\n'), ['A car, red', 'A bus'], 'bars'),
    'a line that names the separator': (_text('sep=;\nq;output\na;A car\nb;A bus\n'), BOTH, 'semicolons'),
    'the line ends of old Macs': (_text('q,output\ra,A car\rb,A bus\r'), BOTH, ''),
    'separators at the end of each line': (_text('q,output,,\na,A car,,\nb,A bus,,\n'), BOTH, ''),
    'rows shorter than the header': (_text('q,output,note\na,A car\nb,A bus,x\n'), BOTH, ''),
    'a cell of 200,000 letters': (_text(f'q,output\na,{"x"*200_000}\n'), ['x'*200_000], ''),
    'a hidden first sheet': (_excel(('old', 'hidden', [HEAD, ('a', 'wrong')]), ('new', 'visible', [HEAD, *ROWS])), BOTH, "the sheet 'new'"),
    'a very hidden first sheet': (_excel(('old', 'veryHidden', [HEAD, ('a', 'wrong')]), ('empty', 'visible', []), ('new', 'visible', [HEAD, *ROWS])), BOTH, "the sheet 'new'"),
    'what cells show': (_formatted, ['007', '0.5', '2024-01-02', '2024-01-02 03:04:00', '#N/A', 'True', '007', '12'], '1 cell(s) show an error: #N/A in B6'),
    'a forgotten cell far below': (_far_cell, ['A car'], ''),
}

@pytest.mark.parametrize('make,answers,words', READ.values(), ids=READ.keys())
def test_labels_come_through(make, answers, words, tmp_path, capsys):
    samples = read_samples(make(tmp_path), prompt='q')
    said = capsys.readouterr().out
    assert answers is None or [s['output'] for s in samples] == answers
    assert words in said and ('quote opens' in said) == ('quote opens' in words)
    assert all(s.keys() <= {'images', 'instruction', 'input', 'output', 'note'} for s in samples), samples[0].keys()

def test_pictures_stored_as_bytes_are_written_out(tmp_path):
    "Beside text that is stored as bytes, too, and one of them damaged."
    pictures = [_picture(1), b'<html>404</html>', _picture(2)]
    source = _parquet({'image': pa.array(pictures), 'q': pa.array([b'What?']*3), 'output': pa.array([b'a', b'b', b'c'])})(tmp_path)
    samples = read_samples(source, prompt='q')
    assert [open(s['images'][0], 'rb').read() for s in samples] == pictures and [s['output'] for s in samples] == ['a', 'b', 'c']
    assert check_samples(samples).row.tolist() == [1]

def _unpacks(path, part, piece, n):
    "Replace a part of a zip archive by a piece that is repeated."
    with zipfile.ZipFile(path) as old: parts = {name: old.read(name) for name in old.namelist() if name != part}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as new:
        for name, data in parts.items(): new.writestr(name, data)
        with new.open(part, 'w', force_zip64=True) as f:
            for _ in range(n): f.write(piece)
    return path

def _bomb(folder):
    rows = b'<row><c t="inlineStr"><is><t>A car</t></is></c></row>'*20_000
    return _unpacks(_excel(('a', 'visible', [HEAD, *ROWS]))(folder), 'xl/worksheets/sheet1.xml', rows, 400)

def _last_corner(folder):
    "A sheet whose rows are as wide as Excel has columns, by one cell each."
    head = '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData><row r="1"><c r="A1" t="inlineStr"><is><t>q</t></is></c><c r="XFD1" t="inlineStr"><is><t>output</t></is></c></row>'
    rows = ''.join(f'<row r="{i}"><c r="A{i}"><v>1</v></c></row>' for i in range(2, 5000))
    return _unpacks(_excel(('a', 'visible', [HEAD]))(folder), 'xl/worksheets/sheet1.xml', (head + rows + '</sheetData></worksheet>').encode(), 1)

def _many_rows(folder): return _parquet({'q': pa.array(['a']*5_000_000), 'output': pa.array(['b']*5_000_000)})(folder)

def _one_word(folder):
    words = pa.DictionaryArray.from_arrays(pa.array([0]*5000, pa.int32()), pa.array(['x'*300_000]))
    return _parquet({'q': words, 'output': words}, compression='zstd')(folder)

REFUSED = { # name → what makes the file, words of the error
    'bytes of another encoding': (_parquet({'q': Q, 'output': pa.array(['红色的车'.encode('gb18030')]*2)}), "column 'output' holds bytes that are neither"),
    'a quote that swallows rows': (_text('q,output\nx,"y\nz"\na,"A car\nb,A bus\nc,"A van"\nd,A tram\n'), 'the quote that opens a cell in line 4'),
    'a quote after other cells of several lines': (_text('q,output\n"x\ny","A car\nb,A bus\n'), 'the quote that opens a cell in line 3'),
    'a row with a cell too many': (_text('q,output\na,b\nc,d,e\nf,g,h\n'), r'than its header \(2\): line 3 has 3, line 4 has 3'),
    'rows in hidden sheets alone': (_excel(('old', 'hidden', [HEAD, *ROWS]), ('new', 'visible', [])), r'only hidden sheets have rows \(old\)'),
    'a small workbook that unpacks to 400 MB': (_bomb, 'would unpack to 4'),
    'a workbook of 16,384 columns': (_last_corner, 'rows of 16,384 cells'),
    'a small Parquet file of 5,000,000 rows': (_many_rows, 'would unpack to'),
    'a Parquet file of one long word': (_one_word, 'would unpack to'),
}

@pytest.mark.parametrize('make,words', REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_read_is_refused(make, words, tmp_path):
    path = make(tmp_path)
    with pytest.raises(ValueError, match=words) as e: read_samples(path, prompt='q')
    assert str(path) in str(e.value)

@pytest.mark.parametrize('key,value', [('images', ['p.png']), ('system', 'Be brief.')])
def test_a_column_that_begins_with_empty_rows(key, value, factory, tmp_path):
    "Where LLaMA-Factory stops there is a finding, and where it doesn't there is none."
    (tmp_path/'p.png').write_bytes(_picture())
    value = [str(tmp_path/'p.png')] if key == 'images' else value
    last = {'images': [], 'instruction': '<image>What?' if key == 'images' else 'What?', 'input': '', 'output': 'x'} | {key: value}
    for n in (999, 1000):
        samples = [{'images': [], 'instruction': f'What is {i}?', 'input': '', 'output': f'{i}'} for i in range(n)] + [last]
        found = check_samples(samples).query('level != "note"')
        Registry(tmp_path).add('x', samples)
        assert found.row.tolist() == [1000]*(n == 1000) and found.what.str.contains('considers the column empty').all()
        if n < 1000: assert len(factory.load(tmp_path, 'x')) == n + 1
        else:
            with pytest.raises(TypeError, match='to null'): factory.load(tmp_path, 'x')

# --- content parts

def _turns(asked, answered, **more): return {'messages': [{'role': 'user', 'content': asked, **more}, {'role': 'assistant', 'content': answered, **more}]}
WHAT, CAR = {'type': 'text', 'text': 'What?'}, [{'type': 'text', 'text': 'A car.'}]
IMAGES = [{'type': 'image_url', 'value': 'p.png'}, {'type': 'image_url', 'image_url': {'url': 'p.png'}}, {'type': 'image_url', 'image_url': 'p.png'}, {'type': 'image', 'image': 'p.png'}, {'image': 'p.png'},
          {'type': 'image', 'path': 'p.png'}, {'type': 'image', 'url': 'p.png'}, {'type': 'input_image', 'image_url': 'p.png'}, {'type': 'image', 'image': 'p.png', 'text': None, 'max_pixels': 9}]

@pytest.mark.parametrize('image', IMAGES, ids=json.dumps)
@pytest.mark.parametrize('key', ['text', 'value'])
def test_parts_of_every_form(image, key, factory, tmp_path):
    "Read, registered and loaded by LLaMA-Factory, they say the same."
    (tmp_path/'p.png').write_bytes(_picture())
    what = {'type': 'text', key: 'What?'}
    (tmp_path/'a.json').write_text(json.dumps([_turns([image, what], [{'type': 'text', key: 'A car.'}])]))
    samples = read_samples(tmp_path/'a.json')
    assert not len(check_samples(samples))
    Registry(tmp_path).add('x', samples)
    row, = factory.load(tmp_path, 'x')
    assert (row['_prompt'][0]['content'], row['_response'][0]['content'], row['_images']) == ('<image>What?', 'A car.', [str(tmp_path/'p.png')])

def test_llamafactorys_newer_form(factory, tmp_path, capsys):
    "1,500 rows of it, with tools, reasoning and weights."
    (tmp_path/'p.png').write_bytes(_picture())
    text = lambda words: [{'type': 'text', 'value': words}]
    plain = [{'messages': [{'role': 'system', 'content': text('Be brief.'), 'loss_weight': 0.}, {'role': 'user', 'content': [{'type': 'image_url', 'value': 'p.png'}, *text(f'Which is {i}?')], 'loss_weight': 0.},
                          {'role': 'assistant', 'content': text(f'Number {i}.'), 'loss_weight': 1.}]} for i in range(1498)]
    call = {'name': 'look_up', 'arguments': {'plate': 'AB1'}}
    rows = [{'messages': [{'role': 'user', 'content': text('Whose?'), 'loss_weight': 0.}, {'role': 'assistant', 'content': [{'type': 'tool_call', 'value': json.dumps(call)}], 'loss_weight': 1.},
                           {'role': 'tool', 'content': text('Ann'), 'loss_weight': 0.}, {'role': 'assistant', 'content': [{'type': 'reasoning', 'value': 'So it is.'}, *text("Ann's.")], 'loss_weight': 1.}],
              'tools': json.dumps([{'name': 'look_up', 'description': '', 'parameters': {'type': 'object', 'properties': {}}}])},
             {'messages': [{'role': 'user', 'content': text('And?'), 'loss_weight': 1}, {'role': 'assistant', 'content': text('No.'), 'loss_weight': 0}, {'role': 'user', 'content': text('So?')}, {'role': 'assistant', 'content': text('Yes.'), 'loss_weight': .5}]}, *plain]
    (tmp_path/'v1.json').write_text(json.dumps(rows))
    samples = read_samples(tmp_path/'v1.json')
    assert '1500 rows' in (said := capsys.readouterr().out) and 'LLaMA-Factory v1' in said and '3 turn(s) have a loss_weight' in said
    found = check_samples(samples).query('level != "note"')
    assert found.row.tolist() == [1]*3 and found.field.tolist() == ['messages[0]', 'messages[1]', 'messages[3]'] and set(found.level) == {'warning'}
    Registry(tmp_path).add('x', samples)
    loaded = factory.load(tmp_path, 'x')
    assert len(loaded) == 1500 and loaded[9]['_prompt'] == [{'role': 'user', 'content': '<image>Which is 7?'}] and loaded[9]['_system'] == 'Be brief.'
    assert [(t['role'], t['content']) for t in loaded[0]['_prompt'] + loaded[0]['_response']] == [('user', 'Whose?'), ('function', json.dumps([call])), ('observation', 'Ann'), ('assistant', "<think>\nSo it is.\n</think>\n\nAnn's.")]
    assert [t['content'] for t in loaded[1]['_prompt'] + loaded[1]['_response']] == ['And?', 'No.', 'So?', 'Yes.']

@pytest.mark.parametrize('part', [{'type': 'input_audio', 'input_audio': {'data': ''}}, {'type': 'audio', 'audio': 'a.wav'}, {'type': 'audio_url', 'value': 'a.wav'}, {'type': 'refusal', 'refusal': 'No.'}, {'type': 'file', 'file': {}},
                                  {'type': 'text', 'words': 'What?'}, {'type': 'text', 'text': 7}, {'type': 'image', 'source': {'type': 'base64', 'data': ''}}, {'type': 'image_url', 'image_url': {'file_id': 'x'}}, {'kind': 'text'}, {}, None, 7, ['a']], ids=repr)
def test_unknown_parts_are_refused_by_name(part, tmp_path):
    "With the row and the turn; several together."
    good = _turns([WHAT], CAR)
    (tmp_path/'a.json').write_text(json.dumps([good, _turns([WHAT, part], CAR), good, _turns([WHAT], [part])]))
    kind = part.get('type', '') if isinstance(part, dict) else repr(part)[:4]
    with pytest.raises(ValueError, match=r'a.json has 2 row\(s\) that cannot be read. row 1: messages\[0\] has a content part .*; row 3: messages\[1\] has') as e: read_samples(tmp_path/'a.json')
    assert kind in str(e.value)

def test_a_picture_in_a_column_keeps_its_place(tmp_path):
    "As Hugging Face's own chat data have it: the part is a placeholder alone."
    (tmp_path/'p.png').write_bytes(_picture())
    (tmp_path/'a.json').write_text(json.dumps([_turns([{'type': 'image', 'index': 0, 'text': None}, WHAT], CAR) | {'images': ['p.png']}]))
    sample, = read_samples(tmp_path/'a.json')
    assert sample['messages'][0]['content'] == '<image>What?' and sample['images'] == [str(tmp_path/'p.png')]
