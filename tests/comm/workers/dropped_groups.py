"""Groups that are dropped, one after the other, while an operation of theirs still waits for the other ranks; the last
one at the end of the program.
"""

import gc
import time

import mlx.core as mx

import comm

world = comm.init()
for _ in range(6):
    assert world.all_sum(mx.array(1)).item() == world.size
    group = world.split(0)
    if world.rank:
        time.sleep(0.2)
    ahead = group.all_sum(mx.zeros((1 << 20,)))
    mx.async_eval(ahead)
    del group, ahead
    gc.collect()
