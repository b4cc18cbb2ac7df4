"""DataParallel without other ranks: what it refuses, and what it lets through."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest

import comm
from parallel import DataParallel, hidden_and_head, value_and_grad
from tiny import make


class Member:
    """A rank of a group whose other ranks have the same rows."""

    rank, size = 0, 2

    def all_sum(self, x: mx.array) -> mx.array:
        return 2 * x


def loss_fn(model: nn.Module, batch: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
    tokens = batch["tokens"]
    losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    return losses.sum(), mx.array(losses.size)


def chunked_loss_fn(model: nn.Module, batch: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
    tokens = batch["tokens"]
    hidden, head = hidden_and_head(model, tokens[:, :-1])
    losses = nn.losses.cross_entropy(head(hidden), tokens[:, 1:])
    return losses.sum(), mx.array(losses.size)


def wrapped() -> nn.Module:
    model = DataParallel(make("llama"), comm.solo())
    model.parallel_state.groups["dp_replicate"] = Member()
    return model


@pytest.mark.parametrize("loss", [loss_fn, chunked_loss_fn])
def test_plain_gradients_of_several_ranks_are_refused(loss: Callable) -> None:
    """Catches ranks that drift apart without a word, each on the gradients of its own rows."""
    model, batch = wrapped(), {"tokens": mx.array([[5, 9, 2, 7]])}
    with pytest.raises(ValueError, match="parallel.value_and_grad"):
        mx.eval(nn.value_and_grad(model, lambda m, b: loss(m, b)[0])(model, batch))


def test_steps_and_outputs_of_several_ranks_are_those_of_the_model() -> None:
    """Catches a refusal that hits a step, or a call without gradients."""
    model, plain, batch = wrapped(), make("llama"), {"tokens": mx.array([[5, 9, 2, 7]])}
    assert mx.array_equal(model(batch["tokens"]), plain(batch["tokens"]))
    loss, grads, _ = value_and_grad(model, loss_fn)([batch])
    right, expected, _ = value_and_grad(plain, loss_fn)([batch])
    assert loss.item() == right.item()
    assert mx.allclose(grads["lm_head"]["weight"], expected["lm_head"]["weight"], atol=1e-7)
