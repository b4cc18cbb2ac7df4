"""The contract of `comm.Group`, as functions of a group; run on every backend by workers."""

import math

import mlx.core as mx
import numpy as np

import comm

FLOATS = (mx.float16, mx.bfloat16, mx.float32)
BATCH = 30
INTEGERS = (mx.int8, mx.uint8, mx.int16, mx.uint16, mx.int32, mx.uint32, mx.int64, mx.uint64)


def close(a: mx.array, b: mx.array, tolerance: float = 1e-5) -> None:
    a, b = np.array(a.astype(mx.float32)), np.array(b.astype(mx.float32))
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def refused(call, word: str) -> None:
    try:
        call()
    except ValueError as error:
        assert word in str(error), f"{word!r} is not in {error}"
    else:
        raise AssertionError("nothing was refused")


def all_ranks(group, make) -> list[mx.array]:
    return [make(rank) for rank in range(group.size)]


def normal(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def sums(group):
    n = group.size
    for dtype in FLOATS + INTEGERS:
        x = (mx.arange(6).reshape(2, 3) + group.rank).astype(dtype)
        total = group.all_sum(x)
        assert total.dtype == dtype and total.shape == (2, 3), f"{dtype}: {total}"
        close(total, mx.arange(6).reshape(2, 3) * n + n * (n - 1) // 2)
    flags = group.all_sum(mx.array([True, group.rank == 0, False]))
    assert flags.dtype == mx.bool_ and flags.tolist() == [True, True, False], f"{flags}"
    assert group.all_sum(mx.array(2.0)).tolist() == 2.0 * n, "scalar"
    assert group.all_sum(mx.zeros((0, 3))).shape == (0, 3), "empty"
    strided = mx.arange(12).reshape(3, 4).T
    close(group.all_sum(strided), strided * n)


def extremes(group):
    n = group.size
    for dtype in FLOATS + (mx.int32, mx.uint8):
        x = mx.array([group.rank, n - group.rank]).astype(dtype)
        assert group.all_max(x).tolist() == [n - 1, n], f"max of {dtype}"
        assert group.all_min(x).tolist() == [0, 1], f"min of {dtype}"
    assert group.all_max(mx.array([group.rank == 0])).item() is True, "max of bool"
    assert group.all_min(mx.array([group.rank == 0])).item() is False, "min of bool"


def gathers(group):
    rows = all_ranks(group, lambda rank: mx.arange(6).reshape(1, 2, 3) + 10 * rank)
    for axis in (0, 1, 2, -1):
        whole = group.all_gather(rows[group.rank], axis)
        close(whole, mx.concatenate(rows, axis))
    assert group.all_gather(mx.array(group.rank)).tolist() == list(range(group.size)), "scalar"
    assert group.all_gather(mx.array([True])).tolist() == [True] * group.size, "bool"
    assert group.all_gather(mx.zeros((2, 0)), 0).shape == (2 * group.size, 0), "empty"
    refused(lambda: group.all_gather(mx.zeros((2,)), 1), "axis")


def reduce_scatters(group):
    n = group.size
    full = mx.arange(4 * n * n).reshape(2 * n, 2 * n)
    for dtype in (mx.float32, mx.bfloat16, mx.int32):
        for axis in (0, 1, -1):
            part = group.reduce_scatter((full * 0 + 1).astype(dtype) * (group.rank + 1), axis)
            assert part.dtype == dtype, f"{part.dtype}"
            close(part, mx.ones(part.shape) * n * (n + 1) // 2)
            mine = mx.split(full * n, n, axis)[group.rank]
            close(group.reduce_scatter(full.astype(mx.float32), axis), mine)
    refused(lambda: group.reduce_scatter(mx.zeros((n + 1,))), f"divisible by {n}")


def broadcasts(group):
    for root in range(group.size):
        x = mx.array([group.rank, -0.0, math.nan, math.inf])
        out = group.broadcast(x, root).tolist()
        assert out[0] == root and math.copysign(1, out[1]) == -1, f"{out}"
        assert math.isnan(out[2]) and out[3] == math.inf, f"{out}"
        for dtype in FLOATS + INTEGERS + (mx.bool_,):
            y = group.broadcast(mx.array([group.rank, 1, 0]).astype(dtype), root)
            want = mx.array([root, 1, 0]).astype(dtype)
            assert y.dtype == dtype and y.tolist() == want.tolist(), f"{dtype}: {y}"
    assert group.broadcast(mx.array(group.rank), 1).item() == 1, "scalar"
    refused(lambda: group.broadcast(mx.zeros((1,)), group.size), "root")


def messages(group):
    up, down = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    x = mx.arange(5) + group.rank
    refused(lambda: group.send(x, group.rank), "itself")
    refused(lambda: group.recv((1,), mx.int32, group.size), "ranks 0 to")
    if group.capabilities.point_to_point == "none":
        refused(lambda: group.send(x, up), "cannot send")
        return
    if group.rank % 2 == 0 and group.rank + 1 < group.size:
        mx.eval(group.send(x, up))
        close(group.recv_like(x, up), x + 1)
    elif group.rank % 2:
        close(group.recv(x.shape, x.dtype, down), x - 1)
        mx.eval(group.send(x, down))
    far = group.rank + 2
    if group.capabilities.point_to_point == "neighbours" and group.size > 3:
        refused(lambda: group.send(x, far % group.size), "neighbours")


def objects(group):
    mine = {"rank": group.rank, "text": "ä" * (50 * group.rank)}
    gathered = comm.all_gather_object(mine, group)
    assert [one["rank"] for one in gathered] == list(range(group.size)), f"{gathered}"
    assert len(gathered[-1]["text"]) == 50 * (group.size - 1), "length"
    last = group.size - 1
    assert comm.broadcast_object(mine, group, root=last) == gathered[last], "broadcast"
    group.barrier()


def splits(group):
    n = group.size
    parts = group.split(group.rank % 2, key=n - group.rank)
    want = [rank for rank in reversed(range(n)) if rank % 2 == group.rank % 2]
    assert list(parts.members) == want, f"{parts.members} is not {want}"
    assert (parts.rank, parts.size) == (want.index(group.rank), len(want)), f"{parts}"
    assert parts.all_sum(mx.array(group.rank)).item() == sum(want), "sum in a part"
    nested = parts.split(0, key=parts.size - parts.rank)
    assert list(nested.members) == want[::-1], f"nested {nested.members}"
    assert nested.all_gather(mx.array(group.rank)).tolist() == want[::-1], "gather in a part"
    alone = group.split(group.rank)
    assert (alone.size, alone.members) == (1, (group.rank,)), f"{alone}"
    assert group.all_sum(mx.array(1)).item() == n, "the split group no longer sums"
    assert mx.distributed.init().size() == n, "the default group is not the world"
    refused(lambda: group.split(-1), "color")


def copy_and_sum(group):
    n, r = group.size, group.rank
    x, first, second = normal(1, 4, 8), normal(2, 8, 4 * n), normal(3, 4 * n, 8)

    def whole(x, first, second):
        return (mx.tanh(x @ first) @ second).square().sum()

    def split(x, first, second):
        hidden = mx.tanh(comm.copy_to_group(x, group) @ first)
        return comm.sum_over_group(hidden @ second, group).square().sum()

    want = mx.grad(whole, argnums=(0, 1, 2))(x, first, second)
    first, second = mx.split(first, n, 1)[r], mx.split(second, n, 0)[r]
    got = mx.grad(split, argnums=(0, 1, 2))(x, first, second)
    close(got[0], want[0], 1e-4)
    close(got[1], mx.split(want[1], n, 1)[r], 1e-4)
    close(got[2], mx.split(want[2], n, 0)[r], 1e-4)


def gather_and_scatter(group):
    n, r = group.size, group.rank
    for axis in (0, 1, -1):
        x, weight, factor = normal(1, 2 * n, 3 * n), normal(2, 2 * n, 3 * n), normal(3, 2 * n, 3 * n)
        want = mx.grad(lambda x, w: (mx.tanh(x * w) * factor).sum(), argnums=(0, 1))(x, weight)

        def split(x, part):
            mine = comm.scatter_over_group(x, group, axis)
            return (comm.gather_over_group(mx.tanh(mine * part), group, axis) * factor).sum()

        got = mx.grad(split, argnums=(0, 1))(x, mx.split(weight, n, axis)[r])
        close(got[0], want[0])
        close(got[1], mx.split(want[1], n, axis)[r])
    refused(lambda: comm.scatter_over_group(mx.zeros((n + 1,)), group), "divisible")


def shards(group):
    n, r = group.size, group.rank
    data = all_ranks(group, lambda rank: normal(rank, 5, 2 * n))
    for axis in (0, 1):
        weight = normal(9, 2 * n, 4 * n)
        want = mx.grad(lambda w: sum(mx.tanh(x @ w).square().sum() for x in data))(weight)

        def local(shard):
            whole = comm.gather_from_shards(shard, group, axis)
            return mx.tanh(data[r] @ whole).square().sum()

        got = mx.grad(local)(mx.split(weight, n, axis)[r])
        close(got, mx.split(want, n, axis)[r], 1e-4)


def partial_sums(group):
    n, r = group.size, group.rank
    parts = all_ranks(group, lambda rank: normal(rank, 2 * n, 3))
    want = mx.grad(lambda x: mx.tanh(x + sum(parts) - parts[r]).square().sum())(parts[r])

    def local(x):
        return mx.tanh(comm.reduce_scatter_over_group(x, group)).square().sum()

    close(mx.grad(local)(parts[r]), want, 1e-4)


def largest(group):
    n, r = group.size, group.rank
    rows = all_ranks(group, lambda rank: mx.array([rank, -rank, 7.0]))
    factor = mx.array([1.0, 10.0, 100.0])
    got = mx.grad(lambda x: (group.all_max(x) * factor).sum())(rows[r])
    close(got, mx.array([1.0 * (r == n - 1), 10.0 * (r == 0), 100.0 / n]))
    got = mx.grad(lambda x: (group.all_min(x) * factor).sum())(rows[r])
    close(got, mx.array([1.0 * (r == 0), 10.0 * (r == n - 1), 100.0 / n]))


def pipeline(group):
    """send_forward and recv_forward over all ranks as stages, against one process."""
    n, r = group.size, group.rank
    if group.capabilities.point_to_point == "none":
        return
    x, weights = normal(50, 4, 6), [normal(60 + i, 6, 6) for i in range(n)]

    def whole(x, weights):
        for weight in weights:
            x = mx.tanh(x @ weight)
        return x.square().sum()

    want = mx.grad(whole, argnums=(0, 1))(x, weights)

    def stage(x, weight):
        h = x if r == 0 else comm.recv_forward(x, r - 1, group)
        h = mx.tanh(h @ weight)
        return h.square().sum() if r == n - 1 else comm.send_forward(h, r + 1, group).sum()

    given = x if r == 0 else mx.zeros_like(x)
    value, grads = mx.value_and_grad(stage, argnums=(0, 1))(given, weights[r])
    mx.eval(value)  # the forward and its message first, or neither side would start
    mx.eval(grads)
    close(grads[1], want[1][r], 1e-4)
    if r == 0:
        close(grads[0], want[0], 1e-4)


def fusion(group):
    def tree(rank):
        return {
            "layers": [
                {"a": normal(rank, 3, 5), "b": (normal(rank + 1, 7).astype(mx.bfloat16),)},
                {"0": normal(rank + 2, 40), "count": mx.array([rank], dtype=mx.int32)},
            ],
            "top": mx.array(float(rank)),
        }

    for wire, bucket_bytes in ((mx.float32, 64), (mx.bfloat16, 1 << 20), (None, 100), (None, 1)):
        fused = comm.GradientFusion(group, bucket_bytes, wire).all_sum(tree(group.rank))
        rows = all_ranks(group, tree)
        got = {"": fused["top"], "a": fused["layers"][0]["a"], "b": fused["layers"][0]["b"][0]}
        got["0"], got["count"] = fused["layers"][1]["0"], fused["layers"][1]["count"]
        want = {"": [row["top"] for row in rows], "a": [row["layers"][0]["a"] for row in rows]}
        want["b"] = [row["layers"][0]["b"][0] for row in rows]
        want["0"] = [row["layers"][1]["0"] for row in rows]
        want["count"] = [row["layers"][1]["count"] for row in rows]
        for name, value in got.items():
            exact = sum(one.astype(mx.float32) for one in want[name])
            low = name == "b" if wire is None else wire == mx.bfloat16
            close(value, exact, 0.1 if low else 1e-5)
        wide = wire is not None and wire == mx.float32
        assert got["b"].dtype == (mx.float32 if wide else mx.bfloat16), "b dtype"
        assert got["a"].dtype == mx.float32 and got["count"].dtype == mx.int32, "dtypes"


def mismatch(group):
    """Ranks that differ must be named in debug mode instead of getting wrong values."""
    group._debug = True
    try:
        close(group.all_sum(mx.ones((3,))), mx.ones((3,)) * group.size)
        x = mx.ones((3,) if group.rank != 1 else (4,))
        try:
            group.all_sum(x)
        except RuntimeError as error:
            text = str(error)
            assert f"rank {group.members[1]} is at" in text or group.size == 2, text
            assert "all_sum (3,) float32" in text and "all_sum (4,) float32" in text, text
        else:
            raise AssertionError("different shapes went through")
        try:
            group.all_max(x) if group.rank == 0 else group.all_gather(x)
        except RuntimeError as error:
            assert "all_max" in str(error) and "all_gather" in str(error), f"{error}"
        else:
            raise AssertionError("different operations went through")
    finally:
        group._debug = False


def one_round(group, i: int) -> list[mx.array]:
    n, x = group.size, mx.full((i % 7 + 1, group.size), float(group.rank + i))
    return [
        group.all_sum(x), group.all_max(x), group.all_min(x), group.all_gather(x[:1]),
        group.reduce_scatter(x, 1), group.broadcast(x, i % n),
    ]  # fmt: skip


def rounds(group, num_rounds: int):
    """All collectives, many times: one at a time in every third graph, else 30 rounds at once."""
    n = group.size
    for first in range(0, num_rounds, BATCH):
        graph = [one_round(group, i) for i in range(first, min(first + BATCH, num_rounds))]
        if first % 90:
            mx.eval(graph)
        for i, out in enumerate(graph, start=first):
            total = n * i + n * (n - 1) / 2
            got = [one[-1, 0].item() for one in out]
            want = [total, i + n - 1, i, i + n - 1, total, i % n + i]
            assert got == want, f"round {i}: {got} is not {want}"


CHECKS = (
    sums, extremes, gathers, reduce_scatters, broadcasts, messages, objects, copy_and_sum,
    gather_and_scatter, shards, partial_sums, largest, pipeline, fusion, mismatch, rounds, splits,
)  # fmt: skip
