"The package as it was installed: what it holds, and what importing it costs."
import importlib, pkgutil, subprocess, sys

import qwen2vl_nb
from conftest import SITE

def test_it_is_the_wheel_that_is_tested(): assert qwen2vl_nb.__file__.startswith(SITE)

def test_every_module_imports():
    names = [m.name for m in pkgutil.iter_modules(qwen2vl_nb.__path__)]
    assert {'stack', 'data', 'registry', 'recipe', 'zero', 'memory', 'plan', 'checkpoint', 'loss', 'waiter', 'worker', 'failure', 'run', 'watch', 'predict', 'score', 'tiny', 'all'} <= set(names)
    for name in names: importlib.import_module(f'qwen2vl_nb.{name}')

def test_importing_all_imports_nothing_heavy():
    heavy = ('torch', 'llamafactory', 'transformers', 'deepspeed', 'datasets', 'pandas', 'matplotlib')
    code = f'import qwen2vl_nb.all, sys; print([m for m in {heavy} if m in sys.modules])'
    assert subprocess.check_output([sys.executable, '-c', code], text=True).strip() == '[]'

def test_star_import_gives_the_names_that_notebooks_use():
    names = {}
    exec('from qwen2vl_nb.all import *', names)
    wanted = '''check_stack gpus Finding read_samples check_samples split_samples write_samples image_tokens show_samples Registry train_recipe
        predict_recipe save_recipe load_recipe check_recipe zero_config predict_memory MemoryEstimate zero_table pick_zero read_log plot_loss
        launch attach Run runs watch_loss export predict Predictions score compare show_predictions tiny_model make_car_item'''.split()
    assert not [n for n in wanted if n not in names]
