"""Samples: read, checked, counted, split, written, shown and registered"""
from qwen2vl_nb.names import lazily

__all__, __getattr__, __dir__ = lazily(__name__, __file__)
