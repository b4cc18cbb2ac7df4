"""One sum a tenth of a second, for a minute: something to interrupt."""

import time

import mlx.core as mx

import comm

group = comm.init()
for step in range(600):
    mx.eval(group.all_sum(mx.array([1.0])))
    if step == 5:
        print(f"rank {group.rank} under way", flush=True)
    time.sleep(0.1)
