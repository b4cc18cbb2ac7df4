"""One step's loss and gradients of several recipes on this rank; rank 0 saves them."""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

import comm
from parallel import clip_grad_norm, value_and_grad
from trainer.build import build
from trainer.recipe import recipe_from


def measure(values: dict, world: comm.Group) -> dict[str, mx.array]:
    """Gradients by name, with `loss`, `norm` and `num_tokens` among them."""
    parts = build(recipe_from(values), world, lambda line: None)
    loss, grads, num_tokens = value_and_grad(parts.model, parts.loss)(parts.batches.make(0).arrays())
    _, norm = clip_grad_norm(grads, None, parts.model)
    return {"loss": loss, "norm": norm, "num_tokens": num_tokens} | dict(tree_flatten(grads))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    world = comm.init()
    for name, values in json.loads((folder / "cases.json").read_text()).items():
        measured = measure(values, world)
        mx.eval(measured)
        if world.rank == 0:
            mx.save_safetensors(str(folder / f"{name}-{world.size}.safetensors"), measured)
    world.barrier()
