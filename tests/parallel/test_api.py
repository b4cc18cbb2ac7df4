"""The step of one process: what the sum of a loss is divided by."""

import mlx.core as mx
import mlx.nn as nn

from parallel import value_and_grad


class Scale(nn.Module):
    """One number times the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = mx.array([1.0], dtype=mx.bfloat16)

    def __call__(self, x: mx.array) -> mx.array:
        return (self.weight * x).sum()


def test_half_precision_gradients_are_divided_exactly() -> None:
    """Catches a number of tokens that is rounded to the gradients' type first: 263 tokens would count as 264."""
    num_tokens = 263
    step = value_and_grad(Scale(), lambda model, batch: (model(batch["x"]), mx.array(num_tokens)))
    _, grads, _ = step([{"x": mx.array([1.0], dtype=mx.bfloat16)}])
    assert grads["weight"].dtype == mx.bfloat16
    assert grads["weight"].item() == mx.array(1.0 / num_tokens).astype(mx.bfloat16).item()
    assert grads["weight"].item() != mx.array(1.0 / 264).astype(mx.bfloat16).item()


def test_a_weight_may_be_a_fraction() -> None:
    """Catches a divisor that is never below 1, and one that makes NaN of a batch without any weight."""
    for weight, expected in ((0.5, 4.0), (0.0, 2.0)):
        step = value_and_grad(Scale(), lambda model, batch, weight=weight: (model(batch["x"]), mx.array(weight)))
        loss, grads, total = step([{"x": mx.array([2.0], dtype=mx.bfloat16)}])
        assert (loss.item(), grads["weight"].item(), total.item()) == (expected, expected, weight)
