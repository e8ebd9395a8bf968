"Files that this package did not write stay as they are; looking at data opens regular files only, and asks nobody over the network."
import http.server, json, os, shutil, threading
from pathlib import Path

import pytest
from PIL import EpsImagePlugin, Image

from qwen2vl_nb.data.check import check_samples, mend_samples
from qwen2vl_nb.data.describe import describe_samples, show_samples
from qwen2vl_nb.data.sources import read_samples
from qwen2vl_nb.data.write import write_samples
from qwen2vl_nb.data.registry import Registry
from qwen2vl_nb.tiny import make_car_item, make_car_video

QUESTION = {'instruction': '<image>What?', 'input': '', 'output': 'A car.'}

def _photo(path, turned=True):
    "A photograph with an EXIF orientation, which can be mended."
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if turned: exif[0x0112] = 6
    Image.effect_noise((60, 40), 50).convert('RGB').save(path, 'JPEG', exif=exif)
    return path

def _files(folder): return {p: p.read_bytes() for p in Path(folder).rglob('*') if p.is_file() and not p.is_symlink()}

def _fix(*paths):
    samples = [QUESTION | {'images': [str(p)]} for p in paths]
    mended, found = mend_samples(samples)
    return [s['images'][0] for s in mended], found

# --- mending

def _mended_folder_is_a_link(f):
    (f/'images_mended').symlink_to('images')
    return [_photo(f/'images'/'a.jpg')]

def _their_own_mended_folder(f):
    _photo(f/'images_mended'/'a.jpg', turned=False)
    return [_photo(f/'images'/'a.jpg')]

def _hard_link(f):
    (f/'images_mended').mkdir()
    os.link(_photo(f/'images'/'a.jpg'), f/'images_mended'/'a.jpg')
    return [f/'images'/'a.jpg']

def _link_without_target(f):
    (f/'images_mended').mkdir()
    (f/'images_mended'/'a.jpg').symlink_to(f/'nothing here yet.jpg')
    return [_photo(f/'images'/'a.jpg')]

MENDED = { # name → pictures, given from a working folder `images` or the folder itself
    'a path that leaves its folder and comes back': lambda f: _photo(f/'images'/'a.jpg') and ['images/../images/a.jpg'],
    'the same with another folder': lambda f: [_photo(f/'images'/'a.jpg'), f'{_photo(f/"other"/"b.jpg").parent}/../images/./a.jpg'],
    'a path that begins with ..': lambda f: _photo(f/'images'/'a.jpg') and (os.chdir(f/'images'), ['../images/a.jpg'])[1],
    'a mended folder that is a link to the pictures': _mended_folder_is_a_link,
    'a mended folder with their own pictures': _their_own_mended_folder,
    'a hard link to the photograph under the name of the copy': _hard_link,
    'a link without a target under the name of the copy': _link_without_target,
    'a name of 250 bytes': lambda f: [_photo(f/'images'/f'{"x"*246}.jpg')],
    'a name of 255 bytes without an ending': lambda f: [_photo(f/'images'/('店'*85), turned=False)],
}

