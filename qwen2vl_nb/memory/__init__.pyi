# predict_memory(recipe, gpus=8).fits(80)
from .estimate import MemoryEstimate as MemoryEstimate
# print(predict_memory(recipe, 'z3', gpus=8))
from .estimate import predict_memory as predict_memory
# zero_table(recipe, gpus=8, gpu_gib=80).to_pandas()
from .plan import ZeroTable as ZeroTable
# recipe = pick_zero(recipe, gpus=8, gpu_gib=80)
from .plan import pick_zero as pick_zero
# what_would_fit(recipe, gpus=1, gpu_gib=24)
from .plan import what_would_fit as what_would_fit
# zero_table(recipe, gpus=8, gpu_gib=80)
from .plan import zero_table as zero_table
# recipe = fill_gpus(recipe, gpus=8, gpu_gib=80)
from .fill import fill_gpus as fill_gpus
