from .estimate import MemoryEstimate as MemoryEstimate
from .estimate import predict_memory as predict_memory
from .plan import ZeroTable as ZeroTable
from .plan import pick_zero as pick_zero
from .plan import what_would_fit as what_would_fit
from .plan import zero_table as zero_table
from .fill import fill_gpus as fill_gpus
