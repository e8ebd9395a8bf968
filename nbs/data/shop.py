"""The small shop of the notebooks in this folder: four pictures, and a table with a line for each"""
import tempfile
from pathlib import Path

from PIL import Image

from qwen2vl_nb.data.sources import read_samples

LABELS = '''photo,caption,car_id
photos/a.png,"A red car, nearly new",017
photos/b.png,一辆蓝色的车,018
photos/c.png,A golden car,019
photos/d.png,A green car,019
'''

def make_shop():
    "Make the shop in a temporary folder. Returns the folder and its samples."
    shop = Path(tempfile.mkdtemp())/'my shop 店'
    (shop/'photos').mkdir(parents=True)
    for name, colour in {'a': 'crimson', 'b': 'royalblue', 'c': 'gold', 'd': 'seagreen'}.items():
        Image.new('RGB', (120, 90), colour).save(shop/'photos'/f'{name}.png')
    (shop/'labels.csv').write_text(LABELS, encoding='utf-8')
    return shop, read_samples(shop/'labels.csv', image='photo', prompt='What is this?', response='caption')
