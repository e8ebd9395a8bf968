# check_answers(Predictions('runs/first-predict-my_cars_test'))
from .answers import check_answers as check_answers
# check_health('runs/first')
from .health import check_health as check_health
# log = Log('runs/first')
# log.update()
# log.summary()
from .loss import Log as Log
# plot_loss('runs/first', 'runs/second', lr=True)
from .loss import plot_loss as plot_loss
# read_log('runs/first').loss.min()
from .loss import read_log as read_log
# print(run.progress)
from .start import Progress as Progress
# run = launch(recipe)
# run.stop()
# run.resume()
from .start import Run as Run
# run = attach('runs/first')
from .start import attach as attach
# export('runs/first', 'models/cars')
from .merge import export as export
# run = launch(recipe, nproc=8)
# run.watch()
from .start import launch as launch
# runs('runs')
from .start import runs as runs
# watch_loss('runs/first')
from .watch import watch_loss as watch_loss
# clear_tokens()
from .tokenized import clear_tokens as clear_tokens
# kept_tokens()
from .tokenized import kept_tokens as kept_tokens
