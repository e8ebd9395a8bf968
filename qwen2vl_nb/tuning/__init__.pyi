from .sweeps import Sweep as Sweep
from .sweeps import sweep as sweep
from .checkpoints import score_checkpoints as score_checkpoints
from .hand_over import Upload as Upload
from .hand_over import model_card as model_card
from .hand_over import push_to_hub as push_to_hub
from .hand_over import serving_lines as serving_lines
