"""`python -m trainer plan`: what a recipe needs on each rank, whether it fits, and which mesh is the cheapest.

Needs the model's config only. Bytes are those of `trainer.memory`; the time of a step is an estimate, from
the compute rate and the link that the user gives, and serves to compare meshes with one another.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from comm import MeshShape
from trainer.machine.limits import GIB
from trainer.memory import Footprint, plan_memory
from trainer.model.flops import TokenFlops, token_flops
from trainer.model.shapes import PlannedModel, planned_model
from trainer.recipe.config import Recipe
from trainer.recipe.load import load_recipe
from trainer.recipe.rules import resolve_batch, resolve_mesh

# Part of a machine's memory that a run may count on; macOS lets a GPU wire about this much.
_USABLE = 0.75
_NUM_SHOWN = 6
_HEADER = (
    "mesh",
    "micro",
    "weights",
    "gradients",
    "optimizer",
    "buffers",
    "activations",
    "peak",
    "sent",
    "s/step",
)


@dataclass(frozen=True)
class Machine:
    """What one rank can do.

    Attributes:
        memory_bytes: Bytes that a run may use.
        flops: Operations per second in matrix products.
        link_bytes: Bytes per second to other ranks.
        message_seconds: Time of an empty message.
    """

    memory_bytes: float
    flops: float
    link_bytes: float
    message_seconds: float = 2e-4


@dataclass(frozen=True)
class Choice:
    """One mesh, with what it needs and costs.

    Attributes:
        mesh: Sizes of the axes.
        accumulation: Micro-batches per step, for the recipe's global batch.
        footprint: Bytes of the fullest rank.
        sent_bytes: Bytes that a rank sends per step.
        seconds: Estimated time of a step.
    """

    mesh: MeshShape
    accumulation: int
    footprint: Footprint
    sent_bytes: float
    seconds: float

    def row(self) -> tuple[str, ...]:
        """The cells of the table: sizes in GiB."""
        f = self.footprint
        sizes = (f.weights, f.gradients, f.optimizer, f.buffers, f.activations, f.peak, self.sent_bytes)
        cells = (f"{size / GIB:.2f}" for size in sizes)
        return (mesh_name(self.mesh), str(self.accumulation), *cells, f"{self.seconds:.3g}")


def main(arguments: argparse.Namespace) -> int:
    """Print the plan of a recipe for a number of ranks."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    mesh = resolve_mesh(recipe.parallel, arguments.world)
    accumulation = resolve_batch(recipe, mesh.dp).accumulation
    planned = planned_model(recipe)
    memory_gib = arguments.memory_gib or this_machine_gib() * _USABLE
    machine = Machine(memory_gib * GIB, arguments.tflops * 1e12, arguments.link_gb * 1e9)
    planner = Planner(recipe, planned, machine)
    own = planner.choice(mesh, accumulation)
    others, refused = planner.others(mesh, accumulation)
    print("\n".join(_report(planner, own, others, refused)))
    return 0


