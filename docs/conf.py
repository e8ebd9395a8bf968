"The site's settings for Sphinx. `generate.py` writes its pages."
import re
from configparser import ConfigParser
from pathlib import Path

config = ConfigParser(delimiters=['='])
config.read(Path(__file__).parent.parent/'settings.ini', encoding='utf-8')
ini = config['DEFAULT']
project, author, copyright, release = ini['lib_name'], ini['author'], ini['copyright'], ini['version']
extensions = ['myst_nb', 'sphinx_copybutton']

# Notebooks are shown with the outputs they have; nothing is executed, and nothing comes from the network
nb_execution_mode = 'off'
nb_ipywidgets_js = {}
nb_merge_streams = True
nb_mime_priority_overrides = [('html', 'text/html', 0), ('html', 'image/svg+xml', 1)]
myst_enable_extensions = ['colon_fence', 'fieldlist']
myst_heading_anchors = 4
suppress_warnings = ['mystnb.unknown_mime_type', 'myst.header']

# A name in a page that the API reference does not have is an error; annotations are no links
nitpicky = True
nitpick_ignore_regex = [('py:class', '.*')]

add_module_names = False
python_maximum_signature_line_length = 70
python_display_short_literal_types = True
toc_object_entries_show_parents = 'hide'

html_theme = 'pydata_sphinx_theme'
html_title = ini['title']
html_static_path = ['_static']
html_css_files = ['site.css']
html_search_scorer = str(Path(__file__).with_name('_static')/'search.js')
html_copy_source = html_show_sourcelink = False
no_sidebar = 'index', 'changelog', 'readme.zh', 'contributing', 'llamafactory', 'comparison', 'safety'
html_sidebars = {page: [] for page in no_sidebar}
html_theme_options = {
    'show_prev_next': False, 'navigation_with_keys': False, 'secondary_sidebar_items': ['page-toc'],
    'footer_start': ['copyright'], 'footer_end': [], 'show_toc_level': 2, 'header_links_before_dropdown': 5,
    'article_header_start': ['breadcrumbs'], 'navbar_align': 'left'}

def chinese(app, page, template, context, tree):
    "Chinese pages say that they are: browsers then choose the right form of each character."
    if page.endswith('.zh'): context['language'] = 'zh-CN'

def searched(text):
    "The words of a text that the search finds; in Chinese, which has no blanks, also each two neighbouring characters."
    pairs = (part[i:i + 2] for part in re.findall('[\u4e00-\u9fff]+', text) for i in range(len(part) - 1))
    return [*re.findall(r'\w+', text), *pairs]

def setup(app):
    from sphinx.search.en import SearchEnglish
    class Search(SearchEnglish):
        def split(self, input): return searched(input)
    app.add_search_language(Search)
    app.connect('html-page-context', chinese)
