"""Full fine-tuning of a model of 48 equal layers, whole, sharded and cut; reports what each takes. Argument: model folder."""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

import comm
from parallel import FullyShardedDataParallel, PipelineParallel, value_and_grad
from parallel.fsdp.fully_sharded import gathered_bytes
from tensor_cases import loss_fn
from trainer.machine.blas import load_fast_blas


def measure(wrap: Any, folder: Path, micro_batches: int = 1) -> dict[str, int]:
    """Bytes of the loaded parameters, and the peaks of loading and of a training step once the optimizer has state."""
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    model, _ = load_model(folder, lazy=True)
    wrap(model)
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)
    loading = mx.get_peak_memory()
    model.train()
    optimizer, step = optim.AdamW(1e-4), value_and_grad(model, loss_fn)
    tokens = mx.arange(micro_batches * 8).reshape(micro_batches, 1, 8)
    batches = [{"tokens": t, "mask": mx.ones((1, 8), mx.bool_), "segments": mx.ones((1, 8), mx.int32)} for t in tokens]
    for _ in range(2):
        mx.reset_peak_memory()
        loss, grads, num_tokens = step(batches)
        mx.eval(loss, grads, num_tokens)
        optimizer.update(model, grads)
        del grads
        mx.eval(model.parameters(), optimizer.state)
    return {
        "parameters": sum(p.nbytes for _, p in tree_flatten(model.parameters())),
        "loading": loading,
        "step": mx.get_peak_memory(),
        "gathered": gathered_bytes(model) if isinstance(model, FullyShardedDataParallel) else 0,
    }


def main(folder: Path) -> None:
    """Measure the three ways one after the other."""
    load_fast_blas()
    world = comm.init()

    def keep(model: nn.Module) -> None:
        return None

    ways = {
        "whole": keep,
        "sharded": lambda model: FullyShardedDataParallel(model, world),
        "kept": lambda model: FullyShardedDataParallel(model, world, reshard_after_forward=False),
        "cut": lambda model: PipelineParallel(model, world),
    }
    report = {name: measure(wrap, folder, 2 if name == "cut" else 1) for name, wrap in ways.items()}
    print("RESULT " + json.dumps(report), flush=True)


main(Path(sys.argv[1]))
