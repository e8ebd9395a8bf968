from .stack import Gpu as Gpu
from .stack import check_stack as check_stack
from .stack import gpus as gpus
from .findings import Finding as Finding
from .model import image_tokens as image_tokens
from .model import sampled_frames as sampled_frames
from .model import video_tokens as video_tokens
from .recipe import load_recipe as load_recipe
from .recipe import predict_recipe as predict_recipe
from .recipe import save_recipe as save_recipe
from .recipe import train_recipe as train_recipe
from .zero import zero_config as zero_config
from .zero import zero_names as zero_names
from .data import *
from .memory import *
from .checks import check_recipe as check_recipe
from .run import *
from .prediction import *
from .tuning import *
from .panel import *
from .tiny import make_car_item as make_car_item
from .tiny import make_car_scenes as make_car_scenes
from .tiny import make_car_video as make_car_video
from .tiny import tiny_model as tiny_model
from .cli import tutorial as tutorial
