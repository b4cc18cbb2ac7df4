"""The bucket plan and the choice of its size, without processes."""

import mlx.core as mx
import pytest

import comm
from comm.fusion import plan_buckets
from comm.link import LARGEST_BUCKET_BYTES, SMALLEST_BUCKET_BYTES, LinkFit, fit_link


def test_buckets_run_from_the_last_array_to_the_first() -> None:
    """Catches the first layers' buckets leaving first, which would end the overlap."""
    assert plan_buckets([4, 4, 4, 4, 4], ["f"] * 5, 8) == [[3, 4], [1, 2], [0]]


def test_every_dtype_fills_its_own_bucket() -> None:
    """Catches mixed dtypes breaking the buckets up into single arrays."""
    plan = plan_buckets([4] * 6, ["f", "b", "f", "b", "f", "b"], 100)
    assert plan == [[1, 3, 5], [0, 2, 4]]


def test_a_large_array_travels_alone_and_nothing_is_lost() -> None:
    """Catches arrays that are dropped, sent twice or joined beyond the limit."""
    sizes = [1, 50, 2, 3, 9, 9, 1]
    plan = plan_buckets(sizes, ["f"] * 7, 10)
    assert sorted(i for bucket in plan for i in bucket) == list(range(7))
    assert all(len(bucket) == 1 or sum(sizes[i] for i in bucket) <= 10 for bucket in plan)
    assert [1] in plan


def test_the_fit_finds_the_line() -> None:
    """Catches a fit that swaps or loses latency and bandwidth."""
    sizes = [1_000, 100_000, 10_000_000]
    fit = fit_link(sizes, [1e-3 + 1e-9 * size for size in sizes])
    assert fit.latency_seconds == pytest.approx(1e-3) and fit.seconds_per_byte == pytest.approx(1e-9)
    flat = fit_link(sizes, [1e-9 * size * 0.9 for size in sizes])
    assert flat.latency_seconds >= 0 and flat.seconds_per_byte > 0


def test_bucket_size_balances_latency_against_the_last_bucket() -> None:
    """Catches a size that is not at the minimum of the modelled cost, or out of bounds."""
    fit, total, alone = LinkFit(2e-3, 1e-9), 1 << 30, 4e-10
    best = fit.bucket_bytes(total, alone)

    def cost(size: float) -> float:
        return fit.latency_seconds * total / size + size * alone

    assert SMALLEST_BUCKET_BYTES < best < LARGEST_BUCKET_BYTES
    assert cost(best) <= min(cost(best * 1.1), cost(best * 0.9))
    assert LinkFit(1e-9, 1e-9).bucket_bytes(1000, 1e-9) == SMALLEST_BUCKET_BYTES
    assert LinkFit(0.0, 0.0).bucket_bytes(1000, 0.0) == LARGEST_BUCKET_BYTES


@pytest.mark.parametrize(("total_mib", "num_messages"), [(78, 1), (150, 2), (1000, 13)])
def test_no_small_message_is_left_over(total_mib: int, num_messages: int) -> None:
    """Catches a last message of a few bytes, which costs a whole latency."""
    total = total_mib << 20
    fit = LinkFit((75 << 20) ** 2 * 1e-10 / total, 1e-9)  # the minimum is at 75 MiB
    sizes = [total // 400] * 400
    plan = plan_buckets(sizes, ["f"] * 400, fit.bucket_bytes(total, 1e-10))
    assert len(plan) == num_messages


@pytest.mark.parametrize("options", [{"bucket_bytes": 0}, {"wire_dtype": mx.int32}])
def test_wrong_options_are_refused(options: dict) -> None:
    """Catches a bucket size or wire dtype that would corrupt or hang the reduction."""
    with pytest.raises(ValueError):
        comm.GradientFusion(comm.solo(), **options)


def test_one_rank_gives_the_same_dtypes_as_many() -> None:
    """Catches results whose dtype depends on the number of ranks."""
    tree = {"a": [mx.ones((2,), dtype=mx.bfloat16)], "n": (mx.array([1]),)}
    out = comm.GradientFusion(comm.solo()).all_sum(tree)
    assert out["a"][0].dtype == mx.float32 and out["n"][0].dtype == mx.int32
    same = comm.GradientFusion(comm.solo(), wire_dtype=None).all_sum(tree)
    assert same["a"][0].dtype == mx.bfloat16
