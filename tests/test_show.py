"The view of the answers, and the files that it writes."
import csv, re, sys
from html.parser import HTMLParser

import pandas as pd
import pytest
from openpyxl import load_workbook
from PIL import Image

from qwen2vl_nb.prediction.show import show_predictions

HOSTILE = '<script>alert(1)</script><img src=x onerror=alert(2)>"\'</script><!-- </article>'

@pytest.fixture
def pictures(tmp_path):
    "Four pictures, in a folder with a space and Chinese in its name."
    folder = tmp_path/'图片 "pictures" & more'
    folder.mkdir()
    for i,colour in enumerate(('crimson', 'gold', 'teal', 'navy')):
        Image.new('RGB', (60, 40), colour).save(folder/f'{i}.png')
    return folder

@pytest.fixture
def answers(pictures):
    "Twenty rows: 2, 5 and 11 are wrong, 7 failed, 9 has no label."
    rows = [dict(id=f'car-{i}', row=i, images=[str(pictures/f'{i%4}.png')], prompt='<image>这是什么？ What?',
                 label=f'一辆车 number {i}', predict=f'一辆车 number {i}', finish_reason='stop') for i in range(20)]
    rows[2]['predict'], rows[5]['predict'] = '一辆卡车 number 2', f'{HOSTILE} 5'
    rows[7] |= dict(predict=None, error='Out of <memory>', finish_reason=None)
    rows[9]['label'] = None
    rows[11] |= dict(id=HOSTILE, prompt=HOSTILE, label=HOSTILE, predict='=1+1')
    return rows

class Tags(HTMLParser):
    "Elements, attributes and texts of a page."
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ''
        self.feed(text)
    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
    def handle_data(self, data): self.text += data

def without_harm(html):
    "What is in a page, which fetches nothing and does nothing that stands in the data."
    found = Tags(html)
    assert all(v.startswith('data:image/') for k,v in found.attributes if k in ('src', 'href'))
    assert not [k for k,_ in found.attributes if k.startswith('on')]
    assert found.tags.count('script') == found.tags.count('html') and HOSTILE in found.text
    return found.tags

def test_nothing_in_the_data_becomes_html(answers, tmp_path):
    view = show_predictions(answers, n=20)
    assert without_harm(view._cards.value).count('img') == 20
    view.to_html(tmp_path/'给 同事.html')
    text = (tmp_path/'给 同事.html').read_text(encoding='utf-8')
    tags = without_harm(text)
    assert (tags.count('article'), tags.count('img')) == (20, 20)
    assert not [place for place in ('http:', 'https:', str(tmp_path)) if place in text]

def marks(html):
    found = re.findall(r'<mark title="([^"]*)" style="[^"]*">([^<]*)</mark>', html)
    assert len(found) == html.count('<mark')
    return found

def test_what_differs_is_marked(answers):
    assert marks(show_predictions([answers[2]])._cards.value) == [('not in the label', '卡')]
    assert marks(show_predictions(answers[:2])._cards.value) == []
    red = show_predictions([answers[0] | dict(label='the red car\nhere', predict='the <blue> car\nhere')])._cards.value
    assert marks(red) == [('not in the answer', 'red'), ('not in the label', '&lt;blue&gt;')]

def test_pages(answers):
    view = show_predictions(answers, n=6)
    ids = lambda: re.findall(r'car-\d+', view._cards.value)
    assert ids() == [f'car-{i}' for i in range(6)] and view._back.disabled and not view._next.disabled
    for _ in range(3): view._next.click()
    assert ids() == ['car-18', 'car-19'] and view._next.disabled
    assert (view._page.value, view._page.max, view._at.value) == (4, 4, 'of 4 · 19–20 of 20')
    view._back.click()
    assert ids()[0] == 'car-12'
    view._page.value = 2
    assert ids()[0] == 'car-6'

def test_filter_and_search(answers):
    view = show_predictions(answers, n=6)
    left = lambda: [r['row'] for r in view.rows]
    counts = ['all (20)', 'wrong (4)', 'right (15)', 'failed (1)', 'no label (1)']
    assert [name for name,_ in view._filter.options] == counts
    assert view._headline().startswith('4 of 20 wrong, 1 failed, 1 without a label; page 1 of 4')
    view._page.value = 3
    view._filter.value = 'right'
    assert view._page.value == 1, 'another selection begins at its first page'
    view._page.value = 3
    view._filter.value = 'wrong'
    assert left() == [2, 5, 7, 11] and (view._page.value, view._page.max) == (1, 1)
    view._filter.value = 'failed'
    assert left() == [7] and 'Out of &lt;memory&gt;' in view._cards.value
    view._filter.value = 'all'
    for text, found in (('一辆卡', [2]), ('  ALERT(1) ', [5, 11]), ('CAR-1', [1, 10, *range(12, 20)])):
        view._search.value = text
        assert left() == found
    view._filter.value = 'wrong'
    assert left() == [] and 'nothing to show' in view._at.value and '<img' not in view._cards.value
    assert [r['row'] for r in show_predictions(answers, wrong=True).rows] == [2, 5, 7, 11]
    view = show_predictions([r | {'id': 0} for r in answers[:1]])
    view._search.value = '0'
    assert len(view.rows) == 1, 'an id of 0 is one'

def test_without_widgets_the_page_is_shown(answers):
    bundle = show_predictions(answers, wrong=True, n=3)._repr_mimebundle_()
    assert bundle['text/html'].count('<img src="data:image/') == 3
    assert bundle['text/plain'].count('\n') == 3 and '卡车' in bundle['text/plain']
    assert 'model_id' in bundle['application/vnd.jupyter.widget-view+json']

