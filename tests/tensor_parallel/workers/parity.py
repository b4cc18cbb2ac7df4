"""Every case tensor-parallel on this world: loss, all gradients and optimizer steps against the saved reference."""

import json
import sys
import time
from pathlib import Path

import mlx.core as mx
from cases import Case, first_gradients, relative_error, train, worst

import comm
from parallel import TensorParallel, gather_tensors, model_layout

group = comm.init()
folder = Path(sys.argv[1])
report = {}
for name in sys.argv[2:]:
    started = time.monotonic()
    stem = name.replace(":", "-")
    right = json.loads((folder / f"{stem}.json").read_text())
    right_grads = mx.load(str(folder / f"{stem}.safetensors"))
    model = TensorParallel(Case(name).model(), group)
    loss, local = first_gradients(model)
    grads = dict(gather_tensors(model_layout(model), local.items()))
    losses, norms = train(model)
    report[name] = {
        "names_agree": sorted(grads) == sorted(right_grads),
        "loss": abs(loss.item() / right["loss"] - 1),
        "gradient": worst({k: relative_error(grads[k], g) for k, g in right_grads.items() if k in grads}),
        "steps": max(abs(a / b - 1) for a, b in zip(losses, right["losses"])),
        "norms": max(abs(a / b - 1) for a, b in zip(norms, right["norms"])),
        "num_split": len(model_layout(model)),
        "seconds": time.monotonic() - started,
    }
print("RESULT " + json.dumps(report), flush=True)
