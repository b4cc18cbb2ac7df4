"""One step's loss and gradients of several recipes on this rank; rank 0 saves them."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

import comm
from compile_mode import compiling
from parallel import clip_grad_norm
from trainer.build import build
from trainer.recipe.load import recipe_from


def measure(values: dict, world: comm.Group, compile_step: bool = False) -> dict[str, mx.array]:
    """Gradients by name, with `loss`, `norm` and `num_tokens` among them."""
    run = build(recipe_from(values), world, lambda line: None, compile_step=compile_step)
    loss, grads, num_tokens = run.step_fn(run.batches.make(0).arrays())
    _, norm = clip_grad_norm(grads, None, run.model)
    return {"loss": loss, "norm": norm, "num_tokens": num_tokens} | dict(tree_flatten(grads))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    world = comm.init()
    for name, values in json.loads((folder / "cases.json").read_text()).items():
        with compiling() if name == "compiled" else nullcontext():
            measured = measure(values, world, compile_step=name == "compiled")
            mx.eval(measured)
        if world.rank == 0:
            mx.save_safetensors(str(folder / f"{name}-{world.size}.safetensors"), measured)
    world.barrier()
