"""Linear layers split over a group of ranks: plain, quantized, of experts, with or without LoRA or DoRA.

`shard_linear` is MLX's, with three differences: it takes adapter layers (recognised by their arrays: `lora_a`,
`lora_b`, and `m` for DoRA, around a `linear`), the gradients of what stays whole are exact, and the result
keeps its class (`isinstance`) and parameter names. Source: Shoeybi et al., arXiv 1909.08053.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

import comm
from parallel.extension import class_before, extended_class
from parallel.layout import Segment, Split, record_split, split_records
from parallel.tensor.replicated import Slot, copied_to_group
from parallel.tensor.slicing import (
    SlicedDropout,
    SlicedModule,
    as_segments,
    copy_tree,
    dense_weight,
    remember_whole,
    slice_array,
    without_bias,
)

SHARDINGS = ("all-to-sharded", "sharded-to-all")


def shard_linear(
    linear: nn.Module,
    sharding: str,
    *,
    segments: int | Sequence[int] | Sequence[float] | Sequence[Segment] = 1,
    group: comm.Group | None = None,
) -> nn.Module:
    """A new layer that holds this rank's slice of `linear` and communicates; `linear` stays as it is.

    Args:
        linear: `nn.Linear`, `nn.QuantizedLinear`, a linear of experts `(E, out, in)`, or a LoRA or DoRA layer
            around one of these or around one that is sharded already.
        sharding: "all-to-sharded" divides the outputs: whole input, sliced result, input gradients summed.
            "sharded-to-all" divides the inputs: sliced input, results summed over the group.
        segments: Parts of the divided dimension that are divided one by one: how many, at which indices or
            fractions they begin, or `Segment`s. Default: 1.
        group: The ranks. Default: the world of `comm.init()`.

    Returns:
        The layer, frozen where `linear` was; nothing is evaluated.

    Raises:
        ValueError: An unknown sharding, or a dimension that the group's size does not divide.
    """
    group = comm.init() if group is None else group
    if sharding not in SHARDINGS:
        raise ValueError(f"sharding is {sharding!r}; it must be one of {SHARDINGS}.")
    output_dims, input_dims = linear_dims(linear)
    divided = output_dims if sharding == "all-to-sharded" else input_dims
    spec = Sharding(sharding, group, output_dims, input_dims, as_segments(segments, divided))
    return shard_in_place(copy_tree(linear), spec)


@dataclass(frozen=True)
class Sharding:
    """How a linear layer is divided.

    Attributes:
        kind: "all-to-sharded" | "sharded-to-all".
        group: The ranks.
        output_dims, input_dims: The features of the whole layer.
        segments: Parts of the divided dimension.
        enters: The layer itself enters the split region with its input and its whole factors; False inside a
            block that does it once for all of them.
        leaves: A "sharded-to-all" layer sums its result; False inside a block that sums its own.
    """

    kind: str
    group: comm.Group
    output_dims: int
    input_dims: int
    segments: tuple[Segment, ...]
    enters: bool = True
    leaves: bool = True


class SlicedLinear(SlicedModule):
    """A linear layer on this rank's slice of the weights, without communication; base of the two below.

    Mixed into the layer's own class by `shard_in_place`, never built directly.
    """

    @property
    def input_dims(self) -> int:
        """Input features of the whole layer."""
        return self.sharding.input_dims

    @property
    def output_dims(self) -> int:
        """Output features of the whole layer."""
        return self.sharding.output_dims

    def to_lora(self, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> nn.Module:
        """A sharded LoRA layer around this layer; mlx-lm's `linear_to_lora_layers` calls it.

        Its initial values are those that mlx-lm draws for the whole layer: seed all ranks alike.
        """
        from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

        if hasattr(type(self), "num_experts"):
            lora: nn.Module = LoRASwitchLinear(self.input_dims, self.output_dims, self.num_experts, r, dropout, scale)
        else:
            lora = LoRALinear(self.input_dims, self.output_dims, r, dropout, scale)
        lora.linear = self
        return shard_in_place(lora, self.sharding)

    def to_dora(self, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> nn.Module:
        """A sharded DoRA layer around this layer, with initial values as in `to_lora`."""
        from mlx_lm.tuner.dora import DoRALinear

        dora = DoRALinear(self.input_dims, self.output_dims, r, dropout, scale)
        # Not set_linear: it would take the norms of this rank's slice.
        dora.linear = self
        return shard_in_place(dora, self.sharding)


class AllToShardedLinear(SlicedLinear):
    """Each rank computes its slice of the outputs from the whole input.

    Forward: no communication. Backward: the input's gradient is summed over the group, and with LoRA that of
    `lora_a`, in a message of its own.
    """

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """`(..., input_dims)`, equal on all ranks, to this rank's slice of `(..., output_dims)`."""
        sharding = self.sharding
        if not sharding.enters:
            return super().__call__(x, *args, **kwargs)
        with copied_to_group(partial_slots(self), sharding.group):
            return super().__call__(comm.copy_to_group(x, sharding.group), *args, **kwargs)


