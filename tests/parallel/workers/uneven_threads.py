"""Two data-parallel ranks, of which rank 0 alone has row threads: the step equals one process's on all rows."""

import sys
from pathlib import Path

import mlx.core as mx

import comm
from parallel import DataParallel, RowThreads, value_and_grad

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from steps import assert_equal, batch_of, build

world = comm.init()
threads = RowThreads(2, 1) if world.rank == 0 else None
batch = batch_of(0, rows=8)
mine = {k: v[4 * world.rank :][:4] if isinstance(v, mx.array) else v for k, v in batch.items()}

alone, loss = build("qwen3", "full")
replica, _ = build("qwen3", "full")
# Lazy, and rank 0's counts.
replica.update({"lm_head": {"weight": alone.lm_head.weight * (1 + world.rank)}})
found = value_and_grad(DataParallel(replica, world), loss, row_threads=threads)([mine])
assert_equal(found, value_and_grad(alone, loss)([batch]))

half, _ = build("qwen3", "full")
half.set_dtype(mx.bfloat16)
mx.eval(value_and_grad(DataParallel(half, world, wire_dtype=None), loss, row_threads=threads)([mine]))
