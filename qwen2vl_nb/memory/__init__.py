"""GPU memory: simulated, predicted, and the ZeRO config that fits"""
from qwen2vl_nb.names import lazily

__all__, __getattr__, __dir__ = lazily(__name__, __file__)
