"""Elementwise functions whose backward pass reuses the forward's exponential, and an exponential that is quick on
CPUs.

MLX's CPU exp costs 20 ns an element on x86, its power 7 ns at the same accuracy, other operations 0.6 ns.
"""

import math
from functools import partial

import mlx.core as mx

from comm import CustomFunction, custom_function


def exp(x: mx.array) -> mx.array:
    """e to the `x`, for use inside custom functions (whose gradient is written by hand)."""
    return mx.power(math.e, x) if _on_cpu(x) else mx.exp(x)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x)), for the same use as `exp`."""
    return 1.0 / (1.0 + exp(-x)) if _on_cpu(x) else mx.sigmoid(x)


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x), in x's dtype."""
    return _silu()(x)[0]


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x; keeps only the sigmoid, where automatic differentiation keeps the product as well."""
    return _swiglu()(gate, x)[0]


def precise_swiglu(like: mx.array, gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x computed in float32, in the dtype of `like`."""
    return swiglu(gate.astype(mx.float32), x.astype(mx.float32)).astype(like.dtype)


def _on_cpu(x: mx.array) -> bool:
    return mx.default_device() == mx.cpu and x.dtype == mx.float32


def _slope(x: mx.array, gate: mx.array) -> mx.array:
    """Derivative of silu at x, given sigmoid(x)."""
    return gate * (1 + x * (1 - gate))


# Compiled where compiling is on, so that a GPU runs each as one kernel.
@partial(mx.compile, shapeless=True)
def _silu_forward(x: mx.array) -> tuple[mx.array, mx.array]:
    gate = sigmoid(x)
    return x * gate, gate


@partial(mx.compile, shapeless=True)
def _silu_backward(x: mx.array, gate: mx.array, dy: mx.array) -> mx.array:
    return dy * _slope(x, gate)


@partial(mx.compile, shapeless=True)
def _swiglu_forward(gate: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
    opened = sigmoid(gate)
    return gate * opened * x, opened


@partial(mx.compile, shapeless=True)
def _swiglu_backward(gate: mx.array, x: mx.array, opened: mx.array, dy: mx.array) -> tuple[mx.array, mx.array]:
    return dy * x * _slope(gate, opened), dy * (gate * opened)


# Made anew for each call, as all custom functions here: then who looks at graphs can put others in their place.
def _silu() -> CustomFunction[tuple[mx.array, mx.array]]:
    @custom_function
    def run(x: mx.array) -> tuple[mx.array, mx.array]:
        return _silu_forward(x)

    @run.vjp
    def run_vjp(x, cotangents, outputs):
        return _silu_backward(x, outputs[1], cotangents[0])

    return run


def _swiglu() -> CustomFunction[tuple[mx.array, mx.array]]:
    @custom_function
    def run(gate: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
        return _swiglu_forward(gate, x)

    @run.vjp
    def run_vjp(primals, cotangents, outputs):
        gate, x = primals
        return _swiglu_backward(gate, x, outputs[1], cotangents[0])

    return run
