"""Fine-tune Qwen vision-language models from a notebook"""
__version__ = "0.2.0"

from qwen2vl_nb.names import lazily

__all__, __getattr__, __dir__ = lazily(__name__, __file__)
