"""Which part of each parameter a rank of a mesh holds, by arithmetic on shapes: no groups, no weights.

Tensor parallelism follows the tables of `parallel.architectures`; pipeline stages are consecutive layers, with the
embedding on the first stage and norm and head on the last; FSDP divides the first dimension of what is left.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod

import mlx.core as mx
import mlx.nn as nn

import comm
from comm import MeshShape
from parallel.tensor import check_plan, find_blocks, find_named, plan_for

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class Part:
    """One rank's part of a parameter, or the whole of it.

    Attributes:
        name: The parameter's.
        shape: The shape of the part.
        dtype: Its dtype.
        trainable: Whether it is trained.
    """

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype
    trainable: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements."""
        return self.size * self.dtype.size

    @property
    def layer(self) -> int | None:
        """Number of the layer that it belongs to; None outside the layers."""
        found = _LAYER.search(self.name)
        return int(found.group(1)) if found else None


class Placement:
    """The parameters of a model and what each rank of a mesh has of them.

    Args:
        model: The model as in a run, adapters included; its arrays stay lazy.
    """

    def __init__(self, model: nn.Module) -> None:
        trainable = {name for name, _ in comm.named_arrays(model.trainable_parameters())}
        self.model = model
        self.parts = [
            Part(n, tuple(p.shape), p.dtype, n in trainable) for n, p in comm.named_arrays(model.parameters())
        ]
        self.num_layers = len(model.layers)
        self._tensor_parallel: dict[int, list[Part]] = {1: self.parts}

    def rank(self, mesh: MeshShape, stage: int, split: list[int]) -> list[Part]:
        """The parts on a rank of pipeline stage `stage`; with FSDP those of its largest rank.

        Args:
            mesh: Sizes of the axes.
            stage: Number of the pipeline stage.
            split: Layers of each stage.

        Raises:
            ValueError: Tensor parallelism of that size does not work for the model.
        """
        here = [part for part in self.tensor_parallel(mesh.tp) if stage in self._stages(part, split)]
        return [_shard(part, mesh.dp_shard) for part in here]

    def tensor_parallel(self, tp: int) -> list[Part]:
        """All parameters, each as one of `tp` ranks holds it.

        Raises:
            ValueError: No plan for the architecture, or a dimension that `tp` does not divide.
        """
        if tp not in self._tensor_parallel:
            local = _tensor_parallel_shapes(self.model, tp)
            self._tensor_parallel[tp] = [
                Part(p.name, local.get(p.name, p.shape), p.dtype, p.trainable) for p in self.parts
            ]
        return self._tensor_parallel[tp]

    def _stages(self, part: Part, split: list[int]) -> set[int]:
        """The stages that hold a parameter: one, or two for an embedding that is also the head."""
        if part.layer is not None:
            ends = [sum(split[: stage + 1]) for stage in range(len(split))]
            return {next(stage for stage, end in enumerate(ends) if part.layer < end)}
        if "embed" not in part.name:
            return {len(split) - 1}
        has_head = any("lm_head" in other.name for other in self.parts)
        return {0} if has_head else {0, len(split) - 1}


def _shard(part: Part, dp_shard: int) -> Part:
    if dp_shard == 1 or not part.shape:
        return part
    return Part(part.name, (ceil(part.shape[0] / dp_shard), *part.shape[1:]), part.dtype, part.trainable)


def _tensor_parallel_shapes(model: nn.Module, tp: int) -> dict[str, tuple[int, ...]]:
    """Local shapes of the parameters that tensor parallelism divides."""
    plan = plan_for(model)
    check_plan(model, plan, tp)
    shapes = {name: tuple(p.shape) for name, p in comm.named_arrays(model.parameters())}
    local: dict[str, tuple[int, ...]] = {}

    def divide(path: str, kind: str, numerator: int, denominator: int) -> None:
        for name, shape in shapes.items():
            if name == path or name.startswith(f"{path}."):
                dim = _divided_dim(name.rsplit(".", 1)[-1], len(shape), kind)
                if dim is not None:
                    size = shape[dim] * numerator // denominator
                    local[name] = (*shape[:dim], size, *shape[dim + 1 :])

    for site in find_blocks(model, plan):
        for path, child, cut in site.cuts():
            segments = site.segments(child, cut, tp)
            held = sum(segment.size * segment.copies // tp for segment in segments)
            divide(f"{site.path}.{path}", cut.sharding, held, sum(segment.size for segment in segments))
    for path, kind in _vocabulary_modules(model, plan.embedding, plan.head):
        divide(path, kind, 1, tp)
    return local


def _vocabulary_modules(
    model: nn.Module, embedding: str | None, head: str | None
) -> Iterator[tuple[str, str]]:
    """Embedding and head, and how they are divided; an embedding inside an adapter stays whole."""
    for name, kind in ((embedding, "slice"), (head, "all-to-sharded")):
        path, module = find_named(model, name) or ("", None)
        if module is not None and ("weight" in module or kind == "all-to-sharded"):
            yield path, kind


def _divided_dim(leaf: str, ndim: int, kind: str) -> int | None:
    """The dimension of an array that is divided with its linear layer; None where every rank has all of it."""
    if kind == "slice":
        return 0
    if leaf in ("weight", "scales", "biases"):
        return ndim - 2 if kind == "all-to-sharded" else ndim - 1
    if kind == "all-to-sharded":
        return {"bias": ndim - 1, "lora_b": 1, "m": 0}.get(leaf)
    return (2 if ndim == 3 else 0) if leaf == "lora_a" else None
