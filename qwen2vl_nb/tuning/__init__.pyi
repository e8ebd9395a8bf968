# found = sweep(recipe, 'my_cars_val', lora_rank=[8, 32])
# launch(found.best | {'output_dir': 'runs/best'})
from .sweeps import Sweep as Sweep
# sweep(recipe, 'my_cars_val', learning_rate=[1e-4, 3e-4], lora_rank=[8, 32])
from .sweeps import sweep as sweep
# score_checkpoints(run, 'my_cars_val').best
from .checkpoints import score_checkpoints as score_checkpoints
# print(push_to_hub(run, 'me/car-cards', dry_run=True).files)
from .hand_over import Upload as Upload
# print(model_card(run, p, license='apache-2.0'))
from .hand_over import model_card as model_card
# push_to_hub(run, 'me/car-cards', p, dry_run=True)
from .hand_over import push_to_hub as push_to_hub
# print(serving_lines(run)['api'])
from .hand_over import serving_lines as serving_lines