OPENED, HOOK = [], []

@pytest.fixture
def opened():
    "The files that Python opens, by path, as its audit events say; `os.open`, with which `open` may do it, has no mode."
    note = lambda event, args: OPENED.append(str(args[0])) if event == 'open' and args[1] is not None else None
    if not HOOK: HOOK.append(sys.addaudithook(note))  # there is no way to take it out again
    OPENED.clear()
    return OPENED

def test_of_100_000_rows_only_the_page_that_is_seen_is_made(pictures, opened):
    rows = [dict(id=i, images=[str(pictures/f'{i}.png')], prompt='<image>?', label='car',
                 predict=('car', 'bus')[i%2]) for i in range(100_000)]
    for i in (5, 7): (pictures/f'{i}.png').write_bytes((pictures/'1.png').read_bytes())
    opened.clear()
    tried = lambda: [o.rsplit('/')[-1] for o in opened if o.startswith(str(pictures))]
    view = show_predictions(rows, n=4)
    assert tried() == ['0.png', '1.png', '2.png', '3.png'] and view._page.max == 25_000
    view._search.value = 'BUS'
    assert len(view.rows) == 50_000
    assert tried()[4:] == ['5.png', '7.png'], 'of the page with 1, 3, 5 and 7, what was not made before'
    view._search.value = ''
    view._repr_mimebundle_()
    assert len(tried()) == 6, 'each thumbnail once'
    assert len(view._cards.value) < 20_000
    Image.new('RGB', (60, 40), 'white').save(pictures/'0.png')
    opened.clear()
    view._draw()
    assert tried() == ['0.png'], 'a file that has changed is read again'
    with pytest.raises(ValueError, match='100,000 rows are too many'): view.to_html(pictures/'x.html')
    assert sorted(f.name for f in pictures.iterdir()) == ['0.png', '1.png', '2.png', '3.png', '5.png', '7.png']

@pytest.fixture
def odd_answers(answers):
    "Answers with what spreadsheets trip over."
    answers[0] |= {'predict': 'bell \x07 rings', 'number': 10**19 + 1, 'box': [1, 2], 'share': float('nan')}
    answers[1]['predict'], answers[3]['predict'] = '-5', '@SUM(1)'
    return answers

def test_csv(odd_answers, tmp_path):
    view = show_predictions(odd_answers)
    view.to_csv(tmp_path/'a.csv')
    assert (tmp_path/'a.csv').read_bytes().startswith(b'\xef\xbb\xbf')
    with open(tmp_path/'a.csv', encoding='utf-8-sig', newline='') as f: table = list(csv.DictReader(f))
    assert len(table) == 20 and list(table[0])[:2] == ['id', 'result']
    assert [r['result'] for r in table[5:10]] == ['wrong', 'right', 'failed', 'right', 'no label']
    assert [table[i]['predict'] for i in (1, 3, 11)] == ['-5', "'@SUM(1)", "'=1+1"]
    assert (table[4]['label'], table[4]['images']) == ('一辆车 number 4', odd_answers[4]['images'][0])
    view._filter.value = 'wrong'
    view.to_csv(tmp_path/'a.csv')
    assert pd.read_csv(tmp_path/'a.csv').result.tolist() == ['wrong']*5 + ['failed', 'wrong']

def test_excel(odd_answers, tmp_path):
    show_predictions(odd_answers).to_excel(tmp_path/'a.xlsx')
    head, *lines = load_workbook(tmp_path/'a.xlsx').active.iter_rows()
    column = {cell.value: i for i,cell in enumerate(head)}
    cell = lambda row, name: lines[row][column[name]]
    assert len(lines) == 20 and (cell(11, 'predict').value, cell(11, 'predict').data_type) == ('=1+1', 's')
    assert not [c for line in lines for c in line if c.data_type == 'f']
    odd = [cell(0, name).value for name in ('predict', 'number', 'box', 'share', 'row')]
    assert odd == ['bell \ufffd rings', '10000000000000000001', '[1, 2]', None, 0]

def test_the_file_works_in_a_browser(answers, tmp_path, page):
    "Search, filter and pages, with nothing fetched and nothing said by what is in the data."
    show_predictions(answers, n=6).to_html(tmp_path/'给 同事.html')
    asked, said = [], []
    page.on('request', lambda r: asked.append(r.url))
    page.on('dialog', lambda d: (said.append(d.message), d.dismiss()))
    page.on('console', lambda m: said.append(m.text))
    page.on('pageerror', lambda e: said.append(str(e)))
    page.goto((tmp_path/'给 同事.html').as_uri())
    seen = lambda: (page.locator('article:visible').count(), page.locator('#at').text_content())
    assert seen() == (6, 'page 1 of 4, 20 rows') and page.locator('#back').is_disabled()
    for _ in range(3): page.locator('#next').click()
    assert seen() == (2, 'page 4 of 4, 20 rows') and page.locator('#next').is_disabled()
    page.locator('#text').fill('一辆卡车 NUMBER 2')
    assert seen() == (1, 'page 1 of 1, 1 rows')
    page.locator('#text').fill('')
    page.locator('#kind').select_option(label='wrong')
    assert seen() == (4, 'page 1 of 1, 4 rows')
    shown = '[...document.querySelectorAll("article:not([hidden]) img")]'
    assert page.evaluate(f'{shown}.every(i => i.naturalWidth > 0)')
    assert all(url.startswith(('file:', 'data:')) for url in asked) and not said
