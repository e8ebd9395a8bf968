"The Chinese files beside the English ones: complete, up to date, with the same code, links and figures."
import ast, importlib.util, json, re, shutil, sys

import pytest

from conftest import ROOT

def _translations():
    spec = importlib.util.spec_from_file_location('translations', ROOT/'docs'/'translations.py')
    sys.modules['translations'] = module = importlib.util.module_from_spec(spec)  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module

translations = _translations()
PAIRS = {str(chinese.relative_to(ROOT)): (english, chinese) for english, chinese in translations.pairs()}

def test_what_people_read_first_is_there_in_chinese():
    assert {'README.zh.md', 'nbs/tutorials/car_item.zh.ipynb'} <= {*PAIRS}

@pytest.mark.parametrize('name', PAIRS)
def test_a_chinese_file_has_all_that_the_english_one_has(name):
    "What is missing, and what to write: python docs/translations.py."
    assert not (said := translations.faults(*PAIRS[name])), '\n' + '\n'.join(said)

@pytest.mark.parametrize('name', PAIRS)
def test_languages_are_linked_with_each_other(name):
    english, chinese = PAIRS[name]
    assert f']({chinese.name})' in english.read_text(encoding='utf-8')
    assert f']({english.name})' in chinese.read_text(encoding='utf-8')

@pytest.fixture
def copies(tmp_path):
    "Copies of an English and a Chinese file, of which a test changes one: what is found then."
    def make(name, side, old, new):
        pair = [tmp_path/path.name for path in PAIRS[name]]
        for path, copy in zip(PAIRS[name], pair): shutil.copy(path, copy)
        text = pair[side].read_text(encoding='utf-8')
        assert old in text
        pair[side].write_text(text.replace(old, new, 1), encoding='utf-8')
        return translations.faults(*pair)
    return make

TUTORIAL, ENGLISH, CHINESE = 'nbs/tutorials/car_item.zh.ipynb', 0, 1

@pytest.mark.parametrize('side,old,new,said', [
    (ENGLISH, 'most bad combinations fail late', 'all bad combinations fail late', 'Is this machine ready'),
    (ENGLISH, 'faster for small batches', 'much faster for small batches', 'Item cards for vehicles'),
    (ENGLISH, 'learning_rate=2e-3', 'learning_rate=3e-3', 'learning_rate=3e-3'),
    (CHINESE, 'learning_rate=2e-3', 'learning_rate=3e-3', 'learning_rate=3e-3'),
    (CHINESE, 'zero_table(recipe, gpus=2', 'zero_table(recipe, gpus=4', 'gpus=4'),
    (CHINESE, 'qwen2vl_72b.ipynb', 'video.ipynb', 'links: missing qwen2vl_72b.ipynb; not in the English video.ipynb'),
    (CHINESE, 'BLEU-4', 'BLEU-2', 'figures: missing 4; not in the English 2'),
    (CHINESE, '也不到 100', '也不到 10', 'figures: missing 100; not in the English 10'),
    (CHINESE, '`exact`', '`json`', 'code: missing `exact`'),
    (CHINESE, '使用 CPU，这样在任何机器上结果都一样；想用 GPU，请删除这一行', 'Use the CPU', 'comment that is not Chinese: Use the CPU'),
    (CHINESE, '<!-- translates ', '<!-- translates 0', 'Item cards for vehicles'),
])
def test_a_change_on_one_side_is_found(copies, side, old, new, said):
    assert any(said in line for line in copies(TUTORIAL, side, old, new))

def test_a_paragraph_that_is_new_is_named_with_the_line_to_write(copies):
    found, = copies('README.zh.md', ENGLISH, '\n## ', '\nThis is new.\n\n## ')
    digest = translations.Section('This is new.').digest
    assert found == f'README.md: “This is new. …” is new or has changed; translate it, and write below the translation:\n<!-- translates {digest} -->'

def test_another_figure_in_a_table_of_the_readme_is_found(copies):
    row = re.search(r'^\| .*?(\d+)', PAIRS['README.zh.md'][CHINESE].read_text(encoding='utf-8'), re.M)
    found, = copies('README.zh.md', CHINESE, row[0], row[0].removesuffix(row[1]) + '12345')
    assert found.endswith(f'figures: missing {row[1]}; not in the English 12345')

def test_figures_of_a_table_are_compared_row_by_row():
    a = translations.Section('| a | 1 GiB |\n|---|---|\n| b | 2 GiB |')
    b = translations.Section('| 甲 | 2 GiB |\n|---|---|\n| 乙 | 1 GiB |')
    assert [*translations.text_faults(a, b)] == ['row or item 0, figures: missing 1; not in the English 2',
                                                 'row or item 2, figures: missing 2; not in the English 1']
    assert next(translations.text_faults(a, translations.Section('| 甲 | 1 GiB |\n|---|---|'))) == '2 rows or items instead of 3'

def test_a_chinese_notebook_has_outputs_of_its_own():
    for name in PAIRS:
        if not name.endswith('.ipynb'): continue
        english, chinese = (json.loads(path.read_text(encoding='utf-8'))['cells'] for path in PAIRS[name])
        for a, b in zip(english, chinese): assert bool(a.get('outputs')) == bool(b.get('outputs')), ''.join(b['source'])
        folders = [{*re.findall(r'runs/(car_item-[\d-]+)', json.dumps(cells))} for cells in (english, chinese)]
        assert folders[0] and folders[1] and not folders[0] & folders[1]

def test_every_text_of_the_panel_is_there_in_chinese():
    assert not (said := translations.panel_faults()), '\n' + '\n'.join(said)

