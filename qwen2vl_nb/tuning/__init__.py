"""Better models: checkpoints scored by their answers, and settings compared"""
from qwen2vl_nb.names import lazily

__all__, __getattr__, __dir__ = lazily(__name__, __file__)
