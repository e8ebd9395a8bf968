"Pictures of vehicles whose labels are boxes in Qwen2-VL's own form, and a model that is taught to give them."
import random

from PIL import Image

from qwen2vl_nb.recipe import train_recipe
from qwen2vl_nb.data.registry import Registry
from qwen2vl_nb.run.start import launch
from qwen2vl_nb.tiny import SIZE, draw_vehicle

COLORS = {'car': 'red', 'truck': 'yellow', 'bus': 'blue'}
BOXES = ['(50,240),(450,760)', '(550,240),(950,760)'] # In the left half of a picture, in the right half

def draw_boxes(folder, n, seed):
    "Samples with a vehicle on the left or on the right. There are six different answers, so that a small model can be right to the letter."
    chance, samples = random.Random(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        item, right = list(COLORS)[i % 3], i//3 % 2
        picture = Image.new('RGB', (2*SIZE[0], SIZE[1]), (120, 150, 120))
        picture.paste(draw_vehicle(item, COLORS[item], chance).convert('RGB'), (right*SIZE[0], 0))
        picture.save(folder/f'{i}.png')
        answer = f'<|object_ref_start|>{item}<|object_ref_end|><|box_start|>{BOXES[right]}<|box_end|>'
        samples.append({'instruction': '<image>Name the item.', 'input': '', 'output': answer, 'images': [str(folder/f'{i}.png')]})
    return samples

def teach_boxes(model, folder):
    "Fine-tune a model on them; gives the folder of the new model."
    Registry(folder/'data').add('boxes', draw_boxes(folder/'pictures', 240, 0))
    recipe = train_recipe(model, 'boxes', folder/'run', dataset_dir=str(folder/'data'), finetuning_type='full', max_steps=70, learning_rate=2e-3, use_cpu=True,
        per_device_train_batch_size=16, gradient_accumulation_steps=1, bf16=None, preprocessing_num_workers=None, save_strategy='no', plot_loss=False)
    return launch(recipe).wait().output_dir