def test_a_thing_has_one_name_in_the_chinese_panel():
    from qwen2vl_nb.panel.chinese import CHINESE
    names = {r'\blabels?\b': '标注', r'\bloss\b': 'loss', r'\bdata sets?\b': '数据集', r'\bcheckpoints?\b': '检查点', r'\bepochs\b': '轮数'}
    for key, (english, chinese) in CHINESE.items():
        for word, name in names.items(): assert name in chinese or not re.search(word, english), f'{key}: {chinese}'

def test_a_text_that_is_missing_superfluous_or_changed_is_named():
    english = {'panel.copy': 'Copy', 'panel.done': 'done', 'panel.new': 'New'}
    chinese = {'panel.copy': ('Copy', '复制'), 'panel.done': ('Done', '已完成'), 'panel.old': ('Old', '旧')}
    assert translations.table_faults(english, chinese) == [
        "panel.new is missing: 'New'", 'panel.old is superfluous', "panel.done translates 'Done', and now reads 'done'"]

def _shown(widget):
    "The texts that a widget and those in it show."
    yield from (text for name in ('description', 'value', 'placeholder', 'tooltip') if isinstance(text := getattr(widget, name, None), str) and text)
    for child in getattr(widget, 'children', ()): yield from _shown(child)

def test_the_panel_speaks_chinese(tmp_path):
    "No step shows an English text of the table."
    from qwen2vl_nb import Panel
    from qwen2vl_nb.panel.chinese import CHINESE
    panel = Panel(tmp_path, language='zh')
    english = {text for text, _ in CHINESE.values() if ' ' in text}
    for name in panel.steps:
        panel.go(name)
        shown = [*_shown(panel)]
        assert any(CHINESE[f'{name}.about'][1] in text for text in shown)
        assert not english & {re.sub(r'<.*?>', '', text).strip() for text in shown}

_latin = 'loss', 'IoU', 'id', 'DeepSpeed' # Words that stay as they are in Chinese

def _english_in(text): return [word for word in re.findall(r'[A-Za-z]{2,}', text) if word not in _latin]

def _said_of_the_beginning():
    "What the package's code tells of what a run is doing before its first step."
    from qwen2vl_nb.run.beginning import _bars
    yield from (doing for doing, _ in _bars.values())
    for path in (ROOT/'qwen2vl_nb').glob('*/*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            name = isinstance(node, ast.Call) and getattr(node.func, 'attr', getattr(node.func, 'id', ''))
            at = {'write_doing': 1, 'before': 2, 'tell': 0}.get(name)
            if at is None or len(node.args) <= at or path.parent.name == 'panel': continue
            parts = [node.args[at].body, node.args[at].orelse] if isinstance(node.args[at], ast.IfExp) else [node.args[at]]
            yield from (part.value for part in parts if isinstance(part, ast.Constant) and ' ' in part.value)

def test_live_views_speak_chinese():
    "All that can be in the lines of a view, and nothing of it stays English."
    from qwen2vl_nb.panel.texts import Texts
    from qwen2vl_nb.run.start import Progress
    from qwen2vl_nb.run.watch import Seen, _figures, _headline
    told = Texts('zh').retold
    doing = {*_said_of_the_beginning()}
    assert len(doing) > 12 and "building DeepSpeed's engine" in doing and 'reading the data' in doing
    for text in doing: assert not _english_in(told(text)), text
    for unit in ('step', 'row', 'batch'):
        for rate in (.5, 2.): assert not _english_in(told(Progress(1, 2, rate=rate, unit=unit).pace))
        for state in ('running', 'done', 'failed', 'stopped', 'stopping', 'resuming', 'damaged'):
            for now in (Progress(1, 2000, .5, left=1e6, unit=unit), Progress(unit=unit, doing='tokenizing: 1 of 2 rows')):
                for ended in ('', 'took 0:00:29, ended 2026-12-01 04:00', 'took 0:00:29 since it was resumed, ended 2026-12-01 04:00'):
                    line = _headline(Seen('7', state, now, ended), told)
                    assert not _english_in(line), line
    logged = _figures(dict(step=7, loss=.5, eval_loss=.4, lowest=.3, lr=1e-4, margin=1.25, accuracy=.9), told)
    assert logged == '已记录到第 7 步: loss 0.5, 评估 0.4（最低 0.3）, 学习率 0.0001, 间隔 1.25, 准确率 0.9'

def test_a_gallery_speaks_chinese_and_english_again():
    from qwen2vl_nb.panel.texts import Texts
    from qwen2vl_nb.prediction.show import show_predictions
    labels = [('7', '7'), ('7', '78'), ('7', None), (None, '7')]
    rows = [{'id': i, 'prompt': '?', 'label': a, 'predict': b, 'finish_reason': b and 'length', 'error': None if b else '!'} for i, (a, b) in enumerate(labels)]
    view = show_predictions(rows, wrong=True, n=1)
    before = [*_shown(view)], view._filter.options
    view.say_as(Texts('zh').retold)
    def text():
        parts = [part for part in _shown(view) if part != view._filter.value] + [name for name, _ in view._filter.options]
        return re.sub(r'<style>.*?</style>|<.*?>', ' ', ' '.join(parts), flags=re.S)
    assert view._filter.value == 'wrong' and len(view.rows) == 2 and view._filter.options[1] == ('错误 (2)', 'wrong')
    for name in ('wrong', 'right', 'failed', 'no label', 'all'):
        view._filter.value = name
        assert not _english_in(text()), text()
    view._search.value = 'zebra'
    assert '没有可显示的内容' in text() and not _english_in(text().replace('zebra', ''))
    view._search.value, view._filter.value = '', 'wrong'
    view.say_as(str)
    assert ([*_shown(view)], view._filter.options) == before
