"""Operations that this package and MLX both have, measured against each other on the device in use.

MLX's own kernels differ by chip and shape, and it chooses silently between a fused kernel and plain operations. So only
a measurement of forward and backward pass at given shapes tells which is faster, and only a comparison of values and
gradients whether both are right.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from trainer.layers.attention import blockwise_attention
from trainer.layers.gated_delta import gated_delta_rule

OURS = "ours"
REPEATS = 3


@dataclass(frozen=True)
class Candidate:
    """One way to compute an operation.

    Attributes:
        name: `OURS`, or who else's it is.
        function: From the operation's inputs to its result, differentiable.
    """

    name: str
    function: Callable[..., mx.array]


@dataclass(frozen=True)
class Measured:
    """A candidate's forward and backward pass.

    Attributes:
        name: The candidate's.
        seconds: Best of some repetitions after a warm-up.
        peak_bytes: Memory that it needs beside its inputs.
        error: The largest distance of value and gradients from ours, relative to each one's largest entry.
        reason: Why it cannot be used, where it raised; "" elsewhere.
    """

    name: str
    seconds: float = 0.0
    peak_bytes: int = 0
    error: float = 0.0
    reason: str = ""


def candidates(scale: float) -> dict[str, tuple[Candidate, ...]]:
    """The operations' candidates, ours first.

    Args:
        scale: Of attention's scores.

    Returns:
        "attention": functions of queries (B, H, T, D), keys and values (B, G, T, D), causal. "gated delta rule": of q, k
        (B, T, Hk, D), v (B, T, Hv, D), and the logarithm of the gate and beta (B, T, Hv).
    """
    return {
        "attention": (
            Candidate(OURS, partial(blockwise_attention, scale=scale)),
            Candidate("mlx", partial(mx.fast.scaled_dot_product_attention, scale=scale, mask="causal")),
        ),
        "gated delta rule": (Candidate(OURS, _our_delta), Candidate("mlx", _mlx_delta)),
    }


def compare(found: Sequence[Candidate], inputs: Sequence[mx.array]) -> list[Measured]:
    """Measure each candidate on the same inputs; the first is the one that the others are compared with.

    A candidate that raises is reported with its reason, unless it is the first.
    """
    measured: list[Measured] = []
    right: list[mx.array] = []
    for candidate in found:
        try:
            seconds, peak, results = _timed(candidate.function, inputs)
        except Exception as error:
            if not measured:
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            measured.append(Measured(candidate.name, reason=reason))
            continue
        right = right or results
        worst = max(_distance(result, wanted) for result, wanted in zip(results, right, strict=True))
        measured.append(Measured(candidate.name, seconds, peak, worst))
    return measured


def choose(measured: Sequence[Measured], bound: float, memory_bytes: int | None = None) -> tuple[str, str]:
    """The fastest candidate that agrees with the first and fits; and, where one does not, a sentence about it.

    Args:
        measured: From `compare`.
        bound: The largest distance from the first.
        memory_bytes: What a candidate may need. Default: anything.
    """
    notes, usable = [], [measured[0]]
    for one in measured[1:]:
        if one.reason:
            notes.append(f"{one.name} cannot be used: {one.reason}")
        elif not one.error <= bound:  # NaN too
            notes.append(f"{one.name} differs from {measured[0].name} by {one.error:.1e}, more than {bound:.0e}")
        elif memory_bytes is not None and one.peak_bytes > memory_bytes:
            notes.append(f"{one.name} needs {one.peak_bytes / 2**30:.1f} GiB")
        else:
            usable.append(one)
    return min(usable, key=lambda one: one.seconds).name, "; ".join(notes)


def _timed(function: Callable[..., mx.array], inputs: Sequence[mx.array]) -> tuple[float, int, list[mx.array]]:
    """Seconds and bytes of value and gradients, and these."""
    like = function(*inputs)
    cotangent = mx.random.normal(like.shape, key=mx.random.key(0)).astype(like.dtype)

    def run() -> list[mx.array]:
        values, gradients = mx.vjp(lambda *x: [function(*x)], list(inputs), [cotangent])
        mx.eval(values, gradients)
        return [*values, *gradients]

    mx.eval(cotangent)
    results = run()
    seconds, peak = [], 0
    for _ in range(REPEATS):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
        peak = max(peak, mx.get_peak_memory() - before)
    return min(seconds), peak, results


def _distance(found: mx.array, wanted: mx.array) -> float:
    """NaN where an entry is."""
    found, wanted = found.astype(mx.float32), wanted.astype(mx.float32)
    distance = mx.abs(found - wanted).max() / mx.maximum(mx.abs(wanted).max(), 1e-30)
    return float("nan") if mx.isnan(distance).item() else float(distance.item())  # type: ignore[arg-type]


def _our_delta(q: mx.array, k: mx.array, v: mx.array, log_gate: mx.array, beta: mx.array) -> mx.array:
    return gated_delta_rule(q, k, v, log_gate, beta)[0]


def _mlx_delta(q: mx.array, k: mx.array, v: mx.array, log_gate: mx.array, beta: mx.array) -> mx.array:
    return mx.fast.gated_delta_update(q, k, v, mx.exp(log_gate), beta)[0]
