"""Every optimizer over several updates against its formula, written out again in float64 numpy.

AdamW, Adam and SGD are those of PyTorch's documentation; Lion: Chen et al., arXiv 2302.06675; Adafactor: Shazeer and
Stern, arXiv 1804.04235, without relative steps; Muon: Jordan et al., 2024, with the decay inside the gradient, as MLX
has it.
"""

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from trainer.recipe.config import OptimizerConfig
from trainer.training.optim import OPTIMIZERS, Optimizer

# Rates that differ from update to update, so that a stale one shows; eps is so large that its place does.
RATES = (0.1, 0.03, 0.05, 0.02)
CONFIG = OptimizerConfig(lr=9.0, weight_decay=0.2, betas=[0.8, 0.95], eps=0.1)
Array = np.ndarray
Formula = Callable[..., tuple[Array, dict[str, Array]]]


class Model(nn.Module):
    """A table outside the layers, and a wide and a tall matrix and a vector inside."""

    def __init__(self, dtype: mx.Dtype = mx.float32):
        super().__init__()
        draw = np.random.default_rng(0).normal
        self.table = mx.array(draw(size=(7, 4))).astype(dtype)
        self.layers = [{"wide": mx.array(draw(size=(3, 5))).astype(dtype), "bias": mx.array(draw(size=4)).astype(dtype)}]
        self.layers.append({"tall": mx.array(draw(size=(6, 2))).astype(dtype)})


def gradients(model: nn.Module, seed: int, dtype: mx.Dtype = mx.float32) -> dict:
    draw = np.random.default_rng(seed).normal
    return tree_unflatten([(n, mx.array(draw(size=p.shape)).astype(dtype)) for n, p in tree_flatten(model.parameters())])


def doubles(tree: dict | list) -> dict[str, Array]:
    return {name: np.array(x.astype(mx.float32), dtype=np.float64) for name, x in tree_flatten(tree)}


def adam(w: Array, g: Array, s: dict, t: int, lr: float, decay: float, c: OptimizerConfig, decoupled=False):
    b1, b2 = c.betas
    m = b1 * s.get("m", 0) + (1 - b1) * g
    v = b2 * s.get("v", 0) + (1 - b2) * g**2
    w = w - lr * decay * w if decoupled else w
    m_hat, v_hat = (m / (1 - b1**t), v / (1 - b2**t)) if c.bias_correction else (m, v)
    return w - lr * m_hat / (np.sqrt(v_hat) + c.eps), {"m": m, "v": v}


def adamw(*args):
    return adam(*args, decoupled=True)


def sgd(w: Array, g: Array, s: dict, t: int, lr: float, decay: float, c: OptimizerConfig):
    return w - lr * (g + decay * w), {}


def lion(w: Array, g: Array, s: dict, t: int, lr: float, decay: float, c: OptimizerConfig):
    b1, b2 = c.betas
    m = s.get("m", np.zeros_like(w))
    return w - lr * (np.sign(b1 * m + (1 - b1) * g) + decay * w), {"m": b2 * m + (1 - b2) * g}


def adafactor(w: Array, g: Array, s: dict, t: int, lr: float, decay: float, c: OptimizerConfig):
    b2 = 1 - t**-0.8
    square = g**2 + 1e-30
    if w.ndim == 1:
        state = {"v": b2 * s.get("v", 0) + (1 - b2) * square}
        v = state["v"]
    else:
        rows = b2 * s.get("rows", 0) + (1 - b2) * square.sum(1)
        columns = b2 * s.get("columns", 0) + (1 - b2) * square.sum(0)
        state = {"rows": rows, "columns": columns}
        v = np.outer(rows, columns) / rows.sum()
    u = g / np.sqrt(v)
    u = u / max(1.0, np.sqrt(np.mean(u**2)))
    return w - lr * decay * w - lr * u, state


def muon(w: Array, g: Array, s: dict, t: int, lr: float, decay: float, c: OptimizerConfig):
    g = g + decay * w
    momentum = 0.95 * s.get("momentum", 0) + 0.05 * g
    x = 0.05 * g + 0.95 * momentum
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return w - lr * max(1, w.shape[0] / w.shape[1]) ** 0.5 * x, {"momentum": momentum}


FORMULAS: dict[str, Formula] = {
    "adamw": adamw, "adam": adam, "sgd": sgd, "lion": lion, "adafactor": adafactor, "muon": muon,
}  # fmt: skip


def formula_of(optimizer: str, parameter: str) -> Formula:
    """Muon is for the matrices of the layers only."""
    is_hidden = parameter.endswith(("wide", "tall"))
    return FORMULAS[optimizer if optimizer != "muon" or is_hidden else "adamw"]


def expected(config: OptimizerConfig, weights: dict[str, Array], grads: list[dict[str, Array]]) -> dict[str, Array]:
    """Weights after an update for each of `grads`; vectors do not decay."""
    states: dict[str, dict] = {name: {} for name in weights}
    for t, (lr, step_grads) in enumerate(zip(RATES, grads), 1):
        for name, w in weights.items():
            decay = config.weight_decay if w.ndim > 1 else 0.0
            formula = formula_of(config.name, name)
            weights[name], states[name] = formula(w, step_grads[name], states[name], t, lr, decay, config)
    return weights


