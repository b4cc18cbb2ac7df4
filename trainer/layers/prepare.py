"""Make one mlx-lm model fast and exact to train: its layers get the functions of this package, its weights and
names stay.

A layer's class is extended (as wrappers do) by one whose `__call__` is mlx-lm's own code with other globals:
where it says `scaled_dot_product_attention`, `gated_delta_update`, `swiglu` or `nn.silu`, it finds ours.
mlx-lm's modules are not touched, nor is generation: with one of mlx-lm's caches a layer runs mlx-lm's own code.

Packed rows use the `cache` argument too: `model(tokens, cache=model.segment_cache(segments))`.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from parallel import overridden_class
from trainer.layers import elementwise
from trainer.layers.attention import blockwise_attention
from trainer.layers.causal_conv import causal_conv
from trainer.layers.gated_delta import gated_delta_update
from trainer.layers.segments import (
    AttentionSegments,
    StateSegments,
    TrainingMask,
    segment_caches,
)

UPSTREAM = "mlx_lm.models."


def extend_layers(model: nn.Module, *, packs: bool) -> nn.Module:
    """Extend the classes of `model` and of its layers; once, before adapters and parallel wrappers.

    Args:
        model: An mlx-lm model. Layers whose code uses none of the functions replaced here are left alone.
        packs: Packed rows are exact for it, so its layers are told their windows and documents in words.

    Returns:
        The same object. It has `segment_cache(segments)` now.
    """
    for module in model.modules():
        cls: Any = type(module)
        if cls.__call__.__module__.startswith(UPSTREAM) and _replaced(cls.__call__):
            module.__class__ = _training_class(cls)
    core = getattr(getattr(model, "language_model", model), "model", None)
    if core is not None and packs:
        cls = type(core)
        core.__class__ = _core_class(cls)
    model.__class__ = _model_class(type(model))
    return model


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: TrainingMask | mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's `scaled_dot_product_attention` for whole training rows.

    Blockwise where the mask is causal, with or without window and documents. MLX's own where the mask is an array
    or missing, with attention sinks, for plain causal rows on CUDA where its backward pass is fused, and for one token.
    """
    num_tokens = queries.shape[2]
    if isinstance(mask, str):
        mask = TrainingMask()
    if isinstance(mask, TrainingMask):
        plain = mask.window is None and mask.segments is None
        if sinks is None and num_tokens == keys.shape[2] and not (plain and _is_fused_on_cuda(queries)):
            seen = mask.segments
            return blockwise_attention(
                queries, keys, values, scale=scale, window=mask.window, segments=seen, starts=mask.starts
            )
        mask = "causal" if plain else mask.array(num_tokens)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def _is_fused_on_cuda(queries: mx.array) -> bool:
    """Whether cuDNN has a backward pass for these queries (B, H, T, D); MLX's other way there holds T x T scores."""
    is_half = queries.dtype in (mx.float16, mx.bfloat16)
    return mx.cuda.is_available() and is_half and queries.shape[3] <= 128 and queries.shape[2] % 128 == 0


class _View:
    """An object with some attributes replaced; calling it runs its class's `__call__` on the view."""

    def __init__(self, base: Any, attributes: dict[str, Any]) -> None:
        self._base = base
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self._base).__call__(self, *args, **kwargs)


FUNCTIONS: dict[str, Any] = {
    "scaled_dot_product_attention": attention,
    "gated_delta_update": gated_delta_update,
    "swiglu": elementwise.swiglu,
    "precise_swiglu": elementwise.precise_swiglu,
}


def _replaced(call: Any) -> dict[str, Any]:
    """The globals that the code of `call` uses and that have a replacement, by their names in its bytecode.

    A table that declares them would have to name each kind of layer of every architecture, and one that is missing there
    would train correctly but slowly, which no parity test shows.
    """
    names = call.__code__.co_names
    found = {name: FUNCTIONS[name] for name in FUNCTIONS if name in names and name in call.__globals__}
    if "silu" in names and call.__globals__.get("nn") is nn:
        found["nn"] = _View(nn, {"silu": elementwise.silu})
    return found


def _with_globals(call: Any, replaced: dict[str, Any]) -> FunctionType:
    names = {**call.__globals__, **replaced}
    new = FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
    new.__kwdefaults__ = call.__kwdefaults__
    return new


@cache
def _training_class(cls: type) -> type:
    """`cls` with a `__call__` that runs ours in training, and mlx-lm's with one of mlx-lm's caches (or in eval
    mode, for layers that take none)."""
    original: Any = cls.__call__
    replaced = _replaced(original)
    rebound = _with_globals(original, replaced)
    signature = inspect.signature(original)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        if "cache" not in signature.parameters:
            return (rebound if self.training else original)(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        cache = bound.arguments.pop("cache", None)
        if cache is not None and not isinstance(cache, (AttentionSegments, StateSegments)):
            return original(self, *args, **kwargs)
        # Ours are only read here: without a cache mlx-lm's code computes whole rows.
        bound.arguments["cache"] = None
        segments, run = getattr(cache, "segments", None), rebound
        if "gated_delta_update" in replaced:
            update = {"gated_delta_update": partial(gated_delta_update, segments=segments)}
            run = _with_globals(original, replaced | update)
            bound.arguments["self"] = _with_segmented_convolutions(self, segments)
        elif isinstance(cache, AttentionSegments) and cache.positions is not None and "rope" in original.__code__.co_names:
            bound.arguments["self"] = _View(self, {"rope": partial(_restarted, self.rope, cache.positions)})
        return run(*bound.args, **bound.kwargs)

    return overridden_class(cls, {"__call__": call})


def _restarted(rope: nn.Module, positions: mx.array, x: mx.array, offset: int = 0) -> mx.array:
    """Rotary embedding of x (B, H, T, D) at `positions` (B, T): MLX takes one offset per row, so every token
    becomes a row.
    """
    B, H, T, D = x.shape
    rows = rope(x.transpose(0, 2, 1, 3).reshape(B * T, H, 1, D), offset=positions.reshape(-1) + offset)
    return rows.reshape(B, T, H, D).transpose(0, 2, 1, 3)


def _with_segmented_convolutions(module: nn.Module, segments: mx.array | None) -> nn.Module | _View:
    """`module` as seen by its own code when its depthwise convolutions, also those of its parts, stop at document
    borders.
    """
    found: dict[str, Callable] = {}
    for name, child in module.items():
        if isinstance(child, nn.Conv1d):
            if child.weight.shape[-1] == 1 and (child.stride, child.padding, child.dilation) == (1, 0, 1):
                found[name] = partial(causal_conv, weight=child.weight, bias=child.get("bias"), segments=segments)
        elif isinstance(child, nn.Module):
            seen = _with_segmented_convolutions(child, segments)
            if seen is not child:
                found[name] = seen
    return _View(module, found) if found else module


@cache
def _core_class(cls: type) -> type:
    """The decoder stack: without a cache it tells its layers their windows in words instead of arrays."""

    def call(self, inputs: mx.array, cache: Any = None, *args: Any, **kwargs: Any) -> mx.array:
        cache = segment_caches(self.layers, None) if cache is None else cache
        return cls.__call__(self, inputs, cache, *args, **kwargs)

    return overridden_class(cls, {"__call__": call})


@cache
def _model_class(cls: type) -> type:
    def segment_cache(self, segments: mx.array | None) -> list[AttentionSegments | StateSegments]:
        """What to pass as `cache` for rows of several documents, numbered by `segments` (B, T)."""
        return segment_caches(self.layers, segments)

    return overridden_class(cls, {"segment_cache": segment_cache})
