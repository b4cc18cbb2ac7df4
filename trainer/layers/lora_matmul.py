"""LoRA's layer as one function: x W^T + scale (x A) B, with a backward pass that adds in place and touches no
frozen weight.

mlx-lm's layer makes the update, scales it and adds it in three passes over the output, and as many again over the
gradients; here the update is added by the matrix product itself. W may be quantized. Hu et al., arXiv 2106.09685.

Letters: D input dims, O output dims, r rank.
"""

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from comm import CustomFunction, custom_function
from parallel import overridden_class

MANY_ROWS = 64  # so many pay for unpacking a matrix


def use_fast_lora(model: nn.Module) -> None:
    """Extend the class of each of mlx-lm's `LoRALinear` in `model`, in place; before parallel wrappers. Names
    and values stay.
    """
    for module in model.modules():
        cls: Any = type(module)
        if cls.__call__ is LoRALinear.__call__:
            module.__class__ = _fast(cls)


def lora_matmul(
    x: mx.array, base: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float, dropped: mx.array | None = None
) -> mx.array:
    """base(x) + scale * (dropped A) B, in x's dtype.

    Args:
        x: (..., D).
        base: Any layer from D to O; frozen `nn.Linear` and `nn.QuantizedLinear` are computed together with the
            update.
        lora_a: (D, r).
        lora_b: (r, O).
        scale: Factor on the update.
        dropped: `x` after dropout, or None for `x` itself.
    """
    rows = x.reshape(-1, x.shape[-1])
    if _is_frozen_matrix(base) and dropped is None:
        y = _joint(base, scale)(rows, lora_a, lora_b)
    else:
        inputs = rows if dropped is None else dropped.reshape(rows.shape)
        y = _update(scale)(base(x).reshape(rows.shape[0], -1), inputs, lora_a, lora_b)[0]
    return y.reshape(*x.shape[:-1], -1)


def _is_frozen_matrix(base: nn.Module) -> bool:
    # Classes that extend these without a call of their own (slices of a divided layer) are the same product.
    is_product = type(base).__call__ in (nn.Linear.__call__, nn.QuantizedLinear.__call__)
    return is_product and "weight" in base._no_grad and "bias" not in base


def _times(rows: mx.array, base: nn.Module, transpose: bool) -> mx.array:
    """rows W^T (`transpose`) or rows W."""
    if isinstance(base, nn.Linear):
        return rows @ (base.weight.T if transpose else base.weight)
    if not transpose and rows.shape[0] >= MANY_ROWS and mx.cuda.is_available():
        # CUDA has no fast kernel for this direction: unpacked once, the matrix is multiplied at full speed.
        unpacked = mx.dequantize(
            base.weight, base.scales, base.get("biases"), group_size=base.group_size, bits=base.bits, mode=base.mode
        )
        return rows @ unpacked.astype(rows.dtype)
    return mx.quantized_matmul(
        rows,
        base.weight,
        scales=base.scales,
        biases=base.get("biases"),
        transpose=transpose,
        group_size=base.group_size,
        bits=base.bits,
        mode=base.mode,
    )


def _low_rank(rows: mx.array, lora_a: mx.array, scale: float) -> mx.array:
    return ((rows @ lora_a) * scale).astype(rows.dtype)


def _low_rank_gradients(
    rows: mx.array, lora_a: mx.array, lora_b: mx.array, scale: float, dy: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients of the (scaled) low-rank rows, of A and of B."""
    d_low = ((dy @ lora_b.T.astype(dy.dtype)) * scale).astype(rows.dtype)
    d_a = rows.T @ d_low
    d_b = _low_rank(rows, lora_a, scale).T @ dy
    return d_low, d_a.astype(lora_a.dtype), d_b.astype(lora_b.dtype)


def _joint(base: nn.Module, scale: float) -> CustomFunction[mx.array]:
    """Function of (rows, A, B); the frozen base enters both passes without being differentiated."""

    @custom_function
    def run(rows: mx.array, lora_a: mx.array, lora_b: mx.array) -> mx.array:
        return mx.addmm(_times(rows, base, True), _low_rank(rows, lora_a, scale), lora_b.astype(rows.dtype))

    @run.vjp
    def run_vjp(primals, dy, outputs):
        rows, lora_a, lora_b = primals
        d_low, d_a, d_b = _low_rank_gradients(rows, lora_a, lora_b, scale, dy)
        return mx.addmm(_times(dy, base, False), d_low, lora_a.T.astype(dy.dtype)), d_a, d_b

    return run


def _update(scale: float) -> CustomFunction[tuple[mx.array]]:
    """Function of (base's output, rows, A, B) for any other base, and with dropout."""

    @custom_function
    def run(y: mx.array, rows: mx.array, lora_a: mx.array, lora_b: mx.array) -> tuple[mx.array]:
        return (mx.addmm(y, _low_rank(rows, lora_a, scale).astype(y.dtype), lora_b.astype(y.dtype)),)

    @run.vjp
    def run_vjp(primals, cotangents, outputs):
        dy = cotangents[0] if isinstance(cotangents, (tuple, list)) else cotangents
        _, rows, lora_a, lora_b = primals
        d_low, d_a, d_b = _low_rank_gradients(rows, lora_a, lora_b, scale, dy)
        return dy, d_low @ lora_a.T.astype(rows.dtype), d_a, d_b

    return run


@cache
def _fast(cls: type) -> type:
    def call(self, x: mx.array) -> mx.array:
        dropped: Any = self.dropout(x)
        return lora_matmul(x, self.linear, self.lora_a, self.lora_b, self.scale, None if dropped is x else dropped)

    return overridden_class(cls, {"__call__": call})
