"Run the car_item tutorial headless, in front of the user; `make demo` calls this."
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
    print(f'The whole job, in {folder}')
    execute(HERE/'car_item.ipynb', folder/'car_item.ipynb')
    before, after = (score(Predictions(folder/name))['exact'] for name in ('before', 'after'))
    print(f'''
Done in {time.time() - began:.0f} s. Item cards exactly right, on pictures that training never saw:
  before fine-tuning  {before:5.1f} %
  after               {after:5.1f} %
The notebook with its pictures   {folder}/car_item.ipynb
The loss curve                   {folder}/training_loss.png
The answers                      {folder}/after/predictions.jsonl
Next: `make lab` opens JupyterLab on that notebook.''')
    if not (before <= 20 and after >= 90):
        sys.exit('That is not what it should be (at most 20 % before, at least 90 % after): please report it, with the '
                 'folder above.')

if __name__ == '__main__': main()
