"""Blockwise attention against softmax over a full score matrix: values, gradients, and memory."""

import mlx.core as mx
import numpy as np
import pytest

from trainer.layers.attention import blockwise_attention


def reference(queries, keys, values, *, scale, window=None, segments=None):
    """Softmax over the whole score matrix."""
    B, H, T, D = queries.shape
    repeats = H // keys.shape[1]
    keys, values = mx.repeat(keys, repeats, 1), mx.repeat(values, repeats, 1)
    scores = scale * (queries @ keys.swapaxes(-1, -2))
    distance = mx.arange(T)[:, None] - mx.arange(T)
    visible = (distance >= 0) & (distance < (window or T))
    if segments is not None:
        visible = visible & (segments[:, None, :, None] == segments[:, None, None, :])
    return mx.softmax(mx.where(visible, scores, -mx.inf), axis=-1) @ values


def arrays(B, H, G, T, D, Dv, dtype=mx.float32):
    mx.random.seed(0)
    shapes = [(B, H, T, D), (B, G, T, D), (B, G, T, Dv), (B, H, T, Dv)]
    return [(2 * mx.random.normal(shape)).astype(dtype) for shape in shapes]


def gradients(fn, q, k, v, weight, **options):
    def scalar(*x):
        return (fn(*x, scale=0.3, **options).astype(mx.float32) * weight).sum()

    return mx.value_and_grad(scalar, argnums=(0, 1, 2))(q, k, v)


def assert_equal(data, tolerance=1e-5, **options):
    blockwise_only = {name: options.pop(name) for name in ("block_size", "keep") if name in options}
    value, grads = gradients(blockwise_attention, *data, **options, **blockwise_only)
    expected, expected_grads = gradients(reference, *[x.astype(mx.float32) for x in data], **options)
    assert abs(value.item() - expected.item()) < tolerance * max(abs(expected.item()), 100)
    for name, got, want in zip("qkv", grads, expected_grads):
        assert got.dtype == data[0].dtype
        error = mx.abs(got.astype(mx.float32) - want).max().item() / max(mx.abs(want).max().item(), 1.0)
        assert error < tolerance, f"gradient of {name} is off by {error:.1e}"


@pytest.mark.parametrize("keep", [False, True], ids=["recompute", "keep"])
@pytest.mark.parametrize("T", [1, 16, 50])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)], ids=["equal", "grouped"])
def test_causal(keep, T, heads):
    """Catches a wrong block border, a wrong last block, and key gradients that miss a query head."""
    assert_equal(arrays(2, *heads, T, 8, 12), block_size=16, keep=keep)


@pytest.mark.parametrize("keep", [False, True], ids=["recompute", "keep"])
@pytest.mark.parametrize("window", [1, 7, 16, 33, 64])
def test_sliding_window(keep, window):
    """Catches windows that see one key too many or too few, or skip a block they need."""
    assert_equal(arrays(1, 4, 2, 64, 8, 8), window=window, block_size=16, keep=keep)


@pytest.mark.parametrize("keep", [False, True], ids=["recompute", "keep"])
@pytest.mark.parametrize("window", [None, 9])
def test_segments(keep, window):
    """Catches documents that see their neighbours, in rows with different borders."""
    segments = mx.array([[1] * 20 + [2] * 13 + [3] * 17, [1] * 41 + [0] * 9])
    assert_equal(arrays(2, 4, 2, 50, 8, 8), segments=segments, window=window, block_size=16, keep=keep)


def test_starts_skip_keys():
    """Catches skipped keys that a later row's document still needs."""
    segments = mx.array([[1] * 20 + [2] * 13 + [3] * 17, [1] * 25 + [2] * 25])
    starts = np.array([0] * 25 + [20] * 8 + [25] * 17)
    data = arrays(2, 4, 2, 50, 8, 8)[:3]
    skipping = blockwise_attention(*data, scale=0.3, segments=segments, starts=starts, block_size=16)
    assert mx.abs(skipping - reference(*data, scale=0.3, segments=segments)).max().item() < 1e-5


def test_large_scores():
    """Catches an exponential taken before the largest score is subtracted."""
    q, k, v, weight = arrays(1, 2, 2, 40, 8, 8)
    assert_equal([q * 20, k * 20, v, weight], block_size=16, tolerance=5e-5)


@pytest.mark.parametrize("keep", [False, True], ids=["recompute", "keep"])
def test_bfloat16(keep):
    """Catches results in another dtype, and a softmax in half precision."""
    assert_equal(arrays(1, 4, 2, 64, 8, 8, mx.bfloat16), tolerance=3e-2, block_size=16, keep=keep)


def test_memory_is_linear():
    """Catches scores of all blocks alive at once: four times the tokens may take five times the memory, not
    sixteen.
    """

    def peak(T):
        data = arrays(1, 2, 2, T, 16, 16)
        mx.eval(data)
        start = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(gradients(blockwise_attention, *data, block_size=64, keep=False))
        return mx.get_peak_memory() - start

    assert peak(4096) < 5 * peak(1024)
