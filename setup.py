"Everything that is said about the package stands in settings.ini."
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
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0', keywords=ini['keywords'].split(), packages=find_packages(include=[ini['lib_path']+'*']),
    cmdclass={'build_py': BuildWithTutorials}, entry_points={'console_scripts': ['qwen2vl-nb=qwen2vl_nb.cli:main']},
    package_data={'': ['*.pyi', 'py.typed']},
    python_requires=f">={ini['min_python']}", install_requires=ini['requirements'].split(),
    extras_require={'dev': ini['dev_requirements'].split(), 'search': ini['search_requirements'].split()},
    classifiers=['Development Status :: 4 - Beta', 'Framework :: Jupyter', 'Programming Language :: Python :: 3'],
)
