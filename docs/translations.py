"""What is missing or out of date in the Chinese files (`*.zh.md`, `*.zh.ipynb`), compared with the English ones.

Each Chinese paragraph (in a notebook, each Markdown cell) ends with a line `<!-- translates 1a2b3c4d -->`: the digest
of the English paragraph, with the comments of the code below it, as it was when it was translated. Whoever changes the
English sees here which paragraphs are to be translated anew, and the line to write below the new translation. Code
apart from its comments, code spans, links and figures must be the same in both. What is there in Chinese only ends with
`<!-- translates nothing -->`.

The panel's Chinese texts stand with the English that they were translated from."""
import hashlib, json, re, sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r'\n<!-- translates (\w+) -->\s*$')
COMMENT = re.compile(r'(?:^|[ \t]+)# (.*)$', re.M)
SPAN = re.compile(r'`[^`]+`')
CHINESE = re.compile(r'[\u4e00-\u9fff]')

@dataclass
class Section:
    "A paragraph or Markdown cell, with the code below it."
    text: str
    code: list = field(default_factory=list)

    @property
    def comments(self): return [comment for code in self.code for comment in COMMENT.findall(code)]

    @property
    def digest(self):
        words = '\n'.join([self.text, *self.comments]).split()
        return hashlib.sha256(' '.join(words).encode()).hexdigest()[:8]

    @property
    def translates(self): return found[1] if (found := MARK.search(self.text)) else None

    @property
    def start(self): return '“' + ' '.join(MARK.sub('', self.text).split())[:60] + ' …”'

def pairs():
    "The (English, Chinese) files."
    chinese = sorted([*ROOT.glob('*.zh.md'), *(ROOT/'nbs').glob('*/*.zh.ipynb')])
    return [(path.with_name(path.name.replace('.zh.', '.')), path) for path in chinese]

def paragraphs(text):
    "(whether it is output, text) of each paragraph of Markdown without fenced code."
    found = [p.strip('\n').rstrip() for p in re.split(r'\n\s*?\n', text) if p.strip()]
    return [(p.startswith('    '), p) for p in found]

def pieces(path):
    "(whether it is code, text) of each cell of a notebook, or of each paragraph and block of code of a Markdown file."
    text = path.read_text(encoding='utf-8')
    if path.suffix == '.ipynb':
        return [(c['cell_type'] == 'code', ''.join(c['source'])) for c in json.loads(text)['cells']]
    parts = re.split(r'(^```.*?^```$)', text, flags=re.M | re.S)
    return [piece for i, part in enumerate(parts) for piece in ([(True, part)] if i%2 else paragraphs(part))]

def sections(path):
    "The sections of a file; a heading belongs to the paragraph below it."
    found = []
    for is_code, text in pieces(path):
        if is_code and found: found[-1].code.append(text)
        elif found and not found[-1].code and re.fullmatch(r'#+ .*', found[-1].text): found[-1].text += f'\n\n{text}'
        else: found.append(Section(text))
    return found

def compared(text):
    "What must be the same in both languages, for each row of a table or item of a list."
    def of(part):
        spans, part = SPAN.findall(part), SPAN.sub('', part)
        links, part = re.findall(r'\]\((\S+?)\)', part), re.sub(r'\]\(\S+?\)', ']', part)
        part = re.sub(r'(?<=\d),(?=\d{3})|\d+ 月', '', part) # months have names in English
        figures = re.findall(r'\d+(?:\.\d+)*', part)
        return {'code': spans, 'links': [link.replace('.zh.', '.') for link in links], 'figures': figures,
                'bold': re.findall(r'\*\*', part)}
    return [of(part) for part in re.split(r'\n(?=\||- )', MARK.sub('', text))]

def difference(english, chinese):
    "What one list has and the other does not, in words; empty if they are the same in any order."
    missing, more = [*english], []
    for x in chinese: missing.remove(x) if x in missing else more.append(x)
    found = {'missing': missing, 'not in the English': more}
    return '; '.join(f'{name} {", ".join(lines)}' for name, lines in found.items() if lines)

def bare(code): return [line.rstrip() for line in COMMENT.sub('', code).splitlines() if line.strip()]

def text_faults(english, chinese):
    "What is not the same in the text of a section and that of its translation."
    mine, theirs = compared(english.text), compared(chinese.text)
    if len(mine) != len(theirs): yield f'{len(theirs)} rows or items instead of {len(mine)}'
    for i, (a, b) in enumerate(zip(mine, theirs)):
        where = f'row or item {i}, ' if len(mine) > 1 else ''
        yield from (f'{where}{kind}: {said}' for kind in a if (said := difference(a[kind], b[kind])))
    if not CHINESE.search(SPAN.sub('', chinese.text)): yield 'is not Chinese'

def code_faults(english, chinese):
    "What is not the same in the code of a section and that of its translation, and in the comments."
    if len(english.code) != len(chinese.code):
        yield f'{len(chinese.code)} blocks of code instead of {len(english.code)}'
    for a, b in zip(english.code, chinese.code):
        if bare(a) != bare(b): yield f'code: {difference(bare(a), bare(b)) or "lines in another order"}'
    if len(english.comments) != len(chinese.comments):
        yield f'{len(chinese.comments)} comments in the code instead of {len(english.comments)}'
    yield from (f'comment that is not Chinese: {c}' for c in chinese.comments if not CHINESE.search(c))

def faults(english, chinese):
    "What is missing or out of date in a Chinese file, in words."
    mine, theirs = sections(english), [s for s in sections(chinese) if s.translates != 'nothing']
    translated, digests = {s.translates: s for s in theirs}, [s.digest for s in mine]
    found = [f'{english.name}: {s.start} is new or has changed; translate it, and write below the translation:\n'
             f'<!-- translates {s.digest} -->' for s in mine if s.digest not in translated]
    found += [f'{chinese.name}: {s.start} translates English that is no longer there'
              for s in theirs if s.translates not in digests]
    if not found and [s.translates for s in theirs] != digests: found = [f'{chinese.name}: sections in another order']
    both = [(s, translated[s.digest]) for s in mine if s.digest in translated]
    return found + [f'{chinese.name}: {b.start}: {said}' for a, b in both
                    for said in [*text_faults(a, b), *code_faults(a, b)]]

def table_faults(english, chinese):
    "What is missing or out of date in a table of texts: key → (the English that was translated, Chinese)."
    translated = {key: text for key, (text, _) in chinese.items()}
    found = [f'{key} is missing: {english[key]!r}' for key in english if key not in chinese]
    found += [f'{key} is superfluous' for key in chinese if key not in english]
    return found + [f'{key} translates {translated[key]!r}, and now reads {text!r}'
                    for key, text in english.items() if translated.get(key, text) != text]

def panel_faults():
    "What is missing or out of date in the panel's Chinese texts."
    from qwen2vl_nb.panel.chinese import CHINESE
    from qwen2vl_nb.panel.texts import ENGLISH
    return [f'nbs/panel/00_chinese.ipynb: {said}' for said in table_faults(ENGLISH, CHINESE)]

if __name__ == '__main__':
    found = [said for pair in pairs() for said in faults(*pair)] + panel_faults()
    print('\n'.join(found) or 'The Chinese files are up to date.')
    sys.exit(bool(found))
