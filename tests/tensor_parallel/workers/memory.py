"""Opens a saved model lazily and divides it; reports peak memory against what one rank should hold."""

import json
import resource
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

import comm
from parallel import TensorParallel, gather_tensors, model_layout

group = comm.init()
group.barrier()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
mx.reset_peak_memory()
model, _ = load_model(Path(sys.argv[1]), lazy=True)
TensorParallel(model, group)
peak = mx.get_peak_memory()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
parameters = tree_flatten(model.parameters())
layout = model_layout(model)
sizes = []
for name, array in parameters:
    full = layout[name].full_shape(array.shape) if name in layout else array.shape
    sizes.append(array.itemsize * mx.zeros(full, dtype=mx.bool_).nbytes)
# Written back tensor by tensor, as a checkpoint is: the whole model is never in memory.
mx.reset_peak_memory()
gathered = sum(full.nbytes for _, full in gather_tensors(layout, parameters))
report = {
    "model_bytes": sum(sizes),
    "largest_bytes": max(sizes),
    "local_bytes": sum(array.nbytes for _, array in parameters),
    "peak_bytes": peak,
    "resident_bytes": after - before,
    "gathered_bytes": gathered,
    "gather_peak_bytes": mx.get_peak_memory(),
}
print("RESULT " + json.dumps(report), flush=True)
