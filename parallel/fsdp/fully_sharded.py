"""FullyShardedDataParallel: each rank keeps a slice of every weight, and gathers a layer's just before its use.

A unit is a decoder layer, or a module beside them that has weights (embedding, norm, head). Calling a unit
gathers its arrays in one message per dtype; gradients of its trained arrays leave in one message that sums
them and gives each rank its slice. `resharding.py` frees gathered weights between the two passes; `phases.py`
bounds how many units are gathered at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

import comm
from parallel.extension import class_before, extend
from parallel.fsdp.resharding import ReshardedLeaf, resharded_class
from parallel.fsdp.shards import gather_messages, gathered_with_gradient, joined
from parallel.layout import Segment, Split, model_layout, record_split, split_records
from parallel.lm_head import text_model
from parallel.phases import Phases, UnitCall
from parallel.swapping import swapped
from parallel.wrapper import Wrapper


class FullyShardedDataParallel(Wrapper):
    """Divide all weights of `module` over `group`, whose ranks see different rows.

    Every array is divided along its first dimension (padded with zeros where the ranks do not divide it), so
    optimizer state is divided too. Gradients are slices, summed over the ranks; `parallel.value_and_grad`
    divides them by the token count of all ranks, `nn.value_and_grad` leaves that out. Arrays keep their dtypes,
    quantized ones too. Adapters go in before; later ones would take their sizes from slices. Load the model
    with `lazy=True`: a rank then never holds more than its slices and one tensor.

    Args:
        module: The model; the same object is returned.
        group: The ranks. Default: the world of `comm.init()`.
        reshard_after_forward: Free a layer's gathered weights after its forward pass and gather them again in
            the backward pass: least memory. False keeps them in between: a third less traffic.
        wire_dtype: Dtype in which gradients are summed; None = their own. Default: float32.

    Raises:
        ValueError: The layers are not where mlx-lm's text models have them; the module stays as it was.

    Sources: Rajbhandari et al., ZeRO (arXiv 1910.02054); Zhao et al., PyTorch FSDP (arXiv 2304.11277).
    """

    def __new__(cls, module: nn.Module, group: comm.Group | None = None, **options: Any) -> Self:
        """`module` itself, its class extended."""
        if isinstance(module, nn.Module) and not hasattr(getattr(text_model(module), "model", None), "layers"):
            raise ValueError(
                f"FullyShardedDataParallel does not know where the layers of {type(module).__module__}."
                f"{type(module).__name__} are; it divides models that have them at `model.layers`."
            )
        return super().__new__(cls, module, group, **options)

    def __init__(
        self,
        module: nn.Module,
        group: comm.Group | None = None,
        *,
        reshard_after_forward: bool = True,
        wire_dtype: mx.Dtype | None = mx.float32,
    ):
        group = self.join("dp_shard", group)
        state = self.parallel_state
        for path, unit in _units(self):
            _shard_arrays(unit, group)
            unit.sharding_unit = Unit(path, group, state.phases, reshard_after_forward, wire_dtype)
            _extend_leaves(unit)
            extend(unit, ShardedUnit, f"FullySharded{type(unit).__name__}")
        state.loss_groups.append(group)
        state.reducers.append(self._sum_replicated)

    def _sum_replicated(self, grads: Any) -> Any:
        """Gradients of arrays that are not divided (scalars) summed over the ranks."""
        layout, group = model_layout(self), self.parallel_state.groups["dp_shard"]

        def is_divided(name: str) -> bool:
            return name in layout and "dp_shard" in layout[name].groups

        return tree_map_with_path(lambda name, g: g if is_divided(name) else group.all_sum(g), grads)


class Unit:
    """What a sharded unit knows of itself.

    Attributes:
        path: Its path in the model.
        group: The ranks.
        phases: Where its calls are recorded.
        reshard: Gathered weights are freed after the forward pass.
        wire_dtype: Dtype in which gradients are summed, or None.
    """

    def __init__(self, path: str, group: comm.Group, phases: Phases, reshard: bool, wire_dtype: mx.Dtype | None):
        self.path = path
        self.group = group
        self.phases = phases
        self.reshard = reshard
        self.wire_dtype = wire_dtype


class ShardedUnit(nn.Module):
    """A module that gathers its weights when it is called; mixed into the module's own class."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module that it was."""
        with gathered(self) as call:
            call.outputs = super().__call__(*args, **kwargs)
        return call.outputs

    def as_linear(self, x: mx.array) -> mx.array:
        """An embedding used as the output head."""
        with gathered(self) as call:
            call.outputs = super().as_linear(x)  # type: ignore[misc]  # the mixed-in class has it
        return call.outputs

    def whole(self) -> nn.Module:
        """A module of its own with the gathered arrays, whose gradients come back to the slices."""
        with gathered(self):
            return _copy(self)


