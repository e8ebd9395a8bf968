"Run the car_item tutorial without a browser and show its progress in the terminal; `make demo` calls this."
import os, sys, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))
from execute import execute  # noqa: E402

def main():
    from qwen2vl_nb.prediction.predictions import Predictions
    from qwen2vl_nb.prediction.scores import score
    began = time.time()
    folder = ROOT/'runs'/f"car_item-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True)
    os.environ['RUN_FOLDER'] = os.path.relpath(folder, HERE)
    print(f'Running the whole job in {folder}')
    execute(HERE/'car_item.ipynb', folder/'car_item.ipynb')
    before, after = (score(Predictions(folder/name))['exact'] for name in ('before', 'after'))
    print(f'''
Done in {time.time() - began:.0f} s. Item cards that are exactly right, for pictures that were not used in training:
  before fine-tuning  {before:5.1f} %
  after               {after:5.1f} %
The notebook with its pictures   {folder}/car_item.ipynb
The loss curve                   {folder}/training_loss.png
The answers                      {folder}/after/predictions.jsonl
Next: `make lab` opens JupyterLab on that notebook.''')
    if not (before <= 20 and after >= 90):
        sys.exit('This is not the expected result (at most 20 % before, at least 90 % after): please report it, with '
                 'the folder above.')

if __name__ == '__main__': main()
