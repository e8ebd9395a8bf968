"Everything that is said about the package stands in settings.ini."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
ini = config['DEFAULT']
readme = here/'README.md'

setup(
    name=ini['lib_name'], version=ini['version'], description=ini['description'], author=ini['author'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0', keywords=ini['keywords'].split(), packages=find_packages(include=[ini['lib_path']+'*']),
    package_data={'': ['*.pyi', 'py.typed']},
    python_requires=f">={ini['min_python']}", install_requires=ini['requirements'].split(),
    extras_require={'dev': ini['dev_requirements'].split(), 'search': ini['search_requirements'].split()},
    classifiers=['Development Status :: 4 - Beta', 'Framework :: Jupyter', 'Programming Language :: Python :: 3'],
)
