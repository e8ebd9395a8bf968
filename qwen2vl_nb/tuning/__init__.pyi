from .sweeps import Sweep as Sweep
from .sweeps import sweep as sweep
