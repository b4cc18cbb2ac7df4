"""From a plan's tables to a model at hand: which blocks there are, how each child is cut, and whether it can be.

Everything is found from shapes and attributes; no weight is evaluated, so that what cannot be divided is
refused before a model is loaded.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from comm.typed import named_arrays
from parallel.architectures import ARCHITECTURES, BlockPlan, Cut, ModelPlan
from parallel.layout import Segment
from parallel.tensor.linear import linear_dims

LARGEST_SIZE_TRIED = 64


@dataclass(frozen=True)
class BlockSite:
    """A block of a model and the plan for it.

    Attributes:
        path: The block's path in the model.
        module: The block.
        plan: How it is divided.
    """

    path: str
    module: nn.Module
    plan: BlockPlan

    def cuts(self) -> Iterator[tuple[str, Any, Cut]]:
        """Path inside the block, the module or array there, and how it is divided."""
        for path, cut in self.plan.cuts.items():
            child = child_at(self.module, path)
            if child is not None:
                yield path, child, cut

    def copies(self, units: str | None, size: int) -> int:
        """How many ranks of `size` hold the same piece of a dimension that counts `units`."""
        count = getattr(self.module, units) if units else size
        return size // count if units in self.plan.copied and count < size and size % count == 0 else 1

    def segments(self, child: Any, cut: Cut, size: int) -> tuple[Segment, ...]:
        """The segments of the child's divided dimension."""
        full = _divided_size(child, cut)
        even = full // len(cut.parts)
        of = partial(getattr, self.module)
        sizes = [of(part.units) * of(part.width) if part.width else even for part in cut.parts]
        return tuple(Segment(n, self.copies(part.units, size)) for n, part in zip(sizes, cut.parts))


def plan_for(model: nn.Module) -> ModelPlan:
    """The table of the model's architecture.

    Raises:
        ValueError: There is none.
    """
    model_type = getattr(model, "model_type", None)
    plans = {name: row.tensor for name, row in ARCHITECTURES.items() if row.tensor}
    if model_type not in plans:
        raise ValueError(
            f"No tensor-parallel plan for model_type {model_type!r}; there are plans for "
            f"{', '.join(sorted(plans))}. Pass plan=ModelPlan(...), or divide its linears with shard_linear."
        )
    return plans[model_type]


def find_blocks(model: nn.Module, plan: ModelPlan) -> list[BlockSite]:
    """The model's blocks that the plan divides, in the order of their paths."""
    sites = []
    for path, module in model.named_modules():
        name = path.rsplit(".", 1)[-1]
        plans = [p for p in plan.blocks if p.name == name and child_at(module, p.marker) is not None]
        sites += [BlockSite(path, module, p) for p in plans]
    return sorted(sites, key=lambda site: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", site.path)])


def find_named(model: nn.Module, name: str | None) -> tuple[str, nn.Module] | None:
    """Path and module of the one module of that last name, or None."""
    found = [(path, module) for path, module in model.named_modules() if path.rsplit(".", 1)[-1] == name]
    return found[0] if found else None


def check_plan(model: nn.Module, plan: ModelPlan, size: int) -> None:
    """Refuse what cannot be divided over `size` ranks, all of it at once; evaluates nothing.

    Raises:
        ValueError: Names the layers, the numbers, and the sizes that work; or what the plan does not cover.
    """
    blocks = find_blocks(model, plan)
    if not blocks:
        raise ValueError(f"The plan finds no block to divide in {_name(model)}.")
    uncovered = [name for site in blocks for name in _uncovered(site)]
    if uncovered:
        names = ", ".join(_first_of_each(uncovered))
        raise ValueError(f"The plan says nothing about {names}; cut it or list it as whole.")
    found = _problems(model, plan, blocks, size)
    if not found:
        return
    working = [n for n in range(1, LARGEST_SIZE_TRIED + 1) if not _problems(model, plan, blocks, n)]
    listed = "".join(f"\n  {problem}" for problem in _first_of_each(found))
    sizes = ", ".join(map(str, working)) or "none"
    raise ValueError(f"{_name(model)} cannot be divided over tp = {size} ranks:{listed}\nSizes that work: {sizes}.")


def child_at(module: nn.Module, path: str) -> Any:
    """The child (module, array or attribute) at a dotted path below `module`, or None."""
    found: Any = module
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _problems(model: nn.Module, plan: ModelPlan, blocks: list[BlockSite], size: int) -> list[str]:
    found = [problem for site in blocks for problem in _block_problems(site, size)]
    embedding, head = find_named(model, plan.embedding), find_named(model, plan.head)
    vocabularies = [(embedding[0], embedding[1].weight.shape[0])] if embedding and "weight" in embedding[1] else []
    vocabularies += [(head[0], linear_dims(head[1])[0])] if head else []
    return found + [
        f"{path}: a vocabulary of {count} is not divisible by {size}" for path, count in vocabularies if count % size
    ]


def _block_problems(site: BlockSite, size: int) -> Iterator[str]:
    for path, child, cut in site.cuts():
        for part, segment in zip(cut.parts, site.segments(child, cut, size)):
            where = f"{site.path}.{path}"
            units = getattr(site.module, part.units) if part.units else segment.size
            what = part.units or "features"
            if units * segment.copies % size or segment.size % units:
                more = f", and {size} is not a multiple of it" if part.units in site.plan.copied else ""
                yield f"{where}: {what} = {units} is not divisible by {size}{more}"
            elif problem := _packing_problem(child, cut, segment, size):
                yield f"{where}: {problem}"


def _packing_problem(child: Any, cut: Cut, segment: Segment, size: int) -> str | None:
    linear: Any = child.get("linear", child) if isinstance(child, nn.Module) else {}
    if cut.sharding != "sharded-to-all" or "scales" not in linear:
        return None
    if segment.size // size % linear.group_size:
        return (
            f"{segment.size} quantized inputs over {size} ranks are {segment.size / size:g} each, "
            f"not a multiple of group_size = {linear.group_size}"
        )
    return None


def _divided_size(child: Any, cut: Cut) -> int:
    if cut.sharding == "slice":
        arrays = [child] if isinstance(child, mx.array) else list(child.values())
        return arrays[0].shape[0]
    output_dims, input_dims = linear_dims(child)
    return output_dims if cut.sharding == "all-to-sharded" else input_dims


def _uncovered(site: BlockSite) -> Iterator[str]:
    known = (*site.plan.cuts, *site.plan.whole)
    for name, _ in named_arrays(site.module.parameters()):
        if not any(name == path or name.startswith(f"{path}.") for path in known):
            yield f"{site.path}.{name}"


def _name(model: nn.Module) -> str:
    return getattr(model, "model_type", type(model).__name__)


def _first_of_each(lines: list[str]) -> list[str]:
    """One line of those that differ in a layer's number only."""
    first: dict[str, str] = {}
    for line in lines:
        first.setdefault(re.sub(r"\.\d+\.", ".*.", line), line)
    return list(first.values())
