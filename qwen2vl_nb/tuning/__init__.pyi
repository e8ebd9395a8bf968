from .checkpoints import score_checkpoints as score_checkpoints
