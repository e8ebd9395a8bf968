"""The corpus of bad input: kinds of bad pictures, clips, text, rows and files, each made by code, each with what must be found.

A bad row stands between two sound ones, which must stay without findings; each finding has a field, a level, words and a cure."""
import json, os, random, struct, zipfile, zlib

import av, datasets, pandas as pd, pytest
from PIL import Image, ImageOps

from qwen2vl_nb.data.check import check_samples, mend_samples
from qwen2vl_nb.data.registry import Registry
from qwen2vl_nb.data.sources import read_samples
from qwen2vl_nb.files import short_path

# --- what the kinds are made of

def _noise(seed=0, size=(60, 40), mode='RGB'): return Image.frombytes(mode, size, random.Random(seed).randbytes(size[0]*size[1]*len(Image.new(mode, (1, 1)).getbands())))

def _save(path, im=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (im or _noise()).save(path, **options)
    return path

def _bytes(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path

def _cut(path, keep=.5, front=False):
    data = path.read_bytes()
    n = int(len(data)*keep)
    return _bytes(path, data[-n:] if front else data[:n])

def _as(path, to): return path.rename(path.with_name(to))

def _chunk(kind, body): return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))

def _png_head(path, width, height):
    "A PNG of a few bytes that claims a size; its checksums are right."
    rows = zlib.compress(bytes(100))
    return _bytes(path, b'\x89PNG\r\n\x1a\n' + _chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)) + _chunk(b'IDAT', rows) + _chunk(b'IEND', b''))