@pytest.mark.parametrize('make', MENDED.values(), ids=MENDED.keys())
def test_mended_copies_replace_nothing(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = make(tmp_path)
    before = _files(tmp_path)
    copies, found = _fix(*paths)
    assert set(found.level) - {'note'} == {'mended'}, found.to_string()
    assert {p: data for p, data in _files(tmp_path).items() if p in before} == before
    assert not {os.path.realpath(c) for c in copies} & {os.path.realpath(p) for p in before}
    assert check_samples([QUESTION | {'images': [c]} for c in copies]).query('level != "note"').empty
    assert _fix(*paths)[0] == copies, 'the same call names the same copies'
    assert len(_files(tmp_path)) == len(before) + len(set(copies))

def test_what_cannot_be_mended_is_said(tmp_path, monkeypatch):
    "A folder that cannot be made, and a picture that goes while its copy is made: the finding stays, and another says why."
    photo = _photo(tmp_path/'images'/'a.jpg')
    (tmp_path/'images_mended').write_text('a file where the folder would be')
    (kept,), found = _fix(photo)
    assert kept == str(photo) and found.level.tolist() == ['warning']*2 and 'could not be mended' in found.what[1]
    (tmp_path/'images_mended').unlink()
    from qwen2vl_nb.data import check
    look = check.look_at_samples
    def and_gone(*about): return look(*about), photo.unlink()
    monkeypatch.setattr(check, 'look_at_samples', lambda *about: and_gone(*about)[0])
    (kept,), found = _fix(photo)
    assert kept == str(photo) and found.level.tolist() == ['warning']*2 and 'could not be mended' in found.what[1]

# --- writing

def test_labels_are_not_replaced(tmp_path):
    "A file with hours of labelling stays, whatever writes beside it; a cell that is run again replaces its own file."
    labels = tmp_path/'cars.json'
    labels.write_text('[{"hours": "of labelling"}]')
    samples = [QUESTION | {'images': [str(_photo(tmp_path/'photos'/'a.jpg'))]}]
    for write in (lambda **how: write_samples(samples, labels, **how), lambda **how: write_samples(samples, labels, media='copy', **how), lambda: Registry(tmp_path).add('cars', samples)):
        with pytest.raises(FileExistsError, match='overwrite=True'): write()
        assert labels.read_text() == '[{"hours": "of labelling"}]' and sorted(p.name for p in tmp_path.iterdir() if p.suffix != '.lock') == ['cars.json', 'photos']
    write_samples(samples, labels, overwrite=True)
    for n in (2, 1, 3):
        Registry(tmp_path).add('cars', samples*n)
        assert len(read_samples(labels)) == n
    edited = labels.read_text().replace('A car.', 'A red car.')
    labels.write_text(edited)
    with pytest.raises(FileExistsError, match='has changed since'): Registry(tmp_path).add('cars', samples)
    assert labels.read_text() == edited

@pytest.mark.parametrize('media', ['link', 'copy'])
def test_pictures_in_the_way_stay(media, tmp_path):
    photo, theirs = _photo(tmp_path/'photos'/'a.jpg'), _photo(tmp_path/'data'/'cars_media'/'a.jpg', turned=False)
    before = theirs.read_bytes()
    samples = [QUESTION | {'images': [str(photo)]}]
    for _ in range(2): write_samples(samples, tmp_path/'data'/'cars.json', media=media)
    brought = Path(read_samples(tmp_path/'data'/'cars.json')[0]['images'][0])
    assert theirs.read_bytes() == before and brought != theirs and brought.read_bytes() == photo.read_bytes()
    assert sorted(theirs.parent.iterdir()) == sorted([theirs, brought])

def test_links_become_copies(tmp_path):
    photo = _photo(tmp_path/'photos'/'a.jpg')
    for media in ('link', 'copy'): write_samples([QUESTION | {'images': [str(photo)]}], tmp_path/'cars.json', media=media)
    shutil.rmtree(photo.parent)
    assert Path(read_samples(tmp_path/'cars.json')[0]['images'][0]).is_file()

def test_a_planted_link_is_not_followed(tmp_path):
    "The name that a link was first made under could be guessed."
    photo, victim = _photo(tmp_path/'photos'/'a.jpg'), tmp_path/'victim'
    victim.write_text('mine')
    (tmp_path/'cars_media').mkdir()
    (tmp_path/'cars_media'/f'.a.jpg.{os.getpid()}.tmp').symlink_to(victim)
    for media in ('link', 'copy'): write_samples([QUESTION | {'images': [str(photo)]}], tmp_path/'cars.json', media=media)
    assert victim.read_text() == 'mine'

# --- looking

@pytest.fixture
def server():
    "A server on this machine, and the list of what it was asked for."
    asked = []
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)
        do_HEAD = do_POST = do_GET
        def log_message(self, *args): pass
    served = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{served.server_port}', asked
    served.shutdown()

def _look_in_every_way(samples, **how):
    table = check_samples(samples, against=samples, **how)
    mend_samples(samples, **how)
    return table, show_samples(samples)._repr_html_(), describe_samples(samples)._repr_svg_()

