"""Memory of one rank of a run: exact for weights, gradients and optimizer; for the rest of a step, scaled from its graph.

The graph (`trainer.memory.liveness`) is that of one device, traced once: a pipeline stage keeps its layers' share for
each micro-batch in flight, and tensor parallelism divides all but the residual stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.lora import LoRASwitchLinear

import comm
from comm import MeshShape
from parallel import hidden_and_head, slots_of, swapped
from parallel.pipeline import check_stages, even_split, memory_split
from trainer.memory.liveness import Buffer, Lifetimes, lifetimes
from trainer.memory.placement import Part, Placement
from trainer.memory.tracing import trace
from trainer.model.lora import EXPERTS
from trainer.model.shapes import PlannedModel
from trainer.objectives.table import OBJECTIVES
from trainer.recipe.config import Recipe
from trainer.training.loss import StepLoss
from trainer.training.optim import Optimizer

# Buffers of MLX's ring backend, and a bucket of gradients, per group; comm chooses buckets of about this size.
_GROUP_BYTES = 32 * 2**20
_BUCKET_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Footprint:
    """Bytes on the fullest rank of a mesh.

    Attributes:
        weights, gradients, optimizer: Exact.
        buffers: What communication holds: messages in flight, weights gathered for use.
        activations: Everything else at the step's peak, all rows of a micro-batch at once; CPUs take them in slices.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int

    @property
    def peak(self) -> int:
        """The sum: the most that is needed at any time of a step."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations


def plan_memory(recipe: Recipe, planned: PlannedModel) -> MemoryPlan:
    """Bytes that the ranks of any mesh need for a recipe; nothing is evaluated.

    Args:
        recipe: Gives the batch, the optimizer and the pipeline's schedule.
        planned: The recipe's model; it is left as it was.
    """
    return MemoryPlan(recipe, planned)


class MemoryPlan:
    """What a recipe's ranks need on any mesh; the step is traced once. Made by `plan_memory`.

    Attributes:
        parts: All parameters, whole.
        num_layers: How many layers the model has.
        loss: The run's loss function.
    """

    def __init__(self, recipe: Recipe, planned: PlannedModel) -> None:
        self.recipe = recipe
        self.planned = planned
        objective = OBJECTIVES[recipe.objective.name](recipe.objective)
        self.loss = StepLoss(objective, planned.keys, planned.is_packed)
        self._placement = Placement(planned.model)
        self.parts = self._placement.parts
        self.num_layers = self._placement.num_layers

    def split(self, pp: int) -> list[int]:
        """Layers of each pipeline stage; `memory` is planned for machines of equal memory.

        Raises:
            ValueError: The model cannot be cut into stages.
        """
        split = self.recipe.parallel.split
        if pp > 1:
            check_stages(self.planned.model)
        if isinstance(split, list) and len(split) == pp:
            return split
        if split == "memory" and pp > 1:
            sizes = [0] * self.num_layers
            first = last = 0
            for part in self.parts:
                if part.layer is not None:
                    sizes[part.layer] += part.num_bytes
                elif "embed" in part.name:
                    first += part.num_bytes
                else:
                    last += part.num_bytes
            return memory_split(sizes, first, last, [1] * pp)
        return even_split(self.num_layers, pp)

    def rank_parts(self, mesh: MeshShape, stage: int) -> list[Part]:
        """The parameters on a rank of a pipeline stage, each as it holds it; with FSDP those of its largest rank.

        Raises:
            ValueError: The model cannot be divided so.
        """
        return self._placement.rank(mesh, stage, self.split(mesh.pp))

    def of(self, mesh: MeshShape, accumulation: int) -> Footprint:
        """The footprint of the fullest rank.

        Args:
            mesh: Sizes of the axes.
            accumulation: Micro-batches of one step.

        Raises:
            ValueError: The model cannot be divided so.
        """
        return max((self.stage(mesh, accumulation, stage) for stage in range(mesh.pp)), key=lambda f: f.peak)

    def stage(self, mesh: MeshShape, accumulation: int, stage: int) -> Footprint:
        """The footprint of the ranks of one pipeline stage; arguments as for `of`."""
        parts = self.rank_parts(mesh, stage)
        trained = [part for part in parts if part.trainable]
        weights = sum(part.num_bytes for part in parts)
        gradients = sum(part.size * self._gradient_item_bytes(part, mesh, accumulation) for part in trained)
        optimizer = optimizer_bytes(trained, self.recipe)
        buffers = self._buffers(mesh, stage, trained, gradients)
        step = self._step_peak(mesh, accumulation, stage, gradients)
        excess = self._update_excess * sum(part.size for part in trained) / sum(part.size for part in self._all_trained)
        # Gathered weights and gradients on their way are gone when the optimizer begins.
        most = max(step + buffers, gradients + excess + self._group_bytes(mesh))
        return Footprint(weights, gradients, optimizer, buffers, round(most - gradients - buffers))

    def _gradient_item_bytes(self, part: Part, mesh: MeshShape, accumulation: int) -> int:
        """Gradients are added up in float32, over micro-batches and (by default) over ranks."""
        is_widened = accumulation > 1 or (mesh.dp > 1 and self.recipe.parallel.wire_dtype == "float32")
        return 4 if is_widened else part.dtype.size

    def _buffers(self, mesh: MeshShape, stage: int, trained: list[Part], gradients: int) -> int:
        total = self._group_bytes(mesh)
        if mesh.dp_replicate > 1:
            # The gradients before the sum stay until the last bucket is back.
            total += sum(part.num_bytes for part in trained) + min(2 * _BUCKET_BYTES, gradients)
        if mesh.dp_shard > 1:
            total += self._gathered(mesh, stage)
        return total

    def _group_bytes(self, mesh: MeshShape) -> int:
        return _GROUP_BYTES * sum(size > 1 for size in (mesh.dp_replicate, mesh.dp_shard, mesh.pp, mesh.tp))

    def _gathered(self, mesh: MeshShape, stage: int) -> int:
        """FSDP: the unit in use, gathered, with its gradients, and the gathered weights of the next, in either pass."""
        weights: dict[int | str, int] = {}
        gradients: dict[int | str, int] = {}
        for part in self.rank_parts(MeshShape(1, 1, mesh.pp, mesh.tp), stage):
            unit = part.name.rpartition(".")[0] if part.layer is None else part.layer
            weights[unit] = weights.get(unit, 0) + part.num_bytes
            gradients[unit] = gradients.get(unit, 0) + part.num_bytes * part.trainable
        order = sorted(weights, key=lambda unit: ("embed" not in str(unit), isinstance(unit, str), unit))
        sizes = [0, *(weights[unit] for unit in order), 0]
        return max(weights[unit] + gradients[unit] + max(sizes[i], sizes[i + 2]) for i, unit in enumerate(order))

    def _step_peak(self, mesh: MeshShape, accumulation: int, stage: int, gradients: int) -> float:
        """Most bytes of activations and gradients at any time of forward and backward."""
        hidden_dims = self.planned.text_config.get("hidden_size", 0)

        def activation(buffer: Buffer) -> float:
            is_residual = bool(buffer.shape) and buffer.shape[-1] == hidden_dims
            return 0.0 if buffer.is_result else buffer.num_bytes * (1.0 if is_residual else 1 / mesh.tp)

        step = self._adding_step if accumulation > 1 else self._plain_step
        alive = step.bytes_over_time(activation)
        if mesh.pp == 1:
            growing = step.bytes_over_time(lambda b: float(b.num_bytes) if b.is_result else 0.0)
            return float((alive + growing * (gradients / (growing.max() or 1.0))).max())
        # A stage keeps its share of the activations of all micro-batches in flight, and works on one of them.
        layers = self._layers.bytes_over_time(activation)
        kept = layers[self._layers.made_at[-1]]
        work = (alive if stage == mesh.pp - 1 else layers).max() - kept
        is_early = self.recipe.parallel.schedule == "1f1b"
        in_flight = min(accumulation, mesh.pp - stage) if is_early else accumulation
        split = self.split(mesh.pp)
        return gradients + in_flight * kept * split[stage] / sum(split) + max(work, 0.0)

    @cached_property
    def _all_trained(self) -> list[Part]:
        return [part for part in self.parts if part.trainable]

    @property
    def batch(self) -> dict[str, mx.array]:
        """A micro-batch of full rows in which every token is learned: the largest there is."""
        shape = (self.recipe.batch_size_per_device, self.recipe.data.max_seq_len)
        return {
            "tokens": mx.zeros(shape, dtype=mx.int32),
            "mask": mx.broadcast_to(mx.arange(shape[1]) > 0, shape),
            "segments": mx.ones(shape, dtype=mx.int32),
            "keys": mx.zeros((shape[0], 2), dtype=mx.uint32),
        }

    @cached_property
    def _plain_step(self) -> Lifetimes:
        return self._step([])

    @cached_property
    def _adding_step(self) -> Lifetimes:
        with _experts_frozen(self.planned.model):
            return self._step([mx.zeros(p.shape) for _, p in comm.named_arrays(self.planned.model.trainable_parameters())])

    def _step(self, sums: list[mx.array]) -> Lifetimes:
        """Loss and gradients of one micro-batch, added to the sums of earlier ones where there are any."""
        def function(model: nn.Module, *earlier: mx.array) -> list[mx.array]:
            (total, num_tokens), grads = nn.value_and_grad(model, self.loss)(model, self.batch)
            gradients = [grad for _, grad in comm.named_arrays(grads)]
            return [total, num_tokens, *([s + g.astype(s.dtype) for s, g in zip(earlier, gradients)] or gradients)]

        return _trace_model(self.planned.model, function, sums)

    @cached_property
    def _layers(self) -> Lifetimes:
        """Forward and backward without head and loss; its last result is the hidden states."""

        def hidden_sum(model: nn.Module) -> tuple[mx.array, mx.array]:
            hidden, _ = hidden_and_head(model, self.batch["tokens"])
            return hidden.astype(mx.float32).sum(), hidden

        def function(model: nn.Module) -> list[mx.array]:
            (total, hidden), grads = nn.value_and_grad(model, hidden_sum)(model)
            return [total, *(grad for _, grad in comm.named_arrays(grads)), hidden]

        return _trace_model(self.planned.model, function, [])

    @cached_property
    def _update_excess(self) -> float:
        """Bytes that an update of all trained parameters needs for a moment beside weights and state."""
        trained = self._all_trained
        examples = [mx.zeros(part.shape, dtype=part.dtype) for part in trained]

        def function(*arrays: mx.array) -> list[mx.array]:
            tree = tree_unflatten([(part.name, a) for part, a in zip(trained, arrays)])
            holder = nn.Module()
            dict.update(holder, tree)
            optimizer = Optimizer(tree, self.recipe.optimizer)
            grads = [(part.name, g) for part, g in zip(trained, arrays[len(trained) :])]
            optimizer.update(holder, tree_unflatten(grads), 1e-3)
            updated = [value for _, value in comm.named_arrays(holder.trainable_parameters())]
            return [*updated, *(state for _, state in optimizer.tensors())]

        graph = trace(function, [*examples, *examples])
        given_up = {name: part.num_bytes for name, part in zip(graph.inputs, trained)}
        peak = lifetimes(graph, given_up).bytes_over_time().max()
        return peak - sum(given_up.values()) - optimizer_bytes(trained, self.recipe)


def optimizer_bytes(trained: list[Part], recipe: Recipe) -> int:
    """Bytes of the optimizer's state for parts of these shapes: of the run's own optimizer, never evaluated."""
    tree = tree_unflatten([(part.name, mx.zeros(part.shape, dtype=part.dtype)) for part in trained])
    return sum(array.nbytes for _, array in Optimizer(tree, recipe.optimizer).tensors())


@contextlib.contextmanager
def _experts_frozen(model: nn.Module) -> Iterator[None]:
    """Freeze expert layers for a while: MLX cannot export the operation that makes their weights' gradients."""
    experts = [m for _, m in model.named_modules() if isinstance(m, (*EXPERTS, LoRASwitchLinear))]
    frozen_before = [module._no_grad.copy() for module in experts]
    for module in experts:
        module.freeze(recurse=False)
    try:
        yield
    finally:
        for module, names in zip(experts, frozen_before):
            module._no_grad = names


def _trace_model(model: nn.Module, function: Callable, arguments: list[mx.array]) -> Lifetimes:
    """Trace a function of the model with its parameters as inputs, and leave the model as it was.

    The arguments are given up to it, so they count until they are read.
    """
    parameters = comm.named_arrays(model.parameters())
    names = [name for name, _ in parameters]

    slots = slots_of(model, names)

    def traced(*arrays: mx.array) -> list[mx.array]:
        # What differentiating it leaves in the model is part of the trace too.
        with swapped(slots, arrays[: len(names)]):
            return function(model, *arrays[len(names) :])

    with _experts_frozen(model):
        graph = trace(traced, [*(p for _, p in parameters), *arguments])
    given_up = dict(zip(graph.inputs[len(names) :], (a.nbytes for a in arguments)))
    return lifetimes(graph, given_up)
