"What takes longer than everybody should wait for: `make soak`."
import pytest

from conftest import PATIENCE, until
from qwen2vl_nb.recipe import predict_recipe, train_recipe
from qwen2vl_nb.prediction.engines import predict
from qwen2vl_nb.prediction.scores import score
from qwen2vl_nb.run.start import launch

@pytest.mark.soak
@pytest.mark.parametrize('seed', [1, 2, 3])
def test_the_item_card_is_learnt_with_any_seed(seed, tiny, data, tmp_path):
    "The tutorial's fine-tuning in a single process, with other seeds than its own."
    where = dict(dataset_dir=str(data), use_cpu=True, preprocessing_num_workers=None)
    recipe = train_recipe(tiny, 'car_item', tmp_path/'run', learning_rate=3e-3, num_train_epochs=10., per_device_train_batch_size=16,
                          gradient_accumulation_steps=1, cutoff_len=256, bf16=None, seed=seed, **where)
    asking = dict(per_device_eval_batch_size=50, max_new_tokens=32, **where)
    before = predict(predict_recipe(tiny, 'car_item_test', tmp_path/'before', **asking))
    after = predict(predict_recipe(tiny, 'car_item_test', tmp_path/'after', adapter=launch(recipe).wait(), **asking))
    assert score(before)['exact'] <= 20 and score(after)['exact'] >= 90

@pytest.mark.soak
def test_what_does_not_end_is_ended(tmp_path):
    "A run that ignores SIGTERM is ended by force when the grace is over."
    import json, signal, subprocess, sys
    from qwen2vl_nb.run import waiter
    from qwen2vl_nb.boot import script
    (tmp_path/'run.json').write_text(json.dumps({'command': ['sh', '-c', 'trap "" TERM; sleep 300 & wait'], 'cwd': str(tmp_path), 'env': {}}))
    process = subprocess.Popen([sys.executable, '-I', *script('run.waiter', tmp_path)], start_new_session=True)
    below = until(lambda: len(found := waiter.descendants(process.pid)) == 2 and (tmp_path/'waiter.json').exists() and found)
    process.send_signal(signal.SIGTERM)
    process.wait(waiter.GRACE + PATIENCE)
    assert not [p for p in below if waiter.created(p)]
    assert json.loads((tmp_path/'ended.json').read_text())['asked']