def test_looking_asks_nobody(server, tmp_path):
    url, asked = server
    playlist = f'#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}/a.ts\n#EXT-X-ENDLIST\n'
    texts = {'a.m3u8': playlist, 'b.mp4': playlist, 'c.mp4': f'ffconcat version 1.0\nfile {url}/c.mp4\n', 'd.mp4': f'<?xml version="1.0"?><MPD><BaseURL>{url}/d.mp4</BaseURL></MPD>',
             'e.svg': f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{url}/e.png"/></svg>', 'f.mp4': 'v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n'}
    for name, text in texts.items(): (tmp_path/name).write_text(text)
    paths = [*(str(tmp_path/name) for name in texts), f'{url}/a.mp4', f'{url}/a.png', f'concat:{url}/x.mp4|{url}/y.mp4', f'subfile,,start,0,end,9,,:{url}/z.mp4', f'async:{url}/q.mp4', f'<img src="{url}/i.png">']
    samples = [{'videos': [p], 'instruction': '<video>What?', 'output': 'x'} for p in paths] + [{'images': [p], 'instruction': '<image>What?', 'output': 'x'} for p in paths]
    samples += [{'images': [], 'instruction': f'![x]({url}/md.png) <img src="{url}/html.png">', 'output': 'x'}]
    (tmp_path/'rows.json').write_text(json.dumps(samples))
    table, html, svg = _look_in_every_way(read_samples(tmp_path/'rows.json'))
    assert asked == [] and set(table.row) >= set(range(2*len(paths)))
    assert f'src="{url}' not in html + svg and '<image href' not in svg

def test_a_clip_at_an_address_is_one_that_llamafactory_would_fetch(server, plugin):
    "So it is a warning, not an error."
    url, asked = server
    with pytest.raises(Exception, match='404'): plugin._regularize_videos([f'{url}/a.mp4'], image_max_pixels=9999, image_min_pixels=1, video_fps=2., video_maxlen=8)
    assert asked
    assert check_samples([{'videos': [f'{url}/a.mp4'], 'instruction': '<video>What?', 'output': 'x'}]).level.tolist() == ['warning']

def test_pipes_and_devices_are_not_opened(tmp_path):
    "They would block for ever, or have no end."
    for name in ('a.png', 'a.mp4'): os.mkfifo(tmp_path/name)
    (tmp_path/'zero.png').symlink_to('/dev/zero')
    (tmp_path/'zero.mp4').symlink_to('/dev/zero')
    samples = [{key: [str(tmp_path/name)], 'instruction': f'<{key}>What?', 'output': 'x'} for key in ('image', 'video') for name in ('a.png', 'a.mp4', 'zero.png', 'zero.mp4')]
    table, html, _ = _look_in_every_way(samples)
    assert table.query('what.str.contains("not a regular file")').row.tolist() == list(range(8))
    assert html.count('Damaged') == 8
    for name in ('rows.json', 'rows.csv', 'rows.xlsx', 'rows.parquet'):
        os.mkfifo(tmp_path/name)
        with pytest.raises((ValueError, FileNotFoundError)): read_samples(tmp_path/name)
    with pytest.raises(FileExistsError): write_samples(samples[:0] or [QUESTION | {'images': []}], tmp_path/'rows.json')

def test_no_program_is_run_for_a_picture(tmp_path, monkeypatch):
    "Pillow would have Ghostscript run an EPS file."
    ran = tmp_path/'ran'
    (tmp_path/'bin').mkdir()
    for name in ('gs', 'gswin32c', 'gswin64c'):
        (tmp_path/'bin'/name).write_text(f'#!/bin/sh\ntouch "{ran}"\n')
        (tmp_path/'bin'/name).chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path/"bin"}:{os.environ["PATH"]}')
    monkeypatch.setattr(EpsImagePlugin, 'gs_binary', None)  # what it found before
    (tmp_path/'a.png').write_text('%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n')
    with Image.open(tmp_path/'a.png') as im, pytest.raises(Exception): im.load()
    assert ran.exists(), 'Pillow, as LLaMA-Factory calls it, does'
    ran.unlink()
    table, _, _ = _look_in_every_way([{'images': [str(tmp_path/'a.png')], 'instruction': '<image>What?', 'output': 'x'}])
    assert not ran.exists() and 'Ghostscript' in table.what[0] and table.level[0] == 'warning'

def test_a_large_picture_is_no_error_where_llamafactory_reads_it(plugin, tmp_path):
    Image.new('1', (10_000, 9_000)).save(tmp_path/'large.png')
    Image.new('1', (20_000, 9_000)).save(tmp_path/'bomb.png')
    check = lambda name: check_samples([{'images': [str(tmp_path/name)], 'instruction': '<image>What?', 'output': 'x'}])
    limits = dict(image_max_pixels=768*768, image_min_pixels=32*32)
    assert plugin._regularize_images([str(tmp_path/'large.png')], **limits)['images'] and check('large.png').level.tolist() == ['warning']
    with pytest.raises(Image.DecompressionBombError): plugin._regularize_images([str(tmp_path/'bomb.png')], **limits)
    assert check('bomb.png').level.tolist() == ['error']

# --- drawn data

@pytest.mark.parametrize('make,taken', [(make_car_item, 'images/0002.png'), (make_car_item, 'train.json'), (make_car_item, 'labels.csv'), (make_car_video, 'videos/001.mp4'), (make_car_video, 'test.json')])
def test_drawn_data_replaces_only_what_was_drawn(make, taken, tmp_path):
    "A file of the same name stays, and so does everything else; what was drawn before is drawn anew."
    few = dict(n_train=4, n_test=2)
    make(tmp_path/'drawn', **few)
    make(tmp_path/'drawn', **few, seed=1)
    (tmp_path/'drawn'/taken).write_text('hours of work')
    before = _files(tmp_path)
    with pytest.raises(FileExistsError, match=f'1 of the .*{taken}.*overwrite=True'): make(tmp_path/'drawn', **few)
    assert _files(tmp_path) == before
    make(tmp_path/'drawn', **few, overwrite=True)
    assert _files(tmp_path)[tmp_path/'drawn'/taken] != b'hours of work'