@contextmanager
def gathered(unit: nn.Module) -> Iterator[UnitCall]:
    """Within this context the unit's arrays are whole."""
    info: Unit = unit.sharding_unit
    slots = _slots(unit, info.group)
    local = {key: module[name] for key, (module, name, _) in slots.items()}
    splits = {key: split for key, (_, _, split) in slots.items()}
    trained = [key for key, (module, name, _) in slots.items() if name not in module._no_grad]
    frozen = [key for key in slots if key not in set(trained)]
    messages, fixed = gather_messages({key: local[key] for key in frozen}, splits, info.group)
    followed, more = gathered_with_gradient({key: local[key] for key in trained}, splits, info.group, info.wire_dtype)
    whole = fixed | followed
    call = UnitCall(info.path, forward=[*messages, *more])
    trace = info.phases.trace
    recomputing = trace is not None and trace.in_backward
    if trace is not None:
        trace.add(call)
    leaves = _leaves(unit) if info.reshard and not recomputing else []
    again = _GatheredAgain(call, {key: local[key] for key in slots}, splits, info.group)
    for path, leaf in leaves:
        leaf.whole_again = again.arrays_of(path, leaf)
    try:
        with swapped([(module, name) for module, name, _ in slots.values()], [whole[key] for key in slots]):
            yield call
    finally:
        for _, leaf in leaves:
            leaf.whole_again = None


class _GatheredAgain:
    """The leaves' weights in the backward pass, gathered when the first leaf asks for them."""

    def __init__(self, call: UnitCall, local: dict[str, mx.array], splits: dict[str, Split], group: comm.Group):
        self.call, self.local, self.splits, self.group = call, local, splits, group
        self.keys: list[str] = []
        self.whole: dict[str, mx.array] | None = None

    def arrays_of(self, path: str, leaf: nn.Module) -> Any:
        """A function that gives the leaf's whole arrays by name."""
        names = {joined(path, name): name for name, value in leaf.items() if isinstance(value, mx.array)}
        keys = [key for key in names if key in self.local]
        self.keys += keys

        def arrays() -> dict[str, mx.array]:
            if self.whole is None:
                local = {key: mx.stop_gradient(self.local[key]) for key in self.keys}
                self.call.backward, self.whole = gather_messages(local, self.splits, self.group)
            return {names[key]: self.whole[key] for key in keys}

        return arrays


def _units(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Paths and modules: the decoder layers, and whatever else has weights outside of them."""
    layers = {id(layer) for layer in text_model(model).model.layers}
    found: list[tuple[str, nn.Module]] = []

    def visit(path: str, module: Any) -> None:
        if isinstance(module, nn.Module) and (id(module) in layers or _owns_arrays(module)):
            if tree_flatten(module.parameters()):
                found.append((path, module))
            return
        children = module.items() if isinstance(module, dict) else enumerate(module) if isinstance(module, list) else ()
        for name, child in children:
            visit(joined(path, str(name)), child)

    visit("", model)
    return found


def _owns_arrays(module: nn.Module) -> bool:
    """Whether the module has weights of its own; a private array is a constant, which stays whole."""
    return any(isinstance(value, mx.array) and not name.startswith("_") for name, value in module.items())


def _shard_arrays(unit: nn.Module, group: comm.Group) -> None:
    """Replace the unit's arrays by this rank's slices, one at a time."""
    for _, module in unit.named_modules():
        for name in [name for name, value in module.items() if isinstance(value, mx.array) and value.ndim]:
            if name.startswith("_"):
                continue
            split = Split("dp_shard", group, 0, (Segment(module[name].shape[0]),))
            module[name] = split.slice(module[name])
            record_split(module, name, split)
            mx.eval(module[name])
    mx.clear_cache()


def _extend_leaves(unit: nn.Module) -> None:
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    # What is linear in its input and returns one array: not every module with a matrix (routers return a choice too).
    kinds = (nn.Linear, nn.QuantizedLinear, nn.Conv1d, SwitchLinear, QuantizedSwitchLinear)
    for _, leaf in unit.named_modules():
        if leaf is not unit and isinstance(leaf, kinds):
            leaf.whole_again = None
            leaf.__class__ = resharded_class(type(leaf))


def _leaves(unit: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, leaf) for path, leaf in unit.named_modules() if isinstance(leaf, ReshardedLeaf)]


def _slots(unit: nn.Module, group: comm.Group) -> dict[str, tuple[nn.Module, str, Split]]:
    """Path in the unit to module, name and split of every array that is divided for storage."""
    slots = {}
    for path, module in unit.named_modules():
        for name, splits in split_records(module).items():
            if splits[-1].axis == "dp_shard" and name in module:
                slots[joined(path, name)] = (module, name, splits[-1])
    return slots


def _copy(module: nn.Module) -> nn.Module:
    """A copy of a module tree that shares the arrays, without the mixin of units."""
    base = class_before(type(module), ShardedUnit)
    copy: nn.Module = base.__new__(base)  # type: ignore[call-overload]  # a module's class, not any type
    dict.update(copy, {name: _copy(value) if isinstance(value, nn.Module) else value for name, value in module.items()})
    copy.__dict__.update(module.__dict__)
    return copy


def gathered_bytes(model: nn.Module) -> int:
    """Most bytes of gathered weights that were on their way or in use at a time so far."""
    return model.parallel_state.phases.peak_gathered_bytes
