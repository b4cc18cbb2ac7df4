"""Parallel training of MLX models: wrappers that keep a model's names, and one training step for all of them.

Research code imports from here; everything works the same on 1 and on N ranks.
"""

from comm import init
from parallel.api import evaluate, value_and_grad
from parallel.data import DataParallel
from parallel.heads import Head, hidden_and_head
from parallel.norm import clip_grad_norm, global_norm
from parallel.wrapper import Wrapper, unwrap

__all__ = [
    "DataParallel",
    "Head",
    "Wrapper",
    "clip_grad_norm",
    "evaluate",
    "global_norm",
    "hidden_and_head",
    "init",
    "unwrap",
    "value_and_grad",
]