def _turned(path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return _save(path, exif=exif)

def _frames(path, n=3, **options): return _save(path, save_all=True, append_images=[_noise(i) for i in range(1, n)], **options)

def _clear_palette(path):
    im = _noise(mode='L').convert('P')
    return _save(path, im, transparency=int(im.getpixel((0, 0))))

def _broken_checksum(path):
    data = bytearray(_save(path).read_bytes())
    data[29] ^= 255  # of the header
    return _bytes(path, bytes(data))

def _clip(path, frames=16, codec='libx264', pixels='yuv420p', rate=8, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), 'w', options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        for i in range(frames): container.mux(stream.encode(av.VideoFrame.from_image(_noise(i, (64, 48)))))
        container.mux(stream.encode())
    return path

def _cut_after(path, n):
    "A clip cut off after so many of its frames, as the file holds them."
    with av.open(str(path)) as container: starts = sorted(p.pos for p in container.demux(video=0) if p.size)
    return _bytes(path, path.read_bytes()[:starts[n]])

def _sound(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('aac', rate=16000, layout='mono')
        frame = av.AudioFrame(format='fltp', layout='mono', samples=1024)
        frame.planes[0].update(bytes(4*1024))
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path

def _turned_clip(path):
    "A clip whose header says a quarter turn, as telephones write it."
    data = bytearray(_clip(path).read_bytes())
    matrix = data.index(b'tkhd') + 44
    data[matrix:matrix+36] = struct.pack('>9i', 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    return _bytes(path, bytes(data))

def _question(n=0, **changes): return {'images': [], 'instruction': f'What is number {n}?', 'input': '', 'output': f'A car, number {n}.'} | changes
def _said(*turns): return [{'role': role, 'content': text} for role, text in turns]
def _dialogue(n=0, *turns, **changes): return {'images': [], 'messages': _said(*(turns or [('user', f'What is number {n}?'), ('assistant', f'A car, number {n}.')]))} | changes

def _check(samples, meant, **how):
    "Assert that exactly `meant`, row → [(field, level, words)], is found."
    table = check_samples(samples, **how)
    found = {}
    for f in table.itertuples():
        found.setdefault(f.row, []).append((f.field, f.level, f.what))
    assert found.keys() == meant.keys(), table.to_string()
    assert table.cure.map(lambda cure: isinstance(cure, str) and bool(cure.strip())).all(), table.to_string()
    for row, faults in meant.items():
        assert len(found[row]) == len(faults), table.to_string()
        for field, level, words in faults: assert any((field, level) == f[:2] and words in f[2] for f in found[row]), (field, level, words, found[row])

# --- pictures

PICTURES = { # name → what makes it, its level, words
    'a picture that is missing': (lambda f: f/'gone.png', 'error', 'There is no file'),
    'a picture named in another case': (lambda f: _save(f/'p'/'Car.PNG').with_name('car.png'), 'error', 'There is Car.PNG, which differs only in case'),
    'a folder for a picture': (lambda f: f, 'error', 'is a folder'),
    'an empty path': (lambda f: ' ', 'error', 'The path is empty'),
    'a path that is a number': (lambda f: 7, 'error', 'The path is 7, not text'),
    'a path that is null': (lambda f: None, 'error', 'The path is None, not text'),
    'a path in an object': (lambda f: {'url': 'a.png'}, 'error', "The path is {'url': 'a.png'}, not text"),
    'a list in the list of paths': (lambda f: ['a.png'], 'error', "The path is ['a.png'], not text"),
    'a path with a NUL': (lambda f: f'{f}/a\0b.png', 'error', 'There is no file'),
    'a path of 5000 letters': (lambda f: f'{f}/{"a"*5000}.png', 'error', 'There is no file'),
    'a web address': (lambda f: 'https://example.com/car.png', 'error', 'is a web address'),
    'a picture in the row': (lambda f: 'data:image/png;base64,####', 'error', 'The picture is in the row itself'),
    'zero bytes': (lambda f: _bytes(f/'a.png', b''), 'error', 'a.png is empty'),
    'PNG, cut off': (lambda f: _cut(_save(f/'a.png')), 'error', 'cannot be read'),
    'PNG, cut off in its last bytes': (lambda f: _cut(_save(f/'a.png'), .9), 'error', 'truncated'),
    'PNG with a broken checksum': (lambda f: _broken_checksum(f/'a.png'), 'error', 'cannot be read'),
    'JPEG, cut off': (lambda f: _cut(_save(f/'a.jpg')), 'error', 'truncated'),
    'WebP, cut off': (lambda f: _cut(_save(f/'a.webp')), 'error', 'cannot be read'),
    'GIF, cut off': (lambda f: _cut(_save(f/'a.gif')), 'error', 'truncated'),
    'TIFF, cut off': (lambda f: _cut(_save(f/'a.tif')), 'error', 'cannot be read'),
    'BMP, cut off': (lambda f: _cut(_save(f/'a.bmp')), 'error', 'truncated'),
    'only the head of a JPEG': (lambda f: _bytes(f/'a.jpg', b'\xff\xd8\xff\xe0'), 'error', 'cannot be read'),
    'a web page': (lambda f: _bytes(f/'a.jpg', '\n<!DOCTYPE html><title>404</title>'), 'error', 'it is a web page'),
    'a PDF': (lambda f: _bytes(f/'a.jpg', '%PDF-1.7\n'), 'error', 'it is a PDF'),
    'a zip archive': (lambda f: _bytes(f/'a.png', b'PK\x03\x04' + bytes(40)), 'error', 'it is a zip archive'),
    'a drawing in SVG': (lambda f: _bytes(f/'a.png', '<svg xmlns="http://www.w3.org/2000/svg"/>'), 'error', 'it is an SVG drawing'),
    'a Git LFS pointer': (lambda f: _bytes(f/'a.png', 'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n'), 'error', 'git lfs pull'),
    'a HEIC photograph': (lambda f: _bytes(f/'a.jpg', b'\0\0\0\x18ftypheic' + bytes(60)), 'error', 'a HEIC photograph'),
    'random bytes': (lambda f: _bytes(f/'a.png', random.Random(0).randbytes(999)), 'error', 'cannot be read'),
    'a PNG with the ending .jpg': (lambda f: _as(_save(f/'a.png'), 'a.jpg'), 'warning', 'It is a PNG file with the extension .jpg'),
    'a JPEG with the ending .png': (lambda f: _as(_save(f/'a.jpg'), 'a.png'), 'warning', 'It is a JPEG file with the extension .png'),
    'a picture with no ending': (lambda f: _as(_save(f/'a.webp'), 'a'), 'warning', 'It is a WEBP file with no extension'),
    'a picture with an unknown ending': (lambda f: _as(_save(f/'a.png'), 'a.photo'), 'warning', 'It is a PNG file with the extension .photo'),
    'an animated GIF': (lambda f: _frames(f/'a.gif'), 'warning', 'It has 3 frames or pages'),
    'an animated WebP': (lambda f: _frames(f/'a.webp', 4), 'warning', 'It has 4 frames or pages'),
    'an animated PNG': (lambda f: _frames(f/'a.png'), 'warning', 'It has 3 frames or pages'),
    'a TIFF with pages': (lambda f: _frames(f/'a.tif', 2), 'warning', 'It has 2 frames or pages'),
    'a CMYK JPEG': (lambda f: _save(f/'a.jpg', _noise(mode='CMYK')), 'warning', 'Its colours are CMYK'),
    'a LAB TIFF': (lambda f: _save(f/'a.tif', _noise(mode='LAB')), 'warning', 'Its colours are LAB'),
    '16 bits per channel': (lambda f: _save(f/'a.png', Image.new('I;16', (40, 40), 999)), 'warning', '16 bits per channel'),
    '32-bit floats': (lambda f: _save(f/'a.tif', Image.new('F', (40, 40), .5)), 'warning', '32-bit numbers'),
    '32-bit integers': (lambda f: _save(f/'a.tif', Image.new('I', (40, 40), 70_000)), 'warning', '32-bit numbers'),
    'transparent parts': (lambda f: _save(f/'a.png', _noise(mode='RGBA')), 'warning', 'transparent parts'),
    'transparent parts, grey': (lambda f: _save(f/'a.png', _noise(mode='LA')), 'warning', 'transparent parts'),
    'a transparent colour of a palette': (lambda f: _clear_palette(f/'a.png'), 'warning', 'transparent parts'),
    'a transparent colour of RGB': (lambda f: _save(f/'a.png', Image.new('RGB', (40, 40), 'red'), transparency=(255, 0, 0)), 'warning', 'transparent parts'),
    **{f'EXIF orientation {n}': (lambda f, n=n: _turned(f/'a.jpg', n), 'warning', f'orientation {n}') for n in range(2, 9)},
    'a PNG with EXIF orientation': (lambda f: _turned(f/'a.png', 6), 'warning', 'orientation 6'),
    'a decompression bomb': (lambda f: _png_head(f/'a.png', 50_000, 50_000), 'error', 'decompression bomb'),
    'just more pixels than Pillow likes': (lambda f: _save(f/'a.png', Image.new('1', (10_000, 9_000))), 'warning', 'It has 10000×9000 pixels'),
    'a pipe': (lambda f: os.mkfifo(f/'a.png') or f/'a.png', 'error', 'is not a regular file'),
    'a device': (lambda f: (f/'a.png').symlink_to('/dev/zero') or f/'a.png', 'error', 'is not a regular file'),
    'a PNG that claims no pixels': (lambda f: _png_head(f/'a.png', 0, 10), 'error', 'cannot be read'),
    'a thread of one pixel': (lambda f: _save(f/'a.png', Image.new('L', (700_000, 1))), 'error', 'one side would have no pixels left'),
    'a strip of 250:1': (lambda f: _save(f/'a.png', Image.new('RGB', (1000, 4))), 'warning', 'more than 200:1'),
    'a strip of 1:250': (lambda f: _save(f/'a.png', Image.new('RGB', (4, 1000))), 'warning', 'more than 200:1'),
}

@pytest.mark.parametrize('make,level,words', PICTURES.values(), ids=PICTURES.keys())
def test_pictures(make, level, words, tiny, tmp_path):
    made, good = make(tmp_path), str(_save(tmp_path/'good.png'))
    paths = [good, str(made) if isinstance(made, os.PathLike) else made, good]
    rows = [_question(i, images=[p], instruction=f'<image>What is number {i}?') for i, p in enumerate(paths)]
    _check(rows, {1: [('images', level, words)]}, model=tiny)
    if isinstance(paths[1], str): _check(rows, {}, model=tiny, media=False)

# --- text, tags, roles

NOT_TEXT = 'not text: LLaMA-Factory would drop the row or stop'

QUESTIONS = { # name → changes of a question, findings
    'no prompt': (dict(instruction=''), ('instruction', 'warning', 'The prompt is empty')),
    'a prompt of blanks': (dict(instruction=' \n\t\u3000'), ('instruction', 'warning', 'The prompt is empty')),
    'a prompt of a zero-width space': (dict(instruction='\u200b'), ('instruction', 'warning', 'The prompt is empty')),
    'no answer': (dict(output=''), ('output', 'warning', 'The answer is empty')),
    'an answer of blanks': (dict(output='\xa0 \n'), ('output', 'warning', 'The answer is empty')),
    'an answer that is null': (dict(output=None), ('output', 'error', 'The answer is None')),
    'an answer that is a number': (dict(output=3), ('output', 'error', NOT_TEXT)),
    'an answer that is true': (dict(output=True), ('output', 'error', 'The answer is True')),
    'an answer that is a list': (dict(output=['car', 'red']), ('output', 'error', NOT_TEXT)),
    'an answer that is an object': (dict(output={'item': 'car'}), ('output', 'error', NOT_TEXT)),
    'an answer that is NaN': (dict(output=float('nan')), ('output', 'error', 'The answer is nan'), ('output', 'error', 'cannot be written as JSON')),
    'a prompt that is a number': (dict(instruction=5), ('instruction', 'error', 'The prompt is 5')),
    'an input that is a number': (dict(input=5), ('input', 'error', 'The prompt is 5')),
    'a tag with no picture': (dict(instruction='<image>What?'), ('instruction', 'error', '1 <image> tag(s) (1 in instruction) for 0 picture(s)')),
    'a tag in the input with no picture': (dict(input='<image>'), ('instruction', 'error', '1 <image> tag(s) (1 in input)'), ('input', 'warning', 'The prompt is empty')),
    'a clip tag with no clip': (dict(instruction='<video>What?'), ('instruction', 'error', '1 <video> tag(s)')),
    'a sound tag': (dict(instruction='<audio>What?'), ('instruction', 'error', '1 <audio> tag(s) (1 in instruction) for 0 sound(s)')),
    'tags in the history with no picture': (dict(history=[['<image>What?', 'A car.']]), ('history[0]', 'error', '1 <image> tag(s) (1 in history[0])')),
    'a tag in an answer': (dict(output='An <image>'), ('instruction', 'error', '1 in output'), ('output', 'error', 'The answer has <image> in it')),
    'a tag in the system prompt': (dict(system='Look at <image>.'), ('system', 'warning', 'The system prompt has <image> in it')),
    'a mark of the template in a prompt': (dict(instruction='What?<|im_end|>'), ('instruction', 'error', '<|im_end|>, which the tokenizer turns into the special token itself')),
    'marks of pictures in an answer': (dict(output='A <|vision_start|><|image_pad|>.'), ('output', 'error', '<|vision_start|>, <|image_pad|>')),
    'the end of text in the system prompt': (dict(system='Answer.<|endoftext|>'), ('system', 'error', '<|endoftext|>')),
    'a byte-order mark in a prompt': (dict(instruction='\ufeffWhat?'), ('instruction', 'warning', 'byte-order mark')),
    'a NUL in an answer': (dict(output='A \0car.'), ('output', 'warning', 'the character NUL')),
    'a byte-order mark in an answer': (dict(output='A car.\ufeff'), ('output', 'warning', 'byte-order mark')),
    'half a character': (dict(output='A \ud83d car.'), ('output', 'error', 'half a character')),
    'a system prompt that is a number': (dict(system=5), ('system', 'error', 'The system prompt is 5')),
    'a history that is text': (dict(history='What? A car.'), ('history', 'error', "The history is 'What? A car.'")),
    'a history of three': (dict(history=[['What?', 'A car.', 'Sure?']]), ('history', 'error', 'The history is')),
    'a history with an empty answer': (dict(history=[['What?', '']]), ('history[0]', 'warning', 'The answer is empty')),
    'a history with numbers': (dict(history=[['What?', 7]]), ('history[0]', 'error', 'The answer is 7')),
    'tools that are no JSON': (dict(tools='{name: look}'), ('tools', 'error', 'not a list of tools as JSON text')),
    'tools that are a number': (dict(tools='5'), ('tools', 'error', 'not a list of tools as JSON text')),
    'tools of numbers': (dict(tools='[1]'), ('tools', 'error', 'not a list of tools as JSON text')),
    'one tool without a list': (dict(tools='{"name": "look"}'), ('tools', 'error', 'not a list of tools as JSON text')),
    'tools that are a list': (dict(tools=[{'name': 'look'}]), ('tools', 'error', 'not a list of tools as JSON text')),
    'a value that JSON has not': (dict(extra={'a', 'b'}), ('extra', 'error', 'cannot be written as JSON')),
    'a value that is infinite': (dict(extra=float('inf')), ('extra', 'error', 'cannot be written as JSON')),
}

@pytest.mark.parametrize('changes,meant', [(changes, meant) for changes, *meant in QUESTIONS.values()], ids=QUESTIONS.keys())
def test_questions(changes, meant, tiny):
    _check([_question(0), _question(1, **changes), _question(2)], {1: meant}, model=tiny)

DIALOGUES = { # name → turns, or changes of a dialogue; findings
    'no turns': ([], ('messages', 'error', 'There are no turns')),
    'the system alone': ([('system', 'Be short.')], ('messages', 'error', 'There are no turns')),
    'no answer at the end': ([('user', 'a'), ('assistant', 'b'), ('user', 'c')], ('messages[2]', 'error', 'The last turn is not an answer')),
    'two prompts in a row': ([('user', 'a'), ('user', 'b'), ('assistant', 'c')], ('messages[1]', 'error', "The role is 'user', where assistant")),
    'two answers in a row': ([('user', 'a'), ('assistant', 'b'), ('assistant', 'c')], ('messages[2]', 'error', "The role is 'assistant', where user")),
    'the answer first': ([('assistant', 'a'), ('user', 'b')], ('messages[0]', 'error', "The role is 'assistant', where user")),
    'a role of another trainer': ([('human', 'a'), ('gpt', 'b')], ('messages[0]', 'error', "The role is 'human'")),
    'a role in capitals': ([('User', 'a'), ('Assistant', 'b')], ('messages[0]', 'error', "The role is 'User'")),
    'a role that is a list': ([(['user'], 'a'), ('assistant', 'b')], ('messages[0]', 'error', "The role is ['user']")),
    'a role that is an object': ([({}, 'a'), ('assistant', 'b')], ('messages[0]', 'error', 'The role is {}')),
    'a role that is null': ([(None, 'a'), ('assistant', 'b')], ('messages[0]', 'error', 'The role is None')),
    'the system in the middle': ([('user', 'a'), ('system', 'b'), ('assistant', 'c')], ('messages[1]', 'error', "The role is 'system', where assistant")),
    'a prompt that is empty': ([('user', ''), ('assistant', 'b')], ('messages[0]', 'warning', 'The prompt is empty')),
    'an answer that is empty, later': ([('user', 'a'), ('assistant', 'b'), ('user', 'c'), ('assistant', ' ')], ('messages[3]', 'warning', 'The answer is empty')),
    'an empty system prompt': ([('system', ''), ('user', 'a'), ('assistant', 'b')], ('messages[0]', 'warning', 'The system prompt is empty')),
    'content in parts': ([('user', [{'type': 'text', 'text': 'a'}]), ('assistant', 'b')], ('messages[0]', 'error', NOT_TEXT)),
    'content that is null': ([('user', 'a'), ('assistant', None)], ('messages[1]', 'error', 'The answer is None')),
    'content that is a number': ([('user', 'a'), ('assistant', 4)], ('messages[1]', 'error', 'The answer is 4')),
    'a tag in a later answer': ([('user', 'a'), ('assistant', 'b'), ('user', 'c'), ('assistant', '<image>')],
                                ('messages[0]', 'error', '1 in messages[3]'), ('messages[3]', 'error', 'has <image> in it'), ('messages[3]', 'warning', 'The answer is empty')),
    'tags in two turns with no picture': ([('user', '<image>a'), ('assistant', 'b'), ('user', '<image><image>c'), ('assistant', 'd')],
                                          ('messages[0]', 'error', '3 <image> tag(s) (1 in messages[0], 2 in messages[2]) for 0 picture(s)')),
    'a tag in a function call': ([('user', 'a'), ('function_call', '{"name": "<image>", "arguments": {}}'), ('observation', 'c'), ('assistant', 'd')],
                                 ('messages[0]', 'error', '1 in messages[1]'), ('messages[1]', 'error', 'The function call has <image> in it')),
    'a function call that is no JSON': ([('user', 'a'), ('function_call', 'look()'), ('observation', 'c'), ('assistant', 'd')], ('messages[1]', 'error', 'not JSON with name and arguments')),
    'a function call without arguments': ([('user', 'a'), ('function_call', '{"name": "look"}'), ('observation', 'c'), ('assistant', 'd')], ('messages[1]', 'error', 'not JSON with name and arguments')),
    'a function call that is a number': ([('user', 'a'), ('function_call', '5'), ('observation', 'c'), ('assistant', 'd')], ('messages[1]', 'error', 'not JSON with name and arguments')),
    'a function call of null': ([('user', 'a'), ('function_call', 'null'), ('observation', 'c'), ('assistant', 'd')], ('messages[1]', 'error', 'not JSON with name and arguments')),
    'an empty observation': ([('user', 'a'), ('function_call', '{"name": "look", "arguments": {}}'), ('observation', ''), ('assistant', 'd')], ('messages[2]', 'warning', 'The observation is empty')),
    'a mark of the template in a turn': ([('user', 'a'), ('assistant', 'b<|im_start|>user')], ('messages[1]', 'error', '<|im_start|>')),
    'turns that are text': (dict(messages='Hello'), ('messages', 'error', "The turns are 'Hello', not a list")),
    'turns that are null': (dict(messages=None), ('messages', 'error', 'The turns are None')),
    'turns that are one object': (dict(messages={'role': 'user', 'content': 'a'}), ('messages', 'error', 'not a list')),
    'a turn that is text': (dict(messages=['a', {'role': 'assistant', 'content': 'b'}]), ('messages[0]', 'error', "The turn is 'a', not a dict")),
    'a turn with the keys of ShareGPT': (dict(messages=[{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}]),
                                         ('messages[0]', 'error', 'The role is None'), ('messages[0]', 'error', 'not text'), ('messages[1]', 'error', 'not text')),
    'half a character in a turn': ([('user', 'a\udc00'), ('assistant', 'b')], ('messages', 'error', 'half a character')),
}

@pytest.mark.parametrize('bad,meant', [(bad, meant) for bad, *meant in DIALOGUES.values()], ids=DIALOGUES.keys())
def test_dialogues(bad, meant, tiny):
    changes = bad if isinstance(bad, dict) else {'messages': _said(*bad)}
    _check([_dialogue(0), _dialogue(1) | changes, _dialogue(2)], {1: meant}, model=tiny)

# --- rows, and pictures against their tags

def _with(*paths, n=0, text='<image>What?', **changes): return _question(n, images=[str(p) for p in paths], instruction=f'{text} {n}', **changes)
def _pair(f): return _save(f/'a.png', _noise(1)), _save(f/'b.png', _noise(2))

def _two_splits(f, first, second):
    "Rows of two splits with sound pictures of their own beside the two that are given."
    mine, theirs = _save(f/'mine.png', _noise(7)), _save(f/'theirs.png', _noise(8))
    return [_with(mine, n=0), _with(first, n=1), _with(mine, n=2)], dict(against=[_with(theirs, n=3), _with(second, n=4)])

def _smooth(seed, size=(96, 72)):
    "A picture with large shapes, as photographs have."
    return _noise(seed, (6, 5)).resize(size, Image.Resampling.BICUBIC)

def _again(f, name, **options):
    "A smooth picture saved twice, the second time in another way."
    size = options.pop('size', (96, 72))
    return _save(f/'a.png', _smooth(1)), _save(f/name, _smooth(1).resize(size), **options)

ROWS = { # name → (samples, how they are checked), row → findings
    'a row that is null': (lambda f: ([_question(0), None, _question(2)], {}), {1: [('', 'error', 'The row is None, not a dict')]}),
    'a row that is text': (lambda f: ([_question(0), 'What?', _question(2)], {}), {1: [('', 'error', "The row is 'What?', not a dict")]}),
    'a row that is a list': (lambda f: ([_question(0), [_question(1)], _question(2)], {}), {1: [('', 'error', 'not a dict')]}),
    'a row with nothing in it': (lambda f: ([_question(0), {}, _question(2)], {}), {1: [('instruction', 'warning', 'The prompt is empty'), ('output', 'error', 'The answer is None')]}),
    'a picture without a tag': (lambda f: ([_question(0), _with(_pair(f)[0], text='What?'), _question(2)], {}), {1: [('instruction', 'error', '0 <image> tag(s) for 1 picture(s)')]}),
    'one tag for two pictures': (lambda f: ([_question(0), _with(*_pair(f)), _question(2)], {}), {1: [('instruction', 'error', '1 <image> tag(s) (1 in instruction) for 2 picture(s)')]}),
    'two tags for one picture': (lambda f: ([_question(0), _with(_pair(f)[0], text='<image><image>'), _question(2)], {}), {1: [('instruction', 'error', '2 <image> tag(s)')]}),
    'a prompt of a tag alone': (lambda f: ([_question(0), _question(1, images=[str(_pair(f)[0])], instruction='<image>'), _question(2)], {}), {1: [('instruction', 'warning', 'The prompt is empty')]}),
    'a clip tag for a picture': (lambda f: ([_question(0), _with(_pair(f)[0], text='<video>What?'), _question(2)], {}),
                                 {1: [('instruction', 'error', '0 <image> tag(s)'), ('instruction', 'error', '1 <video> tag(s)')]}),
    'the second of two pictures missing': (lambda f: ([_question(0), _with(_pair(f)[0], f/'gone.png', text='<image><image>'), _question(2)], {}), {1: [('images', 'error', 'There is no file')]}),
    'both pictures bad': (lambda f: ([_question(0), _with(f/'gone.png', _bytes(f/'e.png', b''), text='<image><image>'), _question(2)], {}),
                          {1: [('images', 'error', 'There is no file'), ('images', 'error', 'e.png is empty')]}),
    'a bad picture in two rows': (lambda f: ([_with(f/'gone.png', n=0), _question(1), _with(f/'gone.png', n=2)], {}), {i: [('images', 'error', 'gone.png')] for i in (0, 2)}),
    'the same id twice': (lambda f: ([_question(0, id='a'), _question(1, id='b'), _question(2, id='a')], {}), {2: [('id', 'warning', "The id 'a' is also that of row 0")]}),
    'the same number for an id, three times': (lambda f: ([_question(i, id=7) for i in range(3)], {}), {i: [('id', 'warning', 'The id 7')] for i in (1, 2)}),
    'a column of two types': (lambda f: ([_question(0, year=1999), _question(1, year='1999'), _question(2, year=2000)], {}), {1: [('year', 'error', "'year' is text here and a number before")]}),
    'a column of lists and text': (lambda f: ([_question(0, colours=['red']), _question(1, colours='red'), _question(2, colours=[])], {}), {1: [('colours', 'error', "'colours' is text here and a list before")]}),
    'a column of lists of two types': (lambda f: ([_question(0), _question(1, box=[1, 'x']), _question(2)], {}), {1: [('box', 'error', "'box' does not fit the rows before")]}),
    'a list of another type in the middle': (lambda f: ([_question(0, box=['a']), _question(1, box=[7]), _question(2, box=['a'])], {}), {1: [('box', 'error', "'box' does not fit the rows before")]}),
    'half a character in a list': (lambda f: ([_question(0, k=['a']), _question(1, k=['\ud83d']), _question(2, k=['b'])], {}), {1: [('k', 'error', 'half a character')]}),
    'half a character in a key': (lambda f: ([_question(0), _question(1) | {'\ud83d': 'a'}, _question(2)], {}), {1: [('', 'error', 'half a character')]}),
    'a list that holds itself': (lambda f: ([_question(0), _question(1, box=(box := []) or box.append(box) or box), _question(2)], {}), {1: [('box', 'error', 'cannot be written as JSON')]}),
    'pictures under two keys': (lambda f: ([_question(0), _question(1) | {'image': ['a.png']}, _question(2)], {}), {1: [('image', 'warning', "There is also the key 'images'")]}),
    'a rare answer in dialogues': (lambda f: ([{'images': [], 'messages': [{'role': 'user', 'content': f'{i}?'}, {'role': 'assistant', 'content': 'dog' if i == 4 else 'cat'}]} for i in range(30)], {}), {4: [('output', 'note', "'dog' is the answer of 1 row(s), 'cat' of 29")]}),
    'the frames of a clip in the other split': (lambda f: ([_question(0), _question(1, videos=[list(map(str, _pair(f)))], instruction='<video>What?')], dict(against=[_question(2), _question(3, videos=[list(map(str, _pair(f)))])])),
                                                {1: [('videos', 'warning', 'the same file as a.png in row 1'), ('videos', 'warning', 'the same file as b.png in row 1')]}),
    'keys that differ by NUL alone': (lambda f: ([_question(i, box={'': 1, '\0': 2}) for i in range(3)], {}), {i: [('box', 'error', 'character NUL')] for i in range(3)}),
    'a row of text alone in both splits': (lambda f: ([_question(0), _question(1)], dict(against=[_question(7), _question(1)])), {1: [('', 'warning', 'has the same content as row 1 of the other split')]}),
    'a weight of an answer': (lambda f: ([_dialogue(0), {'images': [], 'messages': [{'role': 'user', 'content': 'a', 'loss_weight': 0.}, {'role': 'assistant', 'content': 'b', 'loss_weight': .5}]}, _dialogue(2)], {}),
                              {1: [('messages[1]', 'warning', 'loss_weight is 0.5, which LLaMA-Factory treats as 1')]}),
    'a system prompt twice': (lambda f: ([_question(0), {'images': [], 'system': 'Be brief.', 'messages': [{'role': r, 'content': 'x'} for r in ('system', 'user', 'assistant')]}, _question(2)], {}), {1: [('system', 'warning', 'two system prompts')]}),
    'a mark in a column of two types': (lambda f: ([_question(0, year='1999'), _question(1, year='2000'), _question(2, input=0), _question(3, input='\ufeffWhy?')], {}),
                                        {2: [('input', 'error', "'input' is a number here and text before")], 3: [('input', 'warning', 'byte-order mark')]}),
    'the same row twice': (lambda f: ([_question(0), _question(1), _question(0, id=5)], {}), {2: [('', 'note', 'has the same content as row 0')]}),
    'the same dialogue twice': (lambda f: ([_dialogue(0), _dialogue(1), _dialogue(0)], {}), {2: [('', 'note', 'has the same content as row 0')]}),
    'a rare answer': (lambda f: ([_question(i, output='dog' if i == 4 else 'cat') for i in range(30)], {}), {4: [('output', 'note', "'dog' is the answer of 1 row(s), 'cat' of 29")]}),
    'an empty answer among classes': (lambda f: ([_question(i, output='' if i == 4 else 'cat dog'.split()[i%2]) for i in range(30)], {}), {4: [('output', 'warning', 'The answer is empty')]}),
    'more text than cutoff_len': (lambda f: ([_question(0), _question(1, output='A car. '*100), _question(2)], dict(cutoff_len=120)), {1: [('', 'warning', 'above cutoff_len 120 it is cut off')]}),
    'a picture above cutoff_len': (lambda f: ([_question(0), _with(_save(f/'a.png', _noise(0, (560, 560))), n=1), _question(2)], dict(cutoff_len=300)),
                                   {1: [('', 'error', '400 of them for its pictures or clips: above cutoff_len 300 it is cut in the middle of a picture')]}),
    'pictures above cutoff_len together': (lambda f: ([_question(0), _with(*[_save(f/'a.png', _noise(0, (280, 280)))]*4, text='<image>'*4), _question(2)], dict(cutoff_len=399)),
                                           {1: [('', 'error', '400 of them for its pictures')]}),
    'a picture of the other split': (lambda f: _two_splits(f, *[_save(f/'a.png')]*2), {1: [('images', 'warning', 'the same file as a.png in row 1 of the other split')]}),
    'a copy of a picture of the other split': (lambda f: _two_splits(f, *[_save(f/n/'a.png') for n in ('one', 'two')]), {1: [('images', 'warning', 'the same file as a.png')]}),
    'a copy under another name': (lambda f: _two_splits(f, *[_save(f/n) for n in ('a.png', 'b.png')]), {1: [('images', 'warning', 'a.png: It is the same file as b.png')]}),
    'a picture saved again as JPEG': (lambda f: _two_splits(f, *_again(f, 'b.jpg', quality=70)), {1: [('images', 'warning', 'nearly the same as b.jpg')]}),
    'a picture scaled down': (lambda f: _two_splits(f, *_again(f, 'b.png', size=(64, 48))), {1: [('images', 'warning', 'nearly the same as b.png')]}),
    'a drawing in another colour is another picture': (lambda f: _two_splits(f, *[_save(f/f'{c}.png', ImageOps.colorize(_smooth(1).convert('L'), 'black', c)) for c in ('red', 'blue')]), {}),
    'a broken picture in both splits': (lambda f: _two_splits(f, *[_bytes(f/n, 'no picture') for n in ('a.png', 'b.png')]),
                                        {1: [('images', 'error', 'cannot be read'), ('images', 'warning', 'the same file as b.png')]}),
    'a missing picture in both splits': (lambda f: _two_splits(f, f/'a.png', f/'a.png'), {1: [('images', 'error', 'There is no file'), ('images', 'warning', 'the same file as a.png')]}),
    'a clip of the other split': (lambda f: ([_question(0), _question(1, videos=[str(_clip(f/'a.mp4'))], instruction='<video>What?')],
                                             dict(against=[_question(2), _question(3, videos=[str(_clip(f/'b.mp4', movflags='faststart'))]), _question(4, videos=[str(f/'a.mp4')])])),
                                  {1: [('videos', 'warning', 'the same file as a.mp4 in row 2 of the other split')]}),
}

@pytest.mark.parametrize('make,meant', ROWS.values(), ids=ROWS.keys())
def test_rows(make, meant, tiny, tmp_path):
    samples, how = make(tmp_path)
    _check(samples, meant, **dict(model=tiny) | how)

# --- clips

CLIPS = { # name → what makes it, findings
    'a clip that is missing': (lambda f: f/'gone.mp4', ('error', 'There is no file')),
    'a clip of zero bytes': (lambda f: _bytes(f/'a.mp4', b''), ('error', 'a.mp4 is empty')),
    'a folder for a clip': (lambda f: f, ('error', 'is a folder')),
    'a clip at a web address': (lambda f: 'https://example.com/a.mp4', ('warning', 'is a web address')),
    'a clip in a bucket': (lambda f: 's3://bucket/a.mp4', ('error', 'is a web address')),
    'a playlist': (lambda f: _bytes(f/'a.mp4', f'ffconcat version 1.0\nfile {_clip(f/"b.mp4").name}\n'), ('warning', 'is a playlist')),
    'a pipe for a clip': (lambda f: os.mkfifo(f/'a.mp4') or f/'a.mp4', ('error', 'is not a regular file')),
    'MP4, cut off in a frame': (lambda f: _cut(_clip(f/'a.mp4', movflags='faststart'), .6), ('error', 'cannot be decoded')),
    'MP4 that promises more frames than it has': (lambda f: _cut_after(_clip(f/'a.mp4', movflags='faststart'), 9), ('error', 'Its header promises 16 frames, but it has')),
    'MP4, cut off after its header': (lambda f: _cut_after(_clip(f/'a.mp4', movflags='faststart'), 0), ('error', 'None of its frames can be decoded')),
    'MP4 without its header at the end': (lambda f: _cut(_clip(f/'a.mp4'), .9), ('error', 'cannot be decoded')),
    'MP4 without its beginning': (lambda f: _cut(_clip(f/'a.mp4'), .5, front=True), ('error', 'cannot be decoded')),
    'sound alone': (lambda f: _sound(f/'a.mp4'), ('error', 'It contains no video')),
    'text under the ending .mp4': (lambda f: _bytes(f/'a.mp4', 'not a clip'), ('error', 'cannot be decoded')),
    'random bytes for a clip': (lambda f: _bytes(f/'a.mp4', random.Random(0).randbytes(5000)), ('error', 'cannot be decoded')),
    'MKV': (lambda f: _clip(f/'a.mkv'), ('warning', 'Its header does not say how many frames it has')),
    'WebM': (lambda f: _clip(f/'a.webm', codec='libvpx'), ('warning', 'Its header does not say how many frames it has')),
    'a transport stream': (lambda f: _clip(f/'a.ts'), ('error', 'LLaMA-Factory counts on 128 frames (video_maxlen), finds 16, and stops'),
                           ('warning', 'Its header does not say how many frames it has')),
    'a transport stream that is long enough': (lambda f: _clip(f/'a.ts', frames=128), ('warning', 'Its header does not say how many frames it has')),
    'MPEG of which the last frame is taken twice': (lambda f: _clip(f/'a.mpg', frames=127, codec='mpeg2video', rate=25), ('warning', 'Its header does not say how many frames it has')),
    'FLV': (lambda f: _clip(f/'a.flv'), ('warning', 'Its header does not say how many frames it has')),
    'a clip turned by its header': (lambda f: _turned_clip(f/'a.mp4'), ('warning', 'Its metadata says that it must be rotated')),
    'frames, one missing': (lambda f: [str(_save(f/'1.png')), str(f/'gone.png'), str(f/'1.png')], ('error', 'There is no file')),
    'frames, one cut off': (lambda f: [str(_save(f/'1.png')), str(_cut(_save(f/'2.png')))], ('error', '2.png cannot be read')),
    'frames, one no path': (lambda f: [str(_save(f/'1.png')), None], ('error', 'The path is None')),
    'no frames': (lambda f: [], ('error', 'The path is []')),
    'a clip that is a number': (lambda f: 7, ('error', 'The path is 7, not text')),
}

@pytest.fixture(scope='module')
def good_clip(tmp_path_factory): return str(_clip(tmp_path_factory.mktemp('clips')/'good.mp4'))

@pytest.mark.parametrize('make,meant', [(make, meant) for make, *meant in CLIPS.values()], ids=CLIPS.keys())
def test_clips(make, meant, good_clip, tiny, tmp_path):
    made = make(tmp_path)
    clips = [good_clip, str(made) if isinstance(made, os.PathLike) else made, good_clip]
    rows = [_dialogue(i, ('user', f'<video>What is number {i}?'), ('assistant', 'A car.'), videos=[clip]) for i, clip in enumerate(clips)]
    _check(rows, {1: [('videos', *m) for m in meant]}, model=tiny)

# --- reading

def _json(path, data): return _bytes(path, json.dumps(data))
def _table(f, text, name='a.csv', encoding='utf-8'): return _bytes(f/name, text.encode(encoding))

ROW = {'image': 'a.png', 'output': 'A car.'}
COCO = {'images': [{'id': 1, 'file_name': 'a.png'}], 'annotations': [{'id': 7, 'image_id': 1, 'caption': 'A car.'}]}
ASKED = {'questions': [{'question_id': i, 'image_id': 5, 'question': 'What?'} for i in (1, 2)]}
ANSWERED = {'annotations': [{'question_id': 1, 'multiple_choice_answer': 'car'}]}

def _excel(path, **sheets):
    with pd.ExcelWriter(path) as book:
        for name, table in sheets.items(): table.to_excel(book, sheet_name=name, index=False)
    return path

def _parquet(path):
    pd.DataFrame([ROW]*9).to_parquet(path)
    return path

def _saved(folder):
    datasets.Dataset.from_list([ROW]*50).save_to_disk(folder)
    return folder

def _saved_splits(folder):
    half = datasets.Dataset.from_list([ROW])
    datasets.DatasetDict(train=half, test=half).save_to_disk(folder)
    return folder

def _torn(folder):
    _cut(next(_saved(folder).glob('*.arrow')))
    return folder

def _zip(path):
    with zipfile.ZipFile(path, 'w') as z: z.writestr('a.txt', 'no workbook')
    return path

def _split_folders(f):
    for half in ('train', 'test'): _save(f/'d'/half/'car'/'a.png')
    return f/'d'

def _frame_parquet(path):
    pd.DataFrame({'image': [f'{i}.png' for i in range(5000)], 'output': [random.Random(i).randbytes(9).hex() for i in range(5000)]}).to_parquet(path)
    return path

def _damaged(path):
    data = bytearray(path.read_bytes())
    data[1000:3000] = random.Random(0).randbytes(2000)
    return _bytes(path, bytes(data))

READING = { # name → the source, keywords, words of the error
    'TSV with ragged rows': (lambda f: _table(f, 'image\toutput\na\tb\nc\td\te\n', 'a.tsv'), {}, 'line 3'),
    'a quote that is never closed': (lambda f: _table(f, 'image,output\na,"b\nc,d\n'), {}, 'the quote that opens a cell in line 2 is not closed'),
    'blank lines alone': (lambda f: _table(f, '\n\n\n'), {}, 'not a CSV file'),
    'a table without a header': (lambda f: _table(f, 'a.png,A car.\nb.png,A bus.\n'), {}, "no column 'output' for the answer; no column for the picture; 'a.png' holds paths: pass image='a.png'. Its columns: a.png, A car."),
    'bytes that are no text': (lambda f: _bytes(f/'a.csv', random.Random(0).randbytes(500)), {}, 'neither UTF-8 nor GB18030'),
    'a workbook under the ending .csv': (lambda f: _as(_excel(f/'a.xlsx', one=pd.DataFrame([ROW])), 'a.csv'), {}, 'neither UTF-8 nor GB18030'),
    'Latin-1': (lambda f: _table(f, 'image,output\na,un café à côté\n', encoding='latin-1'), {}, r"\(line 2\): give its encoding, for example encoding='cp1252'"),
    'Latin-1 in JSON': (lambda f: _table(f, '[{"output": "un café à côté"}]', 'a.json', 'latin-1'), {}, 'neither UTF-8 nor GB18030'),
    'the wrong encoding named': (lambda f: _table(f, 'image,output\na,红\n', encoding='gb18030'), dict(encoding='utf-8'), 'is not utf-8: .* at byte 15'),
    'UTF-16 named where it is not': (lambda f: _table(f, 'image,output\na,b\n'), dict(encoding='utf-16'), 'is not utf-16'),
    'UTF-16 with half a character at its end': (lambda f: _bytes(f/'a.csv', 'image,output\na,红\n'.encode('utf-16')[:-1]), {}, 'is not utf-16.*truncated data'),
    'a workbook that is none': (lambda f: _table(f, 'image,output\na,b\n', 'a.xlsx'), {}, 'is not an Excel workbook'),
    'a zip archive as a workbook': (lambda f: _zip(f/'a.xlsx'), {}, 'is not an Excel workbook'),
    'a workbook, cut off': (lambda f: _cut(_excel(f/'a.xlsx', one=pd.DataFrame([ROW]*99))), {}, 'is not an Excel workbook'),
    'a sheet without rows': (lambda f: _excel(f/'a.xlsx', one=pd.DataFrame(columns=['image', 'output'])), {}, 'has no rows'),
    'an old workbook': (lambda f: _bytes(f/'a.xls', b'\xd0\xcf\x11\xe0'), {}, 'cannot read .xls'),
    'Parquet, cut off': (lambda f: _cut(_parquet(f/'a.parquet')), {}, 'is not Parquet'),
    'Parquet without its beginning': (lambda f: _cut(_parquet(f/'a.parquet'), .3, front=True), {}, 'is not Parquet'),
    'text under the ending .parquet': (lambda f: _table(f, 'image,output\n'*20, 'a.parquet'), {}, 'is not Parquet'),
    'Parquet of zero bytes': (lambda f: _bytes(f/'a.parquet', b''), {}, 'is not Parquet'),
    'a folder with nothing in it': (lambda f: f, {}, 'has no subfolders with pictures'),
    'a folder without classes': (lambda f: _save(f/'d'/'a.png').parent, {}, 'has no subfolders with pictures or clips, one for each class'),
    'a folder with its labels beside': (lambda f: _table(_save(f/'d'/'a.png').parent, 'image,output\n', 'labels.csv').parent, {}, 'may be in labels.csv: give that file'),
    'a folder of classes without pictures': (lambda f: _table(_save(f/'d'/'a.png').parent, 'x', 'b.txt').parent, {}, 'has no subfolders with pictures'),
    'a folder of splits': (_split_folders, {}, r"contains splits, not classes: read each by itself, as in read_samples\('.*/d/test', …\)"),
    'a saved data set of splits': (lambda f: _saved_splits(f/'d'), {}, r"contains the splits train, test: read each"),
    'a saved data set with a torn file': (lambda f: _torn(f/'d'), {}, 'is not a data set that datasets can load'),
    'a saved data set without its file': (lambda f: next(_saved(f/'d').glob('*.arrow')).unlink() or f/'d', {}, 'is not a data set that datasets can load'),
    'a saved data set with a torn state': (lambda f: _cut(_saved(f/'d')/'state.json').parent, {}, 'is not a data set that datasets can load'),
    'COCO with boxes': (lambda f: _json(f/'a.json', COCO | {'annotations': [{'id': 7, 'image_id': 1, 'bbox': [0, 0, 9, 9], 'category_id': 3}]}), {}, 'category_id 3, which is not among the categories'),
    'COCO of unknown pictures': (lambda f: _json(f/'a.json', COCO | {'annotations': [{'id': i, 'image_id': i, 'caption': 'x'} for i in (1, 8, 9)]}), {}, r'2 annotation\(s\) are not among its images: annotation 8, 9'),
    'COCO without annotations': (lambda f: _json(f/'a.json', COCO | {'annotations': []}), {}, 'has no rows'),
    'a column of pictures that nobody named': (lambda f: _table(f, 'photo,question,answer\na.jpg,b,c\n'), {}, "no column for the picture; 'photo' holds paths: pass image='photo'"),
    'a column of clips that nobody named': (lambda f: _table(f, 'file,question,answer\na.mp4,b,c\n'), {}, "no column for the clip; 'file' holds paths: pass video='file'"),
    'two columns misnamed': (lambda f: _table(f, 'filename,q,a\na.jpg,b,c\n'), {}, "no column 'output' for the answer; no column for the picture; 'filename' holds paths: pass image='filename'"),
    'COCO without file names': (lambda f: _json(f/'a.json', COCO | {'images': [{'id': 1}]}), {}, '1 of its images lack id or file_name: number 0'),
    'COCO with no images': (lambda f: _json(f/'a.json', COCO | {'images': None}), {}, 'has no list of images'),
    'COCO with numbers for annotations': (lambda f: _json(f/'a.json', COCO | {'annotations': [COCO['annotations'][0], 5]}), {}, 'number 1'),
    'VQA of one file': (lambda f: (_json(f/'q.json', ASKED),), {}, 'VQA v2 is a pair of files'),
    'VQA with a half missing': (lambda f: (_json(f/'q.json', ASKED), f/'gone.json'), {}, 'There is no file .*gone.json'),
    'VQA without questions': (lambda f: (_json(f/'q.json', {'questions': []}), _json(f/'a.json', ANSWERED)), {}, 'has no rows'),
    'an encoding that there is not': (lambda f: _table(f, 'image,output\na,b\n'), dict(encoding='utf-9'), "has no text encoding 'utf-9'"),
    'Parquet with damaged pages': (lambda f: _damaged(_frame_parquet(f/'a.parquet')), {}, 'is not Parquet, or it is damaged'),
    'JSON nested without end': (lambda f: _table(f, '['*100_000, 'a.json'), {}, 'nested too deeply'),
    'JSON lines broken under .json': (lambda f: _table(f, '{"image": "a"}\n{"image"\n{}\n{oh}\n', 'a.json'), {}, 'line 2.*line 4'),
    'the questions of VQA alone': (lambda f: _json(f/'a.json', ASKED), {}, r'is one half of VQA v2: give both files, read_samples\(\(questions, annotations\)'),
    'the annotations of VQA alone': (lambda f: _json(f/'a.json', ANSWERED), {}, 'is one half of VQA v2'),
    'VQA with questions unanswered': (lambda f: (_json(f/'q.json', ASKED), _json(f/'a.json', ANSWERED)), {}, r'a.json has no annotation for 1 question\(s\): 2'),
    'the questions of VQA twice': (lambda f: [_json(f/'q.json', ASKED)]*2, {}, 'are not the questions and annotations of VQA v2'),
    'a pair of other files': (lambda f: (_json(f/'q.json', [ROW]), _json(f/'a.json', [ROW])), {}, 'are not the questions and annotations of VQA v2'),
    'VQA with other keys': (lambda f: (_json(f/'q.json', {'questions': [{'id': 1}]}), _json(f/'a.json', ANSWERED)), {}, '1 of its questions lack question_id'),
    'VQA with a torn half': (lambda f: (_cut(_json(f/'q.json', ASKED)), _json(f/'a.json', ANSWERED)), {}, 'q.json is not JSON'),
    'rows under a key': (lambda f: _json(f/'a.json', {'data': [ROW]}), {}, 'contains a dict; it should be a list of rows'),
    'JSON that is text': (lambda f: _json(f/'a.json', 'rows'), {}, 'contains a str'),
    'an empty list': (lambda f: _json(f/'a.json', []), {}, 'has no rows'),
    'JSON of zero bytes': (lambda f: _bytes(f/'a.json', b''), {}, 'is not JSON: Expecting value at line 1, column 1'),
    'JSON with a comma too many': (lambda f: _table(f, '[{"image": "a"},\n]', 'a.json'), {}, 'is not JSON: .* at line'),
    'Python under the ending .json': (lambda f: _table(f, "[{'image': 'a'}]", 'a.json'), {}, 'is not JSON: Expecting property name'),
    'two lists in one file': (lambda f: _table(f, '[{"image": "a"}]\n[{"image": "b"}]', 'a.json'), {}, r'row\(s\) 0, 1 are not objects'),
    'JSON lines, some broken': (lambda f: _table(f, '{"output": "b"}\n{a}\n\n{}\n{"b": \n', 'a.jsonl'), {}, r'2 line\(s\) that are not JSON. line 2: .*; line 5: '),
    'JSON lines, one a number': (lambda f: _table(f, '{"output": "b"}\n5\n', 'a.jsonl'), {}, r'row\(s\) 1 are not objects'),
    'JSON under the ending .jsonl': (lambda f: _table(f, json.dumps([ROW]), 'a.jsonl'), {}, r'row\(s\) 0 are not objects'),
    'JSON lines of zero bytes': (lambda f: _bytes(f/'a.jsonl', b''), {}, 'has no rows'),
    'rows of no columns': (lambda f: _json(f/'a.json', [{}, {}]), {}, "no column 'output'"),
    'the picture misspelt': (lambda f: _table(f, 'photo,output\na,b\n'), dict(image='foto'), "no column 'foto' for the picture; did you mean 'photo'"),
    'one of two pictures misspelt': (lambda f: _table(f, 'front,back,output\na,b,c\n'), dict(image=['front', 'bak']), "'bak' for the picture; did you mean 'back'"),
    'the header of the pictures misspelt': (lambda f: _table(f, 'images_,output\na,b\n'), {}, "no column 'image' for the picture; did you mean 'images_'"),
    'the clip misspelt': (lambda f: _table(f, 'clip,output\na,b\n'), dict(video='clips'), "no column 'clips' for the clip; did you mean 'clip'"),
    'the answer misspelt': (lambda f: _table(f, 'image,caption\na,b\n'), dict(response='captoin'), "no column 'captoin' for the answer; did you mean 'caption'"),
    'the header of the answers misspelt': (lambda f: _table(f, 'image,outptu\na,b\n'), {}, "no column 'output' for the answer; did you mean 'outptu'"),
    'no prompt anywhere': (lambda f: _table(f, 'image,output\na,b\n'), dict(prompt=None), "no column 'instruction' for the prompt.*or give the prompt itself"),
    'the prompt misspelt': (lambda f: _table(f, 'image,question_text,output\na,b,c\n'), dict(prompt='question-text'), "no column 'question-text' for the prompt; did you mean 'question_text'"),
    'the pictures of dialogues misspelt': (lambda f: _json(f/'a.json', [_dialogue() | {'photos': ['a']}]), dict(image='fotos'), "no column 'fotos' for the picture; did you mean 'photos'"),
}

@pytest.mark.parametrize('make,how,words', READING.values(), ids=READING.keys())
def test_reading(make, how, words, tmp_path):
    source = make(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as e: read_samples(source, **dict(prompt='What is this?') | how)
    assert str(tmp_path) in str(e.value), 'it says which file'

# --- mending

MENDING = { # name → what makes it, the words of each finding, the size and mode of the copy
    **{f'EXIF orientation {n}': (lambda f, n=n: _turned(f/'a.jpg', n), [f'orientation {n}'], ((60, 40) if n < 5 else (40, 60), 'RGB')) for n in (2, 3, 6, 8)},
    'CMYK': (lambda f: _save(f/'a.jpg', _noise(mode='CMYK')), ['CMYK'], ((60, 40), 'RGB')),
    'LAB': (lambda f: _save(f/'a.tif', _noise(mode='LAB')), ['LAB'], ((60, 40), 'RGB')),
    '16 bits per channel': (lambda f: _save(f/'a.png', Image.new('I;16', (60, 40), 40_000)), ['16 bits'], ((60, 40), 'RGB')),
    'transparent parts': (lambda f: _save(f/'a.png', _noise(mode='RGBA')), ['transparent'], ((60, 40), 'RGB')),
    'transparent parts, grey': (lambda f: _save(f/'a.png', _noise(mode='LA')), ['transparent'], ((60, 40), 'RGB')),
    'transparent parts of WebP': (lambda f: _save(f/'a.webp', _noise(mode='RGBA'), lossless=True), ['transparent'], ((60, 40), 'RGB')),
    'a transparent colour of a palette': (lambda f: _clear_palette(f/'a.png'), ['transparent'], ((60, 40), 'RGB')),
    'a wrong ending': (lambda f: _as(_save(f/'a.jpg'), 'a.png'), ['with the extension .png'], ((60, 40), 'RGB')),
    'no ending': (lambda f: _as(_save(f/'a.png', _noise(mode='L')), 'a'), ['no extension'], ((60, 40), 'L')),
    'turned, and a wrong ending': (lambda f: _as(_turned(f/'a.jpg', 6), 'a.png'), ['orientation 6', 'with the extension .png'], ((40, 60), 'RGB')),
    'turned and CMYK': (lambda f: _as(_turned_cmyk(f/'a.jpg'), 'b.jpg'), ['orientation 8', 'CMYK'], ((40, 60), 'RGB')),
}

def _turned_cmyk(path):
    exif = Image.Exif()
    exif[0x0112] = 8
    return _save(path, _noise(mode='CMYK'), exif=exif)

def _files(folder): return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}

@pytest.mark.parametrize('make,words,picture', MENDING.values(), ids=MENDING.keys())
def test_mending(make, words, picture, tmp_path):
    home = tmp_path/'数据 data'
    home.mkdir()
    paths = [str(_save(home/'good.png')), str(make(home)), str(home/'good.png')]
    before = _files(home)
    rows = [_with(p, n=i) for i, p in enumerate(paths)]
    told = json.dumps(rows)
    mended, found = mend_samples(rows)
    assert _files(home) == before and json.dumps(rows) == told, 'the originals stay as they are'
    assert found.row.tolist() == [1]*len(words) and set(found.level) == {'mended'}, found.to_string()
    assert all(w in what for w, what in zip(words, found.what))
    copy, = mended[1]['images']
    assert all(short_path(copy) in cure for cure in found.cure) and copy not in before
    with Image.open(copy) as im: assert (im.size, im.mode) == picture
    assert mended[0] == rows[0] and mended[2] == rows[2] and {k: v for k, v in mended[1].items() if k != 'images'} == {k: v for k, v in rows[1].items() if k != 'images'}
    assert check_samples(mended).empty

TEXTS = { # name → a sample with byte-order marks, the same without
    'a byte-order mark in a prompt': (_question(1, instruction='\ufeffWhat?'), _question(1, instruction='What?')),
    'a NUL in an answer': (_question(1, output='A \0car.'), _question(1, output='A car.')),
    'byte-order marks in a dialogue': (_dialogue(1, ('user', '\ufeffWhat?'), ('assistant', 'A car.\ufeff')), _dialogue(1, ('user', 'What?'), ('assistant', 'A car.'))),
    'a byte-order mark in the history': (_question(1, history=[['\ufeffa', 'b']]), _question(1, history=[['a', 'b']])),
}

@pytest.mark.parametrize('bad,good', TEXTS.values(), ids=TEXTS.keys())
def test_mending_text(bad, good):
    told = json.dumps(bad)
    (mended,), found = mend_samples([bad])
    assert mended == good and json.dumps(bad) == told and check_samples([mended]).empty
    assert len(found) and set(found.level) == {'mended'} and all(found.cure == 'Mended: removed.')

def test_what_cannot_be_mended_stays(tmp_path):
    "Errors stay errors beside what is mended; copies of equal names don't meet."
    one, two = _turned(tmp_path/'d'/'one'/'a.jpg', 3), _save(tmp_path/'d'/'two'/'a.jpg', _noise(1, mode='CMYK'))
    rows = [_with(one, n=0), _with(tmp_path/'gone.png', n=1), _with(_cut(_save(tmp_path/'d'/'cut.png')), n=2), _with(_frames(tmp_path/'d'/'b.gif'), n=3), _with(two, n=4), _with(one, n=5), None]
    mended, found = mend_samples(rows)
    assert found.level.tolist() == ['mended', 'error', 'error', 'warning', 'mended', 'mended', 'error']
    assert mended[0]['images'] == mended[5]['images'] != mended[4]['images'] and mended[1:4] == rows[1:4] and mended[6] is None
    assert check_samples(mended).row.tolist() == [1, 2, 3, 6]

# --- whatever

WORDS = ['', ' ', 'What?', '<image>', '<video>', '<audio>', '<|im_end|>', '<|image_pad|>', '\ufeff', '\ud83d', '\0', '红色', '{}', '[', 'a.png', '/', '..', 'data:', 'http://x', 'user', 'assistant', 'system', 'observation', 'function_call']
KEYS = ['images', 'videos', 'image', 'video', 'instruction', 'input', 'output', 'system', 'tools', 'history', 'messages', 'id', 'extra', '', '\ud83d']

def _whatever(rng, paths, depth=0):
    "A random value such as JSON may hold; samples among them."
    kind = rng.randrange(9 if depth < 4 else 6)
    if kind < 3: return rng.choice(WORDS)
    if kind == 3: return rng.choice(paths)
    if kind == 4: return rng.choice([None, True, False, 0, -1, 2**70, .5, float('nan'), float('inf')])
    if kind == 5: return ''.join(rng.choices(WORDS, k=3))
    some = lambda: [_whatever(rng, paths, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6: return some()
    if kind == 7: return [{'role': rng.choice([*WORDS, None, 5, ['user'], {}]), 'content': _whatever(rng, paths, depth + 1)} for _ in range(rng.randrange(4))]
    return {rng.choice(KEYS): _whatever(rng, paths, depth + 1) for _ in range(rng.randrange(6))}

def _some_sample(rng, paths):
    return {k: _whatever(rng, paths, 1) for k in rng.sample(KEYS, rng.randrange(len(KEYS)))} if rng.random() < .8 else _whatever(rng, paths)

def test_whatever(tiny, tmp_path):
    "Nothing makes the check raise: 300 random values, together and one by one."
    paths = [str(_save(tmp_path/'a.png')), str(_turned(tmp_path/'b.jpg', 6)), str(_cut(_save(tmp_path/'c.png'))), str(_clip(tmp_path/'d.mp4')), str(_bytes(tmp_path/'e.mp4', 'x')), str(tmp_path), str(tmp_path/'gone.png')]
    rng = random.Random(0)
    rows = [_some_sample(rng, paths) for _ in range(300)]
    for how in (dict(), dict(media=False), dict(model=tiny), dict(model=tiny, media=False, cutoff_len=5), dict(against=rows[::2]), dict(workers=1)):
        table = check_samples(rows, **how)
        assert list(table.columns) == ['row', 'source', 'field', 'what', 'cure', 'level'] and len(table) >= 200
        assert set(table.level) <= {'error', 'warning', 'note'} and table.cure.str.strip().all() and table.what.str.strip().all()
    mended, table = mend_samples(rows)
    assert len(mended) == len(rows) and 'mended' in set(table.level)
    for row in rows[:60]: check_samples([row], model=tiny, against=[row])

@pytest.mark.parametrize('key', ['images', 'image'])
def test_a_path_without_a_list_among_lists_is_no_fault(key, factory, tiny, tmp_path):
    "All are written as lists, and LLaMA-Factory loads them; only a column of the user's own stays mixed."
    a, b = map(str, _pair(tmp_path))
    rows = [_with(a, n=0), {k: v for k, v in _with(b, n=1).items() if k != 'images'} | {key: b}, _with(a, n=2)]
    assert not len(check_samples(rows, model=tiny)) and not len(check_samples(rows[::-1], model=tiny))
    Registry(tmp_path).add('mixed', rows)
    assert [r['_images'] for r in factory.load(tmp_path, 'mixed')] == [[a], [b], [a]]
    own = [row | {'images': [a], 'image': other} for row, other in zip((_with(a, n=0), _with(a, n=1)), (['x'], 'y'))]
    assert "'image' is text here and a list before" in ' '.join(check_samples(own, model=tiny).query("level == 'error'").what)

def test_the_corpus_is_large():
    kinds = [PICTURES, QUESTIONS, DIALOGUES, ROWS, CLIPS, READING, MENDING, TEXTS]
    assert sum(map(len, kinds)) >= 200
