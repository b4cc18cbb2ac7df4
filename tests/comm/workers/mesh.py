"""Builds a 2 x 2 mesh (dp_replicate x tp) and says what each axis sums to.

Argument: the backends of the axes, as JSON. Each rank contributes 10 to the power of its number,
so a sum shows its members.
"""

import json
import os
import sys

import mlx.core as mx

import comm

world = comm.init()
before = dict(os.environ)
mesh = comm.Mesh.build(comm.MeshShape(dp_replicate=2, tp=2), world, json.loads(sys.argv[1]))
mine = mx.array(10**world.rank)
report = {
    name: [getattr(mesh, name).backend, getattr(mesh, name).rank,
           getattr(mesh, name).all_sum(mine).item()]
    for name in ("dp_replicate", "dp_shard", "pp", "tp", "dp", "world")
}  # fmt: skip
y = mx.array(float(world.rank))  # both axes interleaved in one lazy graph, on their own streams
for _ in range(10):
    y = mesh.dp.all_sum(mesh.tp.all_sum(y) / 2) / 2
report["mixed"] = y.item()
default = mx.distributed.init()
report["default"] = [default.rank(), default.size()]
report["default_sum"] = mx.distributed.all_sum(mine, group=default).item()
report["environment_kept"] = dict(os.environ) == before
report["one_group"] = mesh.dp is mesh.dp_replicate
print("RESULT", json.dumps(report), flush=True)
