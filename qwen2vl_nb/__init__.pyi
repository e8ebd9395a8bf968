# [gpu.free for gpu in gpus()]
from .stack import Gpu as Gpu
# check_stack()
from .stack import check_stack as check_stack
# [gpu.name for gpu in gpus()]
from .stack import gpus as gpus
# print(run.failure.what)
# print(run.failure.cure)
from .findings import Finding as Finding
# image_tokens(1920, 1080, image_max_pixels=768*768)
from .model import image_tokens as image_tokens
# sampled_frames(frames=300, seconds=10, video_fps=2)
from .model import sampled_frames as sampled_frames
# video_tokens(frames=20, width=640, height=360)
from .model import video_tokens as video_tokens
# recipe = load_recipe('recipe.yaml')
from .recipe import load_recipe as load_recipe
# recipe = predict_recipe('Qwen/Qwen2-VL-7B-Instruct', 'my_cars_test', adapter=run, max_new_tokens=64)
from .recipe import predict_recipe as predict_recipe
# asked = answering_recipe(run.recipe, run, 'my_cars_test', max_new_tokens=64)
from .recipe import answering_recipe as answering_recipe
# save_recipe(recipe, 'recipe.yaml')
from .recipe import save_recipe as save_recipe
# recipe = train_recipe('Qwen/Qwen2-VL-7B-Instruct', 'my_cars', 'runs/first', lora_rank=16)
from .recipe import train_recipe as train_recipe
# recipe = recipe | {'deepspeed': zero_config('z3')}
from .zero import zero_config as zero_config
from .zero import zero_names as zero_names
from .data import *
from .memory import *
# check_recipe(recipe)
from .checks import check_recipe as check_recipe
from .run import *
from .prediction import *
from .tuning import *
from .panel import *
# make_car_item('data/car_item')
from .tiny import make_car_item as make_car_item
# make_car_scenes('data/car_scenes', n_train=500)
from .tiny import make_car_scenes as make_car_scenes
# make_car_video('data/car_video')
from .tiny import make_car_video as make_car_video
# tiny_model('models/tiny', family='qwen3_vl')
from .tiny import tiny_model as tiny_model
# tutorial('qwen2vl_nb-tutorial')
from .cli import tutorial as tutorial
