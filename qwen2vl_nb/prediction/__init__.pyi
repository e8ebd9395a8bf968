# [row['predict'] for row in Predictions('runs/first-predict-my_cars_test')]
from .predictions import Predictions as Predictions
# p = predict(predict_recipe('Qwen/Qwen2-VL-7B-Instruct', 'my_cars_test', adapter=run))
from .engines import predict as predict
# compare(before, after, measure='exact')
from .scores import compare as compare
# score(p).overall
from .scores import score as score
# served = serve('runs/first')
# served.stop()
from .serve import Served as Served
# served = serve('runs/first')
# served.ask('car.png', 'What is this?')
from .serve import serve as serve
# show_predictions(p, wrong=True)
from .show import show_predictions as show_predictions
