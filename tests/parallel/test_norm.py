"""Norm and clipping of gradients against numpy: on one rank, and over groups whose ranks hold the same values."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import comm
from parallel import clip_grad_norm
from parallel.layout import Segment, Split, record_split
from parallel.norm import global_norm
from parallel.wrapper import ParallelState


class Alike:
    """A group of `size` ranks that all hold what this one holds; notes what is summed."""

    def __init__(self, name: str, size: int, calls: list[str] | None = None):
        self.name, self.size, self.rank = name, size, 0
        self.calls = [] if calls is None else calls

    def all_sum(self, x: mx.array) -> mx.array:
        self.calls.append(self.name)
        return self.size * x


def tree(seed: int = 0, dtype: mx.Dtype = mx.float32) -> dict:
    draw = np.random.default_rng(seed).normal
    return {"a": {"weight": mx.array(draw(size=(3, 4))).astype(dtype)}, "b": [mx.array(draw(size=5)).astype(dtype)]}


def norm_of(grads: dict) -> float:
    return float(np.sqrt(sum(np.square(np.array(g.astype(mx.float32), np.float64)).sum() for _, g in tree_flatten(grads))))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_clipped_gradients_have_the_largest_norm_allowed(dtype: mx.Dtype) -> None:
    """Catches a norm per tensor, a norm after clipping, and gradients that change their dtype."""
    grads = tree(dtype=dtype)
    clipped, norm = clip_grad_norm(grads, 0.5, nn.Module())
    assert norm.dtype == mx.float32 and norm.item() == pytest.approx(norm_of(grads), rel=1e-6)
    rounding = 1e-5 if dtype == mx.float32 else 1e-2
    for (name, found), (_, grad) in zip(tree_flatten(clipped), tree_flatten(grads)):
        assert found.dtype == dtype, f"{name} became {found.dtype}"
        expected = np.array(grad.astype(mx.float32)) * 0.5 / norm_of(grads)
        np.testing.assert_allclose(np.array(found.astype(mx.float32)), expected, rtol=rounding)


@pytest.mark.parametrize("max_norm", [None, 1e3])
def test_small_gradients_stay_bit_for_bit(max_norm: float | None) -> None:
    """Catches gradients that are scaled up to the norm allowed, or clipped where nothing was asked for."""
    grads = tree()
    clipped, norm = clip_grad_norm(grads, max_norm, nn.Module())
    assert norm.item() == pytest.approx(norm_of(grads), rel=1e-6)
    assert all(mx.array_equal(found, grad) for (_, found), (_, grad) in zip(tree_flatten(clipped), tree_flatten(grads)))


def test_the_factor_is_that_of_torch() -> None:
    """Catches another place, or size, of torch's 1e-6, which is felt where the norm itself is that small."""
    clipped, _ = clip_grad_norm({"w": mx.array([3e-6])}, 1e-6, nn.Module())
    assert clipped["w"].item() == pytest.approx(3e-6 * 1e-6 / (3e-6 + 1e-6), rel=1e-5)


def test_zero_and_infinite_gradients() -> None:
    """Catches a division by a norm of zero, and an overflow that the loop could not see in the norm."""
    zeros, norm = clip_grad_norm({"w": mx.zeros(3)}, 1.0, nn.Module())
    assert norm.item() == 0 and mx.array_equal(zeros["w"], mx.zeros(3))
    _, norm = clip_grad_norm({"w": mx.array([1.0, float("inf")]), "v": mx.ones(2)}, 1.0, nn.Module())
    assert not np.isfinite(norm.item())


def test_squares_of_half_precision_are_added_in_float32() -> None:
    """Catches a sum of squares that overflows float16 or drops small terms of bfloat16."""
    assert global_norm({"w": mx.full(4096, 300.0, mx.float16)}, nn.Module()).item() == pytest.approx(300 * 64, rel=1e-4)
    assert global_norm({"w": mx.full(2**20, 0.5, mx.bfloat16)}, nn.Module()).item() == pytest.approx(512, rel=1e-6)


def divided_model(calls: list[str]) -> nn.Module:
    """Parameters that are whole, split over tp (2), dp_shard (3), both, and over tp with copies; pp holds 5 stages."""
    model = nn.Module()
    tp, shard = Alike("tp", 2, calls), Alike("dp_shard", 3, calls)
    for name in ("whole", "tied", "columns", "rows", "both", "copies"):
        model[name] = mx.zeros((2, 6))
    record_split(model, "columns", Split("tp", tp, 1, (Segment(12),)))
    record_split(model, "rows", Split("dp_shard", shard, 0, (Segment(6),)))
    record_split(model, "both", Split("tp", tp, 1, (Segment(12),)))
    record_split(model, "both", Split("dp_shard", shard, 0, (Segment(6),)))
    record_split(model, "copies", Split("tp", tp, 1, (Segment(4), Segment(4, copies=2))))
    model.parallel_state = ParallelState({"pp": Alike("pp", 5, calls)}, repeated=frozenset({"tied"}))
    return model


def test_every_element_counts_once_over_a_mesh() -> None:
    """Catches replicated gradients, copied pieces and tied weights that count for each rank, and slices that do not."""
    calls: list[str] = []
    model, draw = divided_model(calls), np.random.default_rng(3).normal
    grads = {name: draw(size=(2, 6)) for name in ("whole", "tied", "columns", "rows", "both", "copies")}
    squares = {name: np.square(grad) for name, grad in grads.items()}
    copies = 2 * squares["copies"][:, :2].sum() + squares["copies"][:, 2:].sum()
    split = 2 * squares["columns"].sum() + 3 * squares["rows"].sum() + 6 * squares["both"].sum() + copies
    norm = global_norm({name: mx.array(grad) for name, grad in grads.items()}, model)
    assert norm.item() == pytest.approx(np.sqrt(5 * (squares["whole"].sum() + split)), rel=1e-6)
    assert calls == ["dp_shard", "dp_shard", "tp", "tp", "pp"], "one sum for each set of axes, in the order of their names"


def test_sums_do_not_depend_on_the_order_of_the_tree() -> None:
    """Catches collectives in the order of a rank's own tree: two ranks would add up different things."""
    orders = []
    for names in (("rows", "columns", "both"), ("both", "columns", "rows")):
        calls: list[str] = []
        global_norm({name: mx.ones((2, 6)) for name in names}, divided_model(calls))
        orders.append(calls)
    assert orders[0] == orders[1]


def test_one_rank_sums_nothing_over_groups_of_one() -> None:
    """Catches a size of one as a special case: the norm of a wrapped model is that of the plain one."""
    model = divided_model([])
    model.parallel_state.groups["pp"] = comm.solo()
    assert global_norm({"whole": mx.ones((2, 6))}, model).item() == pytest.approx(np.sqrt(12))