class ShardedToAllLinear(SlicedLinear):
    """Each rank multiplies its slice of the input; the results are summed over the group.

    Forward: one sum of the output, LoRA's update included; the bias is added after it. Backward: no
    communication, but with LoRA the gradient of `lora_b` is summed.
    """

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """This rank's slice of `(..., input_dims)` to `(..., output_dims)`, equal on all ranks.

        Inside a block that sums its own output the result is this rank's summand.
        """
        sharding = self.sharding
        base = self.linear if "linear" in self else self
        with copied_to_group(partial_slots(self) if sharding.enters else (), sharding.group):
            if "m" in self:
                y = self._dora(x)
            else:
                without: Any = without_bias(self)
                y = super(ShardedToAllLinear, without).__call__(x, *args, **kwargs)
            if sharding.leaves:
                y = comm.sum_over_group(y, sharding.group)
        return y + base["bias"] if "bias" in base else y

    def _dora(self, x: mx.array) -> mx.array:
        # The magnitude is divided by norms over all inputs, so their squares are summed over the group.
        weight = dense_weight(self.linear)
        update = (self.dropout(x) @ self.lora_a) @ self.lora_b
        y = x @ weight.T + (self.scale * update).astype(x.dtype)
        adapted = mx.stop_gradient(weight + (self.scale * self.lora_b.T) @ self.lora_a.T)
        squares = self.sharding.group.all_sum(adapted.astype(mx.float32).square().sum(axis=1))
        return (self.m / mx.sqrt(squares)).astype(x.dtype) * y


def shard_in_place(linear: nn.Module, sharding: Sharding) -> nn.Module:
    """Slice the arrays of `linear` (lazily) and extend its class; returns `linear`. See `shard_linear`."""
    columns = sharding.kind == "all-to-sharded"
    remember_whole(linear, sharding.group)
    if "lora_a" in linear:
        _shard_adapter(linear, sharding)
    else:
        for name in [name for name in ("weight", "scales", "biases") if name in linear]:
            slice_array(linear, name, linear[name].ndim - (2 if columns else 1), sharding.segments, sharding.group)
        if "bias" in linear and not sharding.leaves:
            raise ValueError(f"{type(linear).__name__} has a bias, which would be added once per rank.")
        if columns and "bias" in linear:
            slice_array(linear, "bias", linear["bias"].ndim - 1, sharding.segments, sharding.group)
    linear.sharding = sharding
    extend_class(linear, AllToShardedLinear if columns else ShardedToAllLinear)
    return linear


def partial_slots(module: nn.Module) -> list[Slot]:
    """The arrays of a sharded linear whose gradients on one rank are only a part."""
    records = split_records(module).items()
    slots = [(module, name) for name, splits in records if any(split.has_copies for split in splits)]
    if "lora_a" not in module:
        return slots
    whole = ["lora_a"] if module.sharding.kind == "all-to-sharded" else ["lora_b"]
    if whole == ["lora_b"] and "m" in module:
        whole.append("m")
    return [*slots, *((module, name) for name in whole), *partial_slots(module.linear)]


def linear_dims(linear: nn.Module) -> tuple[int, int]:
    """`(output_dims, input_dims)` of a whole linear layer, whatever its kind."""
    if isinstance(linear, SlicedLinear):
        return linear.output_dims, linear.input_dims
    if "lora_a" in linear:
        return linear_dims(linear.linear)
    if not isinstance(linear.get("weight"), mx.array) or linear.weight.ndim < 2:
        raise ValueError(f"{type(linear).__name__} cannot be sharded: it has no weight matrix.")
    *_, output_dims, input_dims = linear.weight.shape
    return output_dims, input_dims * 32 // linear.bits if "scales" in linear else input_dims


def _shard_adapter(layer: nn.Module, sharding: Sharding) -> None:
    base, columns, group = layer.linear, sharding.kind == "all-to-sharded", sharding.group
    experts = layer.lora_a.ndim == 3
    if isinstance(base, SlicedLinear):
        # The adapter layer communicates for both from now on.
        extend_class(base, SlicedLinear)
        if "m" in layer:
            squares = dense_weight(base).astype(mx.float32).square().sum(axis=1)
            layer.m = mx.sqrt(squares if columns else group.all_sum(squares))
            if columns:
                weight_split = split_records(base)["weight"][0]
                record_split(layer, "m", Split("tp", group, 0, weight_split.segments))
    else:
        shard_in_place(base, sharding)
        extend_class(base, SlicedLinear)
        if columns and "m" in layer:
            slice_array(layer, "m", 0, sharding.segments, group)
    if columns:
        slice_array(layer, "lora_b", 1, sharding.segments, group)
    else:
        dim = 2 if experts else 0
        slice_array(layer, "lora_a", dim, sharding.segments, group)
        layer.dropout = SlicedDropout(layer.dropout, split_records(layer)["lora_a"][0])


def extend_class(linear: nn.Module, mixin: type) -> None:
    """Make `linear` an instance of `mixin` too; a sliced linear changes from one mixin to another."""
    linear.__class__ = extended_class(mixin, class_before(type(linear), SlicedLinear))
