"""Fully sharded data parallelism: weights divided for storage, and gathered where they are used."""

from parallel.fsdp.fully_sharded import FullyShardedDataParallel

__all__ = ["FullyShardedDataParallel"]
