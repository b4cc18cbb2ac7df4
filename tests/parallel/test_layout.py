"""Records of splits under full parameter names, and full tensors, slices and squares by those records, without ranks."""

import mlx.core as mx
import mlx.nn as nn
import pytest

import comm
from members import Rank
from parallel.layout import (
    ParameterLayout,
    Segment,
    Split,
    gather_tensors,
    model_layout,
    record_split,
    slice_tensors,
    split_records,
)


def split(rank: Rank, size: int, dim: int = 0, axis: str = "tp") -> Split:
    return Split(axis, rank, dim, (Segment(size),))


def test_records_are_found_under_full_names() -> None:
    """Catches a lost path, an array of the top module without its name, and splits in another order than applied."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.scale = mx.ones(8)
    outer, inner = split(Rank(0, 2), 4), split(Rank(0, 2), 2, axis="dp_shard")
    record_split(model.layers[1], "weight", outer)
    record_split(model.layers[1], "weight", inner)
    record_split(model, "scale", split(Rank(0, 2), 8))
    layout = model_layout(model)
    assert layout.keys() == {"layers.1.weight", "scale"}
    assert layout["layers.1.weight"] == ParameterLayout((outer, inner))
    assert layout["layers.1.weight"].groups == {"tp": outer.group, "dp_shard": inner.group}
    assert model_layout(nn.Linear(4, 4)) == {} == split_records(nn.Linear(4, 4))


def test_records_are_no_parameters() -> None:
    """Catches records that are saved, counted or updated with the weights, and those of an array that is gone."""
    linear = nn.Linear(4, 4)
    record_split(linear, "weight", split(Rank(0, 2), 4))
    record_split(linear, "bias", split(Rank(0, 2), 4))
    assert linear.parameters().keys() == {"weight", "bias"} and linear.children() == {}
    del linear.bias
    assert model_layout(linear).keys() == {"weight"}


@pytest.mark.parametrize("sizes", [(7, 4), (5, 2), (1, 3)])
def test_padding_comes_and_goes(sizes: tuple[int, int]) -> None:
    """Catches padding that stays in the full tensor, or a shape of the full tensor that counts it."""
    rows, num_ranks = sizes
    full = mx.arange(1, 3 * rows + 1).reshape(rows, 3)
    ranks = [Rank(rank, num_ranks) for rank in range(num_ranks)]
    layouts = [ParameterLayout((split(rank, rows),)) for rank in ranks]
    slices = [layout.slice(full) for layout in layouts]
    for rank, layout, local in zip(ranks, layouts, slices):
        rank.slices = slices
        assert mx.array_equal(layout.gather(local), full)
        assert layout.full_shape(local.shape) == full.shape
        assert layout.splits[0].local_size == local.shape[0]


@pytest.mark.parametrize("dims", [(0, 0), (1, 0), (0, 1)])
def test_a_split_of_a_slice_is_undone_in_reverse(dims: tuple[int, int]) -> None:
    """Catches gathers in the order of the splits: right in shape where both divide one dimension, wrong in values."""
    full = mx.arange(8 * 8).reshape(8, 8)
    meshes = [(Rank(tp, 2), Rank(shard, 2)) for tp in range(2) for shard in range(2)]
    layouts = []
    for tp, shard in meshes:
        outer = Split("tp", tp, dims[0], (Segment(4), Segment(4)))
        inner = split(shard, outer.local_size if dims[0] == dims[1] else 8, dims[1], "dp_shard")
        layouts.append(ParameterLayout((outer, inner)))
    locals_ = [layout.slice(full) for layout in layouts]
    halves = [layout.splits[0].slice(full) for layout in layouts]
    for (tp, shard), layout, local in zip(meshes, layouts, locals_):
        shard.slices = locals_[2 * tp.rank : 2 * tp.rank + 2]
        tp.slices = halves[::2]
        assert mx.array_equal(layout.gather(local), full)
        assert layout.full_shape(local.shape) == full.shape


def test_tensors_go_out_and_come_back_by_name() -> None:
    """Catches whole tensors that are cut, names of another stage that are not passed over, and a changed order."""
    rank = Rank(1, 2)
    layout = {"b": ParameterLayout((split(rank, 4),))}
    full = {"c": mx.arange(3), "b": mx.arange(4), "a": mx.arange(2)}
    local = dict(slice_tensors(layout, full.items(), {"c", "b"}))
    assert list(local) == ["c", "b"]
    assert local["c"].tolist() == [0, 1, 2] and local["b"].tolist() == [2, 3]
    assert [name for name, _ in slice_tensors(layout, full.items())] == ["c", "b", "a"]
    rank.slices = [mx.arange(2), local["b"]]
    assert {name: x.tolist() for name, x in gather_tensors(layout, local.items())} == {"c": [0, 1, 2], "b": [0, 1, 2, 3]}


def test_a_group_of_one_holds_the_tensor_itself() -> None:
    """Catches copies, or padding, where nothing is divided."""
    alone = ParameterLayout((split(comm.solo(), 5),))
    full = mx.arange(5)
    assert alone.slice(full) is full and alone.gather(full) is full
    assert alone.full_shape(full.shape) == (5,)


def test_tensors_are_gathered_one_at_a_time() -> None:
    """Catches a checkpoint that holds the whole model: the next tensor may not be asked for before the last is given."""
    asked: list[str] = []

    def tensors():
        for name in ("a", "b"):
            asked.append(name)
            yield name, mx.ones(2)

    gathered = gather_tensors({}, tensors(), comm.solo())
    assert next(gathered)[0] == "a" and asked == ["a"]


@pytest.mark.parametrize("dim", [0, 1])
def test_split_gathers_what_it_sliced(dim: int) -> None:
    """Catches pieces in the wrong order, and copies counted twice in a norm."""
    segments = (Segment(8), Segment(2, copies=2), Segment(4))
    full = mx.random.normal((14, 14), key=mx.random.key(0))
    ranks = [Rank(rank, 4) for rank in range(4)]
    layouts = [ParameterLayout((Split("tp", rank, dim, segments),)) for rank in ranks]
    slices = [layout.slice(full) for layout in layouts]
    for rank, layout in zip(ranks, layouts):
        rank.slices = slices
        assert mx.array_equal(layout.gather(slices[rank.rank]), full), "gather is not the inverse of slice"
        assert layout.full_shape(slices[0].shape) == full.shape, "shape of the full tensor"
    total = sum(layout.squared_sum(part).item() for layout, part in zip(layouts, slices))
    assert abs(total / full.square().sum().item() - 1) < 1e-6, "every element counts once"


def test_nested_splits() -> None:
    """Catches weights lost or doubled where a second axis divides what the first one left, copies included."""
    full = mx.random.normal((12, 6), key=mx.random.key(1))
    total = 0.0
    for tp in range(4):
        for shard in range(2):
            outer = Split("tp", Rank(tp, 4), 0, (Segment(8), Segment(4, copies=2)))
            inner = Split("dp_shard", Rank(shard, 2), 0, (Segment(outer.local_size),))
            layout = ParameterLayout((outer, inner))
            total += layout.squared_sum(layout.slice(full)).item()
    assert abs(total / full.square().sum().item() - 1) < 1e-6, "every element counts once over both axes"
