"""Every operation of this package on the device in use, values and gradients, against float64 on the CPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from parallel import Head
from trainer.layers import elementwise
from trainer.layers.attention import blockwise_attention
from trainer.layers.causal_conv import causal_conv
from trainer.layers.gated_delta import gated_delta_rule
from trainer.layers.linear_cross_entropy import linear_cross_entropy
from trainer.layers.lora_matmul import lora_matmul
from trainer.layers.token_log_probs import token_log_probs
from trainer.selftest import formulas
from trainer.selftest.outcome import Check

SECTION = "operations against float64"
# Distances relative to the largest entry. Matrix products of float32 may use TF32 on newer GPUs, which has 10 bits.
BOUNDS = {mx.float32: 2e-5, mx.bfloat16: 3e-2}
TF32_BOUND = 5e-3


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        name: In the report.
        shapes: Of its floating-point inputs.
        ours: From the inputs, in the type that is tested, to its result.
        plain: The same as a formula, for float64.
        scales: Factors on the standard normal inputs. Default: 1.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    ours: Callable[..., mx.array]
    plain: Callable[..., mx.array]
    scales: Sequence[float] = field(default=())


def operation_checks() -> list[Check]:
    """A check of each operation in float32 and bfloat16."""
    matmul = TF32_BOUND if has_reduced_products() else BOUNDS[mx.float32]
    bounds = BOUNDS | {mx.float32: matmul}
    return [
        Check(SECTION, f"{operation.name}, {str(dtype).removeprefix('mlx.core.')}", bound, partial(_distance, operation, dtype))
        for operation in operations()
        for dtype, bound in bounds.items()
    ]


def operations() -> list[Operation]:
    """All of them, at sizes that cross the borders of their blocks."""
    segments = mx.array([[1] * 70 + [2] * 130, [1] * 140 + [2] * 55 + [0] * 5])
    ids = mx.random.randint(0, 300, (2, 200), key=mx.random.key(1))
    mask = mx.random.uniform(shape=(2, 200), key=mx.random.key(2)) < 0.6
    attend = partial(blockwise_attention, scale=32**-0.5)
    heads = ((2, 4, 200, 32), (2, 2, 200, 32), (2, 2, 200, 32))
    delta = ((2, 200, 2, 32), (2, 200, 2, 32), (2, 200, 4, 32), (2, 200, 4), (2, 200, 4))
    head = ((2, 200, 64), (300, 64))
    return [
        Operation("swiglu", ((64, 96), (64, 96)), elementwise.swiglu, formulas.swiglu, (3.0, 1.0)),
        Operation(
            "causal convolution, packed", ((2, 200, 48), (48, 4, 1)), partial(_convolution, segments),
            partial(formulas.convolution, segments=segments),
        ),
        Operation("gated delta rule", delta, partial(_delta, lambda *x: gated_delta_rule(*x)[0]), partial(_delta, formulas.gated_delta)),
        Operation("attention", heads, attend, formulas.attention),
        Operation("attention, window", heads, partial(attend, window=40), partial(formulas.attention, window=40)),
        Operation(
            "attention, packed", heads, partial(attend, segments=segments), partial(formulas.attention, segments=segments)
        ),
        Operation(
            "cross-entropy", head, lambda x, w: linear_cross_entropy(x, _head(w), ids, mask)[0],
            lambda x, w: -(formulas.log_probs(x, w, ids) * mask).sum(),
        ),
        Operation(
            "log-probabilities of tokens", head, lambda x, w: token_log_probs(x, _head(w), ids, mask),
            lambda x, w: formulas.log_probs(x, w, ids) * mask,
        ),
        Operation(
            "LoRA on a linear", ((200, 64), (96, 64), (64, 8), (8, 96)),
            lambda x, w, a, b: lora_matmul(x, _linear(mx.stop_gradient(w)), a, b, 2.0),
            lambda x, w, a, b: formulas.lora(x, mx.stop_gradient(w), a, b, 2.0), (1.0, 0.1, 0.3, 0.3),
        ),
        Operation(
            "LoRA on a quantized linear", ((200, 64), (64, 8), (8, 96)),
            lambda x, a, b: lora_matmul(x, _quantized(), a, b, 2.0),
            lambda x, a, b: formulas.lora(x, _dequantized().astype(x.dtype), a, b, 2.0), (1.0, 0.3, 0.3),
        ),
    ]  # fmt: skip


def _distance(operation: Operation, dtype: mx.Dtype) -> tuple[float, str]:
    """The largest distance of value and gradients, relative to each one's largest entry, and the worst one's name."""
    with mx.stream(mx.cpu):
        scales = operation.scales or (1.0,) * len(operation.shapes)
        keys = mx.random.split(mx.random.key(7), len(operation.shapes) + 1)
        drawn = [(s * mx.random.normal(shape, key=k)).astype(dtype) for s, shape, k in zip(scales, operation.shapes, keys)]
        exact = [x.astype(mx.float64) for x in drawn]
        like = operation.plain(*exact)
        weight = mx.random.normal(like.shape, key=keys[-1]).astype(dtype)
        (right,), wanted = mx.vjp(lambda *x: [operation.plain(*x)], exact, [weight.astype(mx.float64)])
        mx.eval(drawn, weight, right, wanted)
    (value,), found = mx.vjp(lambda *x: [operation.ours(*x)], drawn, [weight.astype(operation.ours(*drawn).dtype)])
    mx.eval(value, found)
    names = ["value", *(f"gradient {number + 1}" for number in range(len(drawn)))]
    errors = {
        name: relative_distance(got, want) for name, got, want in zip(names, [value, *found], [right, *wanted])
    }
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst


def relative_distance(found: mx.array, wanted: mx.array) -> float:
    """The largest distance between entries, over the largest entry of `wanted`; both on the CPU, in float64."""
    with mx.stream(mx.cpu):
        found, wanted = found.astype(mx.float64), wanted.astype(mx.float64)
        largest = mx.maximum(mx.abs(wanted).max(), 1e-30)
        return float((mx.abs(found - wanted).max() / largest).item())  # type: ignore[arg-type]  # no complex number


def has_reduced_products() -> bool:
    """Whether float32 products may have fewer bits than 24: on CUDA by default, and in the matrix units of Apple's M5."""
    name = str(mx.device_info().get("device_name", ""))
    return mx.default_device() == mx.gpu and (mx.cuda.is_available() or "M5" in name)


