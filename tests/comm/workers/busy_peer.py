"""Rank 1 comes three seconds late to each collective; rank 0 says how long its own computing waits meanwhile."""

import json
import time

import mlx.core as mx

import comm

group = comm.init()
calls = {
    "all_sum of truth values": lambda: group.all_sum(mx.array([True, False])),
    "all_gather along the second axis": lambda: group.all_gather(mx.ones((2, 3)), axis=1),
    "reduce_scatter": lambda: group.reduce_scatter(mx.ones((3, 4)), axis=1),
    "broadcast": lambda: group.broadcast(mx.array([1.5, 2.5])),
    "all_max": lambda: group.all_max(mx.array([1.5, 2.5])),
    "gather_from_shards": lambda: comm.gather_from_shards(mx.ones((2, 3)), group),
}
waited = {}
for name, call in calls.items():
    group.barrier()
    if group.rank == 1:
        time.sleep(3)
    result = call()
    mx.async_eval(result)
    began = time.perf_counter()
    mx.eval(mx.ones((4,)) + 1)
    waited[name] = time.perf_counter() - began
    mx.eval(result)
print("RESULT " + json.dumps(waited), flush=True)
