"The whole chain with the real `llamafactory-cli`, through paths with a space and Chinese characters."
import json, shutil

import pytest

from qwen2vl_nb.checks import check_recipe
from qwen2vl_nb.recipe import predict_recipe, train_recipe
from qwen2vl_nb.data.check import check_samples
from qwen2vl_nb.data.registry import Registry
from qwen2vl_nb.data.sources import read_samples
from qwen2vl_nb.data.split import split_samples
from qwen2vl_nb.prediction.engines import predict
from qwen2vl_nb.prediction.predictions import Predictions
from qwen2vl_nb.prediction.scores import score
from qwen2vl_nb.prediction.show import show_predictions
from qwen2vl_nb.run.loss import plot_loss, read_log
from qwen2vl_nb.run.start import launch

@pytest.fixture(scope='module')
def chain(tmp_path_factory, tiny, data):
    "Spreadsheet to scores, once; what the stages gave, by name."
    home = tmp_path_factory.mktemp('chain')/'我的 车 folder'
    model = shutil.copytree(tiny, home/'模型 model')
    pictures = shutil.copytree(data/'car_item'/'images', home/'图片 pictures')
    rows = json.loads((data/'car_item'/'train.json').read_text())
    lines = ['picture,card'] + ['图片 pictures/{},"{}"'.format(r['images'][0].split('/')[-1], r['output'].replace('"', '""')) for r in rows]
    (home/'标签.csv').write_text('\n'.join(lines), encoding='utf-8')
    samples = read_samples(home/'标签.csv', image='picture', prompt='Fill in the item card.', response='card')
    train, test = split_samples(samples, test=40)
    reg = Registry(home/'数据')
    reg.add('小车', train)
    reg.add('小车 test', test)
    recipe = train_recipe(model, '小车', home/'运行 run', dataset_dir=str(reg.dataset_dir), eval_dataset='小车 test', eval_strategy='steps', eval_steps=20, max_steps=60,
        logging_steps=5, learning_rate=3e-3, per_device_train_batch_size=8, gradient_accumulation_steps=1, bf16=None, use_cpu=True, preprocessing_num_workers=None)
    faults = check_recipe(recipe)
    run = launch(recipe).wait()
    asked = predict_recipe(model, '小车 test', home/'预测 predict', adapter=run, dataset_dir=str(reg.dataset_dir), per_device_eval_batch_size=20, max_new_tokens=32,
                           use_cpu=True, preprocessing_num_workers=None)
    return dict(home=home, pictures=pictures, samples=samples, test=test, faults=faults, run=run, predictions=predict(asked, engine='llamafactory'))

def test_nothing_was_wrong(chain): assert check_samples(chain['samples']).empty and chain['faults'].empty

def test_it_learnt(chain):
    log = read_log(chain['run'])
    losses = log.loss.dropna()
    assert losses.iloc[-1] < losses.iloc[0]/2
    assert list(log.dropna(subset=['eval_loss']).current_steps) == [20, 40, 60]

def test_the_curve_is_drawn(chain, tmp_path):
    figure = plot_loss(chain['run'])
    assert [line.get_label() for line in figure.axes[0].lines][1:] == ['smoothed', 'evaluation']
    figure.savefig(tmp_path/'loss.png')
    assert (chain['run'].output_dir/'training_loss.png').stat().st_size > 5000, "LLaMA-Factory's own"

def test_predictions_carry_what_they_are_about(chain):
    p = chain['predictions']
    assert [(r['images'], r['label']) for r in p] == [(s['images'], s['output']) for s in chain['test']]
    assert all(r['images'][0].startswith(str(chain['pictures'])) for r in p)
    assert list(Predictions(p.output_dir)) == list(p) and set(p[0]) == {'row', 'id', 'images', 'prompt', 'label', 'predict', 'engine'}

def test_scores_are_those_of_llamafactory(chain):
    ours, its = score(chain['predictions']), json.loads((chain['predictions'].output_dir/'predict_results.json').read_text())
    for name in ('bleu-4', 'rouge-1', 'rouge-2', 'rouge-l'): assert ours[name] == pytest.approx(its[f'predict_{name}'], abs=1e-6), name
    assert ours['exact'] > 30, 'sixty steps are few, but not nothing'

def test_answers_are_shown(chain):
    p = chain['predictions']
    wrong = [r for r in p if r['predict'].strip() != r['label'].strip()]
    assert len(show_predictions(p, wrong=True, n=100).rows) == len(wrong)
    assert show_predictions(p)._repr_html_().count('<img src="data:image/') == 8
