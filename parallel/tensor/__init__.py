"""Tensor parallelism: which modules are divided, and how; linears, vocabulary and what every rank repeats."""

from parallel.tensor.linear import shard_linear
from parallel.tensor.resolve import check_plan, find_blocks, find_named, plan_for
from parallel.tensor.tensor_parallel import TensorParallel
from parallel.tensor.vocab import cross_entropy

__all__ = ["TensorParallel", "check_plan", "cross_entropy", "find_blocks", "find_named", "plan_for", "shard_linear"]
