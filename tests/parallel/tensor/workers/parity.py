"""Cases and checks of one launch: each case's loss, gradients and steps against the saved reference, then the checks.

Arguments: reference folder, number of optimizer steps, cases, names of checks (both comma-separated, "-" = none).
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import tensor_checks
import tensor_training

import comm
from parallel import TensorParallel, gather_tensors, model_layout
from tensor_cases import Case, first_gradients, relative_error, train, worst


def compare(name: str, folder: Path, num_steps: int, group: comm.Group) -> dict[str, Any]:
    """Relative errors of one case."""
    started = time.monotonic()
    stem = name.replace(":", "-")
    right = json.loads((folder / f"{stem}.json").read_text())
    right_grads = mx.load(str(folder / f"{stem}.safetensors"))
    model = TensorParallel(Case(name).model(), group)
    loss, local = first_gradients(model)
    grads = dict(gather_tensors(model_layout(model), local.items()))
    losses, norms = train(model, min(num_steps, Case(name).num_steps))
    return {
        "names_agree": sorted(grads) == sorted(right_grads),
        "loss": abs(loss.item() / right["loss"] - 1),
        "gradient": worst({k: relative_error(grads[k], g) for k, g in right_grads.items() if k in grads}),
        "steps": max(abs(a / b - 1) for a, b in zip(losses, right["losses"])),
        "norms": max(abs(a / b - 1) for a, b in zip(norms, right["norms"])),
        "seconds": time.monotonic() - started,
    }


def run_check(name: str, world: comm.Group) -> Any:
    """What a check reports."""
    started = time.monotonic()
    check = getattr(tensor_checks, name, None) or getattr(tensor_training, name)
    return {"report": check(world), "seconds": time.monotonic() - started}


def main(folder: str, num_steps: str, cases: str, checks: str) -> None:
    """Run everything and print one RESULT line."""
    world = comm.init()
    split = [[] if names == "-" else names.split(",") for names in (cases, checks)]
    result = {
        "cases": {name: compare(name, Path(folder), int(num_steps), world) for name in split[0]},
        "checks": {name: run_check(name, world) for name in split[1]},
    }
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