class Planner:
    """Compares meshes for one recipe on one kind of machine."""

    def __init__(self, recipe: Recipe, planned: PlannedModel, machine: Machine) -> None:
        self.recipe = recipe
        self.planned = planned
        self.machine = machine
        self.memory = plan_memory(recipe, planned)

    def choice(self, mesh: MeshShape, accumulation: int) -> Choice:
        """One mesh with its footprint and cost.

        Raises:
            ValueError: The model cannot be divided so.
        """
        footprint = self.memory.of(mesh, accumulation)
        sent, messages = self._traffic(mesh, accumulation)
        compute = self._flops(mesh, accumulation) / mesh.world / self.machine.flops
        # A pipeline's stages wait while it fills and drains.
        compute *= (accumulation + mesh.pp - 1) / accumulation
        seconds = compute + sent / self.machine.link_bytes + messages * self.machine.message_seconds
        return Choice(mesh, accumulation, footprint, sent, seconds)

    def others(self, mesh: MeshShape, accumulation: int) -> tuple[list[Choice], list[str]]:
        """The other meshes with the same ranks and the same global batch, and why some were left out."""
        choices: list[Choice] = []
        refused: dict[str, str] = {}
        rows = accumulation * mesh.dp
        for other in meshes(mesh.world):
            if other == mesh or rows % other.dp or other.pp > self.memory.num_layers:
                continue
            try:
                choices.append(self.choice(other, rows // other.dp))
            except ValueError as error:
                refused[mesh_name(other)] = str(error).splitlines()[0]
        reasons = [
            f"left out: {', '.join(name for name, why in refused.items() if why == reason)}. {reason}"
            for reason in dict.fromkeys(refused.values())
        ]
        return sorted(choices, key=lambda c: (c.seconds, c.footprint.peak)), reasons

    def fits(self, choice: Choice) -> bool:
        """Whether the fullest rank stays within the machine's memory."""
        return choice.footprint.peak <= self.machine.memory_bytes

    def _traffic(self, mesh: MeshShape, accumulation: int) -> tuple[float, float]:
        """Bytes that the busiest rank sends in a step, and the number of messages.

        All-reduce of n bytes over r ranks: 2 n (r - 1) / r. Per micro-batch: FSDP gathers each weight for
        forward and for backward, tensor parallelism sums four times per layer, a pipeline sends activations
        and their gradients on.
        """
        parts = self.memory.rank_parts(MeshShape(1, 1, mesh.pp, mesh.tp), 0)
        wire_item = 4 if self.recipe.parallel.wire_dtype == "float32" else 2
        gradients = sum(part.size * wire_item for part in parts if part.trainable)
        layers = math.ceil(self.memory.num_layers / mesh.pp)
        item = max(part.dtype.size for part in parts if part.name.endswith("norm.weight"))
        activation = self.micro_batch_tokens * self.planned.text_config.get("hidden_size", 0) * item
        sent = _around(mesh.dp_replicate) * 2 * gradients / mesh.dp_shard
        messages = 2.0 * (mesh.dp_replicate - 1)
        if mesh.dp_shard > 1:
            weights = sum(part.num_bytes for part in parts)
            sent += _around(mesh.dp_shard) * accumulation * (2 * weights + gradients)
            messages += 3 * accumulation * layers * (mesh.dp_shard - 1)
        if mesh.tp > 1:
            sent += 2 * _around(mesh.tp) * 4 * accumulation * layers * activation
            messages += 2 * 4 * accumulation * layers * (mesh.tp - 1)
        if mesh.pp > 1:
            sent += 2 * accumulation * activation
            messages += 2 * accumulation
        return sent, messages

    def _flops(self, mesh: MeshShape, accumulation: int) -> float:
        """Of one step over all ranks, the recomputed layers' second forward pass included."""
        token = self._token_flops
        checkpointing = int(self.recipe.gradient_checkpointing)
        again = token.forward / checkpointing if checkpointing else 0.0
        return (token.total + again) * self.micro_batch_tokens * accumulation * mesh.dp

    @cached_property
    def _token_flops(self) -> TokenFlops:
        return token_flops(self.planned.model, self.recipe.data.max_seq_len)

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of a micro-batch of full rows."""
        return self.recipe.batch_size_per_device * self.recipe.data.max_seq_len


def meshes(world: int) -> Iterator[MeshShape]:
    """All meshes of `world` ranks."""
    for tp in _divisors(world):
        for pp in _divisors(world // tp):
            for dp_shard in _divisors(world // tp // pp):
                yield MeshShape(world // tp // pp // dp_shard, dp_shard, pp, tp)


def mesh_name(mesh: MeshShape) -> str:
    """The axes in use, as overrides name them."""
    axes = {axis: getattr(mesh, axis) for axis in ("dp_replicate", "dp_shard", "pp", "tp")}
    return " ".join(f"{axis}={size}" for axis, size in axes.items() if size > 1) or "one rank"


def this_machine_gib() -> float:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB


def _report(planner: Planner, own: Choice, others: list[Choice], refused: list[str]) -> Iterator[str]:
    recipe, parts = planner.recipe, planner.memory.parts
    trained = sum(part.size for part in parts if part.trainable)
    stored = sum(part.num_bytes for part in parts) / GIB
    yield f"{recipe.model.path or (recipe.model.config or {}).get('model_type')}: {len(parts)} tensors, {stored:.2f} GiB;"
    yield f"{recipe.method} trains {trained:,} parameters; {planner.micro_batch_tokens} tokens in a micro-batch"
    yield from (f"note: {notice}" for notice in planner.planned.notices)
    yield ""
    fitting = [choice for choice in [own, *others] if planner.fits(choice)]
    shown = [choice for choice in others if planner.fits(choice)][:_NUM_SHOWN]
    yield "GiB on the fullest rank; the recipe's mesh first, then others with the same ranks and global batch:"
    yield from _table([_HEADER, *(choice.row() for choice in [own, *shown])])
    yield ""
    limit = planner.machine.memory_bytes / GIB
    verdict = "fits" if planner.fits(own) else "does not fit"
    yield f"{mesh_name(own.mesh)} {verdict} in {limit:.1f} GiB ({own.footprint.peak / GIB:.1f} GiB at the peak)."
    if fitting:
        best = min(fitting, key=lambda c: (c.seconds, c.footprint.peak))
        yield f"Cheapest that fits: {mesh_name(best.mesh)}, {_overrides(best)}"
    else:
        least = min([own, *others], key=lambda c: c.footprint.peak)
        yield (
            f"No mesh of {own.mesh.world} rank(s) fits; the least is {least.footprint.peak / GIB:.1f} GiB with "
            f"{mesh_name(least.mesh)}. Try {', '.join(_savings(recipe))}, or more ranks."
        )
    yield from refused


def _overrides(choice: Choice) -> str:
    axes = " ".join(
        f"parallel.{axis}={getattr(choice.mesh, axis)}" for axis in ("dp_replicate", "dp_shard", "pp", "tp")
    )
    return f"{axes} grad_accumulation_steps={choice.accumulation}"


def _savings(recipe: Recipe) -> Iterator[str]:
    """Settings that would need less memory."""
    if not recipe.gradient_checkpointing:
        yield "gradient_checkpointing=true"
    if recipe.batch_size_per_device > 1:
        yield "batch_size_per_device=1"
    if recipe.method == "full":
        yield "method=lora"
    elif recipe.model.quantize is None:
        yield "model.quantize.bits=4"
    yield f"data.max_seq_len={recipe.data.max_seq_len // 2}"


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join([row[0].ljust(len(first)), *rest]).rstrip()


def _around(ranks: int) -> float:
    """Part of a tensor that each rank passes on while it goes round a ring."""
    return (ranks - 1) / ranks


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