def _convolution(segments: mx.array, x: mx.array, weight: mx.array) -> mx.array:
    padded = mx.pad(x, [(0, 0), (weight.shape[1] - 1, 0), (0, 0)])
    return causal_conv(padded, weight=weight, bias=None, segments=segments)


def _delta(rule: Callable, q: mx.array, k: mx.array, v: mx.array, log_gate: mx.array, beta: mx.array) -> mx.array:
    """The rule on what a layer gives it: keys of length 1, gates below 1, strengths between 0 and 1."""
    q, k = (x / mx.sqrt((x * x).sum(axis=-1, keepdims=True) + 1e-6) for x in (q, k))
    gate = -mx.log(1 + mx.exp(log_gate.astype(mx.float32) if log_gate.dtype == mx.bfloat16 else log_gate))
    return rule(q, k, v, 0.1 * gate, 1 / (1 + mx.exp(-beta)))


def _head(weight: mx.array) -> Head:
    return Head(_linear(weight))


def _linear(weight: mx.array) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = weight
    return linear


def _base() -> nn.Linear:
    return _linear(0.1 * mx.random.normal((96, 64), key=mx.random.key(3)))


def _quantized() -> nn.Module:
    quantized = nn.QuantizedLinear.from_linear(_base(), group_size=64, bits=4)
    quantized.freeze()
    return quantized


def _dequantized() -> mx.array:
    packed: nn.Module = _quantized()
    return mx.dequantize(packed["weight"], packed["scales"], packed["biases"], group_size=64, bits=4)
