from .sweeps import Sweep as Sweep
from .sweeps import sweep as sweep
from .checkpoints import score_checkpoints as score_checkpoints