def check(found: dict[str, Array], right: dict[str, Array], tolerance: float) -> None:
    assert found.keys() == right.keys()
    for name, value in right.items():
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


def test_every_optimizer_has_a_formula() -> None:
    """Catches an optimizer that no test holds."""
    assert FORMULAS.keys() == OPTIMIZERS.keys()


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("name", FORMULAS)
def test_updates_follow_their_formula(name: str, decay: float, bias_correction: bool) -> None:
    """Catches eps inside the root, decay in the moments or on vectors, a missing correction and a stale rate."""
    config = replace(CONFIG, name=name, weight_decay=decay, bias_correction=bias_correction)
    model = Model()
    optimizer, start = Optimizer(model.trainable_parameters(), config), doubles(model.parameters())
    grads = [gradients(model, 1 + i) for i in range(len(RATES))]
    for lr, step_grads in zip(RATES, grads):
        optimizer.update(model, step_grads, lr)
    check(doubles(model.parameters()), expected(config, start, [doubles(g) for g in grads]), 2e-5)
    assert optimizer.num_updates == len(RATES)


@pytest.mark.parametrize("name", FORMULAS)
def test_bfloat16_parameters_train_in_float32(name: str) -> None:
    """Catches moments, masters or updates of bfloat16: the masters follow the formula, the parameters are their rounding."""
    config = replace(CONFIG, name=name)
    model = Model(mx.bfloat16)
    optimizer, start = Optimizer(model.trainable_parameters(), config), doubles(model.parameters())
    grads = [gradients(model, 1 + i, mx.bfloat16) for i in range(len(RATES))]
    for lr, step_grads in zip(RATES, grads):
        optimizer.update(model, step_grads, lr)
    assert {str(x.dtype) for _, x in optimizer.tensors()} == {"mlx.core.float32"}
    check(doubles(optimizer.master), expected(config, start, [doubles(g) for g in grads]), 2e-5)
    for parameter, value in tree_flatten(model.parameters()):
        assert value.dtype == mx.bfloat16 and mx.array_equal(value, optimizer.master[parameter].astype(mx.bfloat16))


@pytest.mark.parametrize("has_master", [True, False])
def test_small_updates_add_up_in_master_weights_only(has_master: bool) -> None:
    """Catches masters that are taken from the rounded parameters again, and masters where none were asked for."""
    model = Model(mx.bfloat16)
    config = replace(CONFIG, name="sgd", weight_decay=0.0, master_weights=has_master)
    optimizer, start = Optimizer(model.trainable_parameters(), config), doubles(model.parameters())
    ones = tree_unflatten([(n, mx.ones(p.shape)) for n, p in tree_flatten(model.parameters())])
    for _ in range(64):
        optimizer.update(model, ones, 2.0**-14)  # no bfloat16 number above 2^-5 moves by so little
    large = {n: np.abs(w) > 2.0**-3 for n, w in start.items()}
    moved = {n: (start[n] - w)[large[n]] for n, w in doubles(model.parameters()).items()}
    if not has_master:
        assert not optimizer.master and all(not change.any() for change in moved.values())
    else:
        check(doubles(optimizer.master), {n: w - 2.0**-8 for n, w in start.items()}, 1e-6)
    assert any(change.any() for change in moved.values()) == has_master


def test_float32_parameters_have_no_second_copy() -> None:
    """Catches memory spent on masters of parameters that are float32 themselves."""
    optimizer = Optimizer(Model().trainable_parameters(), CONFIG)
    assert not optimizer.master and not [name for name, _ in optimizer.tensors() if name.endswith(".master")]


@pytest.mark.parametrize("name", FORMULAS)
def test_restored_optimizers_go_on_bit_for_bit(name: str) -> None:
    """Catches a slot that is not stored, and bias correction or decay rates that start again at the first update."""
    config, models, results = replace(CONFIG, name=name), (Model(mx.bfloat16), Model(mx.bfloat16)), []
    first = Optimizer(models[0].trainable_parameters(), config)
    for i in range(2):
        first.update(models[0], gradients(models[0], i), RATES[i])
    models[1].update(models[0].parameters())
    second = Optimizer(models[1].trainable_parameters(), config)
    second.load(dict(first.tensors()), first.num_updates)
    for model, optimizer in zip(models, (first, second)):
        optimizer.update(model, gradients(model, 2), RATES[2])
        results.append(dict(optimizer.tensors()) | dict(tree_flatten(model.parameters())))
        assert optimizer.num_updates == 3
    assert all(mx.array_equal(value, results[1][name]) for name, value in results[0].items())


def test_a_state_that_lacks_tensors_is_refused() -> None:
    """Catches a resumed run that silently begins some moments at zero."""
    optimizer = Optimizer(Model().trainable_parameters(), CONFIG)
    tensors = dict(optimizer.tensors())
    del tensors["table.v"]
    with pytest.raises(ValueError, match=r"lacks 1 tensors, the first is 'table\.v'"):
        optimizer.load(tensors, 1)
