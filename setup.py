"Everything that is said about the package stands in settings.ini."
import re
from configparser import ConfigParser
from pathlib import Path
from shutil import copytree, ignore_patterns
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
ini = config['DEFAULT']
readme = here/'README.md'
url, branch = ini['git_url'].rstrip('/'), ini['branch']
stages = 'Planning', 'Pre-Alpha', 'Alpha', 'Beta', 'Production/Stable'

def on_its_own(text):
    "The README where the repository's files are not beside it: links to them lead to `git_url`, or are plain text without one."
    def there(link):
        picture, words, path = link.groups()
        if not url: return '' if picture else words
        return f"{picture}[{words}]({url}/{'raw' if picture else 'blob'}/{branch}/{path})"
    return re.sub(r'(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)]+)\)', there, text)

class BuildWithTutorials(build_py):
    "Puts the tutorials, their data and their model into the wheel; in a clone they are where they are."
    def run(self):
        super().run()
        if self.editable_mode: return
        included, only = Path(self.build_lib)/ini['lib_name']/'included', ignore_patterns('.*')
        copytree(here/'data', included/'data', ignore=only, dirs_exist_ok=True)
        copytree(here/'nbs'/'tutorials', included/'tutorials', ignore=only, dirs_exist_ok=True)

setup(
    name=ini['lib_name'], version=ini['version'], description=ini['description'], author=ini['author'],
    long_description=on_its_own(readme.read_text(encoding='utf-8')) if readme.exists() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0', keywords=ini['keywords'].split(), packages=find_packages(include=[ini['lib_path']+'*']),
    cmdclass={'build_py': BuildWithTutorials}, entry_points={'console_scripts': ['qwen2vl-nb=qwen2vl_nb.cli:main']},
    package_data={'': ['*.pyi', 'py.typed']},
    python_requires=f">={ini['min_python']}", install_requires=ini['requirements'].split(),
    extras_require={'dev': ini['dev_requirements'].split(), 'search': ini['search_requirements'].split()},
    project_urls={'Source': url, 'Changelog': f'{url}/blob/{branch}/CHANGELOG.md', 'Issues': f'{url}/issues'} if url else {},
    classifiers=[f"Development Status :: {ini['status']} - {stages[int(ini['status']) - 1]}", 'Framework :: Jupyter',
                 'Intended Audience :: Developers', 'Intended Audience :: Science/Research', 'Operating System :: POSIX :: Linux',
                 *(f'Programming Language :: Python :: {v}' for v in ('3', '3.11', '3.12', '3.13')),
                 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
)
