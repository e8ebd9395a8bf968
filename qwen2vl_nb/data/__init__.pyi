# Box('car', 20, 38, 82, 68).coordinates
from .boxes import Box as Box
# count_boxes('[{"bbox_2d": [20, 38, 82, 68], "label": "car"}]')
from .boxes import count_boxes as count_boxes
# format_boxes([Box('car', 20, 38, 82, 68)], size=(112, 84), family='qwen3_vl')
from .boxes import format_boxes as format_boxes
# parse_boxes(answer, size=(112, 84), family='qwen3_vl')
from .boxes import parse_boxes as parse_boxes
# sample_boxes(samples[0], size=(112, 84))
from .boxes import sample_boxes as sample_boxes
# samples = [to_boxes(sample, 'qwen3_vl') for sample in samples]
from .boxes import to_boxes as to_boxes
# samples = read_samples('labels.csv', image='picture', prompt='What is this?', response='label')
from .sources import read_samples as read_samples
# count_tokens(samples, 'models/Qwen2-VL-7B-Instruct').total.max()
from .tokens import count_tokens as count_tokens
# check_samples(samples, model='models/Qwen2-VL-7B-Instruct')
from .check import check_samples as check_samples
# samples, findings = mend_samples(samples)
from .check import mend_samples as mend_samples
# samples = drop_samples(samples, check_samples(samples))
from .check import drop_samples as drop_samples
# train, test = split_samples(samples, test=.1, stratify='output')
from .split import split_samples as split_samples
# write_samples(samples, 'data/my_cars.json', media='copy')
from .write import write_samples as write_samples
# describe_samples(samples)
from .describe import describe_samples as describe_samples
# show_samples(samples, n=4)
from .describe import show_samples as show_samples
# registry = Registry('data')
# registry.add('my_cars', samples)
from .registry import Registry as Registry
# samples = dataset_samples(Registry('data'), 'my_cars')
from .registry import dataset_samples as dataset_samples
