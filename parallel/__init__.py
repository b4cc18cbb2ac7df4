"""Parallel training of MLX models: wrappers that keep a model's names, and one training step for all of them.

Research code imports from here; everything works the same on 1 and on N ranks.
"""

from parallel.own_comm import init  # first: it says so where another package hides `comm`

# isort: split
from parallel.api import Batch, Span, Step, StepTimes, evaluate, value_and_grad
from parallel.data_parallel import DataParallel
from parallel.extension import overridden_class
from parallel.fsdp import FullyShardedDataParallel
from parallel.layout import ParameterLayout, gather_tensors, model_layout, slice_tensors
from parallel.lm_head import Head, hidden_and_head
from parallel.norm import clip_grad_norm, global_norm
from parallel.pipeline import PipelineParallel, bubble_pct
from parallel.row_threads import RowThreads
from parallel.swapping import slots_of, swapped
from parallel.tensor import TensorParallel, cross_entropy, shard_linear
from parallel.wrapper import Wrapper, parallel_state, unwrap

__all__ = [
    "Batch",
    "DataParallel",
    "FullyShardedDataParallel",
    "Head",
    "ParameterLayout",
    "PipelineParallel",
    "RowThreads",
    "Span",
    "Step",
    "StepTimes",
    "TensorParallel",
    "Wrapper",
    "bubble_pct",
    "clip_grad_norm",
    "cross_entropy",
    "evaluate",
    "gather_tensors",
    "global_norm",
    "hidden_and_head",
    "init",
    "model_layout",
    "overridden_class",
    "parallel_state",
    "shard_linear",
    "slice_tensors",
    "slots_of",
    "swapped",
    "unwrap",
    "value_and_grad",
]
