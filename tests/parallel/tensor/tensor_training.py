"""Checks of training on 2 x 2 meshes, of the training-time layers and loss, and of the memory that loading takes."""

import gc
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

import comm
from parallel import (
    DataParallel,
    FullyShardedDataParallel,
    PipelineParallel,
    TensorParallel,
    gather_tensors,
    hidden_and_head,
    model_layout,
)
from tensor_cases import ROWS, TOKENS, batch, relative_error, train, worst
from tensor_models import make_model, prepare
from trainer.layers.checkpointing import checkpoint_layers
from trainer.layers.linear_cross_entropy import linear_cross_entropy
from trainer.layers.lora_matmul import use_fast_lora
from trainer.model.method import prepare_for_training

WRAPPERS = {"dp_replicate": DataParallel, "dp_shard": FullyShardedDataParallel, "pp": PipelineParallel}


def data_mesh(world: comm.Group) -> dict[str, Any]:
    """Two data-parallel ranks, each of two tensor-parallel ones."""
    return _on_meshes(world, ["dp_replicate"])


def deep_meshes(world: comm.Group) -> dict[str, Any]:
    """The same with FSDP, and with two stages, in place of data parallelism."""
    return _on_meshes(world, ["dp_shard", "pp"])


def _on_meshes(world: comm.Group, axes: list[str]) -> dict[str, Any]:
    """Losses and norms of 2 x 2 ranks, tensor parallelism inside another wrapper, against one device."""
    result = {}
    for axis in axes:
        wrap = WRAPPERS[axis]
        mesh = comm.Mesh.build(comm.MeshShape(**{"dp_replicate": 1, axis: 2, "tp": 2}), world)
        group = getattr(mesh, axis)
        # Data-parallel ranks share a batch's two rows; stages cut it into two micro-batches.
        shares = [slice(i, i + 1) for i in range(2)] if axis == "pp" else [slice(group.rank, group.rank + 1)]
        for method in ("full", "lora"):
            losses, norms = train(prepare(make_model("qwen3"), method), 4)
            model = prepare(make_model("qwen3"), method)
            # Stages first, so that a rank divides only the layers that it has.
            model = TensorParallel(wrap(model, group), mesh.tp) if axis == "pp" else wrap(TensorParallel(model, mesh.tp), group)
            divided_losses, divided_norms = train(model, 4, *shares)
            result[f"{axis}:{method}"] = {
                "steps": max(abs(a / b - 1) for a, b in zip(divided_losses, losses)),
                "norms": max(abs(a / b - 1) for a, b in zip(divided_norms, norms)),
            }
    return result


def prepared_layers(group: comm.Group) -> dict[str, Any]:
    """Gradients with packed rows, chunked attention, fast LoRA, the loss that keeps no logits, and layers computed again."""
    result = {}
    for architecture in ("llama", "qwen3_5", "gemma3"):
        for method in ("full", "lora", "qlora"):
            models = []
            for _ in range(2):
                model = prepare(prepare_for_training(make_model(architecture)), method)
                use_fast_lora(model)
                models.append(model.train())
            TensorParallel(models[1], group)
            checkpoint_layers(models[1].layers)
            (loss, grads), (divided_loss, local) = [nn.value_and_grad(m, _packed_loss)(m, batch(0)) for m in models]
            full = dict(gather_tensors(model_layout(models[1]), tree_flatten(local)))
            errors = {name: relative_error(full[name], grad) for name, grad in tree_flatten(grads)}
            result[f"{architecture}:{method}"] = worst({**errors, "loss": relative_error(divided_loss, loss)})
    return result


def loading_memory(group: comm.Group) -> dict[str, int]:
    """Bytes that opening and dividing the model in the folder LARGE_MODEL takes, and gathering it for a checkpoint."""
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model, _ = load_model(Path(os.environ["LARGE_MODEL"]), lazy=True)
    TensorParallel(model, group)
    peak = mx.get_peak_memory()
    parameters = tree_flatten(model.parameters())
    mx.reset_peak_memory()
    sizes = [full.nbytes for _, full in gather_tensors(model_layout(model), parameters)]
    return {
        "model_bytes": sum(sizes),
        "largest_bytes": max(sizes),
        "local_bytes": sum(array.nbytes for _, array in parameters),
        "peak_bytes": peak - before,
        "gather_peak_bytes": mx.get_peak_memory() - before,
    }


def _packed_loss(model: nn.Module, batch: dict[str, mx.array]) -> mx.array:
    segments = mx.broadcast_to(1 + (mx.arange(TOKENS) >= 7), (ROWS, TOKENS))
    hidden, head = hidden_and_head(model, batch["tokens"], segments)
    return linear_cross_entropy(hidden[:, :-1], head, batch["tokens"][:, 1:], batch["mask"][:, 1:])[0]
