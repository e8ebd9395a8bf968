from .predictions import Predictions as Predictions
from .engines import predict as predict
from .scores import compare as compare
from .scores import score as score
from .serve import Served as Served
from .serve import serve as serve
from .show import show_predictions as show_predictions
