"""The whole job as one form: from a table to scored answers, with the code that does it"""
from qwen2vl_nb.names import lazily

__all__, __getattr__, __dir__ = lazily(__name__, __file__)
