"""Choosing between ways to compute an operation, on stand-ins that are slower, wrong, greedy or broken."""

import time

import mlx.core as mx
import pytest

from trainer.layers.kernels import OURS, Candidate, Measured, candidates, choose, compare

X = mx.arange(12, dtype=mx.float32).reshape(3, 4) / 10


def square(x: mx.array) -> mx.array:
    return x * x


def slow(x: mx.array) -> mx.array:
    time.sleep(0.02)
    return x * x


def wrong_gradient(x: mx.array) -> mx.array:
    return mx.stop_gradient(x * x - 2.1 * x) + 2.1 * x


def broken(x: mx.array) -> mx.array:
    raise RuntimeError("no kernel for this shape\nmore")


@pytest.mark.parametrize(
    ("ours", "other", "chosen", "words"),
    [
        (slow, square, "mlx", ""),
        (square, slow, OURS, ""),
        (slow, wrong_gradient, OURS, "mlx differs from ours by"),
        (slow, lambda x: x * float("nan"), OURS, "mlx differs from ours by nan"),
        (slow, broken, OURS, "mlx cannot be used: RuntimeError: no kernel for this shape"),
    ],
)
def test_the_fastest_that_is_right(ours, other, chosen, words) -> None:
    """Catches a choice by speed alone, a gradient that nobody compares, and NaN that counts as near."""
    measured = compare([Candidate(OURS, ours), Candidate("mlx", other)], [X])
    name, note = choose(measured, 1e-4)
    assert name == chosen and note.startswith(words) and bool(note) == bool(words)


def test_what_does_not_fit_is_not_chosen() -> None:
    """Catches a fast kernel that ends the run for want of memory."""
    measured = [Measured(OURS, 2.0, 10), Measured("mlx", 1.0, 3 * 2**30)]
    assert choose(measured, 1e-4) == ("mlx", "")
    assert choose(measured, 1e-4, 2**30) == (OURS, "mlx needs 3.0 GiB")


def test_ours_must_work() -> None:
    """Catches an operation of ours that fails and is reported as the other's fault."""
    with pytest.raises(RuntimeError, match="no kernel"):
        compare([Candidate(OURS, broken), Candidate("mlx", square)], [X])


@pytest.mark.parametrize("name", candidates(1.0))
def test_candidates_agree_here(name: str) -> None:
    """Catches inputs in another order or another meaning (a gate for its logarithm)."""
    mx.random.seed(0)
    if name == "attention":
        inputs = [mx.random.normal((1, heads, 96, 32)) for heads in (4, 2, 2)]
    else:
        q, k = (mx.random.normal((1, 96, 2, 32)) / 32**0.5 for _ in range(2))
        inputs = [q, k, mx.random.normal((1, 96, 4, 32)), -mx.random.uniform(shape=(1, 96, 4)), mx.random.uniform(shape=(1, 96, 4))]
    measured = compare(candidates(32**-0.5)[name], inputs)
    assert [one.name for one in measured] == [OURS, "mlx"] and not measured[1].reason
    assert measured[0].error == 0.0 and measured[1].error < 1e-4 and measured[0].peak_bytes > 0
