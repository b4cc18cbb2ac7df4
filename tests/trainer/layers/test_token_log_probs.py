"""Log-probabilities of given tokens against log softmax: values and every gradient, for every kind of head."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from test_linear_cross_entropy import HEADS, B, D, L, V

from parallel.lm_head import Head
from trainer.layers import head_chunks
from trainer.layers.linear_cross_entropy import linear_cross_entropy
from trainer.layers.token_log_probs import token_log_probs

FROZEN = ("linear", "bias", "tied", "quantized", "scale and softcap")


def inputs(k):
    """States, ids (with a duplicate where there is room for one) and cotangents, every third of them 0."""
    mx.random.seed(1)
    hidden = mx.random.normal((B, L, D))
    ids = mx.random.randint(0, V, (B, L, k) if k else (B, L))
    if k > 1:
        ids[..., 1] = ids[..., 0]
    cotangent = mx.random.normal(ids.shape) * (mx.arange(ids.size).reshape(ids.shape) % 3 > 0)
    return hidden, ids, cotangent


def plain(hidden, head, ids, mask=None):
    logits = head(hidden).astype(mx.float32)
    chosen = ids if ids.ndim == 3 else ids[..., None]
    values = mx.take_along_axis(logits - mx.logsumexp(logits, axis=-1, keepdims=True), chosen, axis=-1)
    values = values if mask is None else mx.where(mask[..., None], values, 0.0)
    return values.reshape(ids.shape)


def values_and_grads(fn, head, hidden, ids, cotangent, mask=None):
    original = head.module.trainable_parameters()

    def scalar(parameters, hidden):
        head.module.update(parameters)
        values = fn(hidden, head, ids, mask)
        return (values * cotangent).sum(), values

    (_, values), (grads, d_hidden) = mx.value_and_grad(scalar, argnums=(0, 1))(original, hidden)
    head.module.update(original)
    mx.eval(values, grads, d_hidden)
    return values, {**dict(tree_flatten(grads)), "hidden": d_hidden}


def assert_close(found, expected):
    (values, grads), (right, wanted) = found, expected
    assert values.dtype == mx.float32
    assert mx.abs(values - right).max().item() <= 1e-5 * mx.abs(right).max().item()
    assert grads.keys() == wanted.keys()
    for name, want in wanted.items():
        assert mx.abs(grads[name] - want).max().item() <= 1e-5 * mx.abs(want).max().item(), name


@pytest.mark.parametrize("k", [0, 1, 5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [*HEADS, *(f"{name}, frozen" for name in FROZEN)])
def test_equals_log_softmax(kind, masked, k):
    """Catches a cotangent that is dropped or shared, a duplicate that counts once, and rows that change their place."""
    head = HEADS[kind.removesuffix(", frozen")]()
    if kind.endswith("frozen"):
        head.module.freeze()
    hidden, ids, cotangent = inputs(k)
    mask = mx.random.uniform(shape=(B, L)) < 0.3 if masked else None
    found = values_and_grads(token_log_probs, head, hidden, ids, cotangent, mask)
    assert_close(found, values_and_grads(plain, head, hidden, ids, cotangent, mask))


@pytest.mark.parametrize("chunk", [64, 100, 699, 700, 701])
@pytest.mark.parametrize("frozen", [False, True])
def test_any_border_of_chunks(monkeypatch, chunk, frozen):
    """Catches a last chunk that is short, or a row that is left out between two."""
    monkeypatch.setattr("trainer.layers.token_log_probs.chunk_rows", lambda vocabulary: chunk)
    head = HEADS["bias"]()
    if frozen:
        head.module.freeze()
    hidden, ids, cotangent = inputs(0)
    found = values_and_grads(token_log_probs, head, hidden, ids, cotangent)
    assert_close(found, values_and_grads(plain, head, hidden, ids, cotangent))


def test_the_sum_is_the_cross_entropy():
    """Catches two heads that differ."""
    hidden, ids, _ = inputs(0)
    head, mask = HEADS["linear"](), mx.random.uniform(shape=(B, L)) < 0.5
    loss, _ = linear_cross_entropy(hidden, head, ids, mask)
    assert token_log_probs(hidden, head, ids, mask).sum().item() == pytest.approx(-loss.item(), rel=1e-6)
    without = token_log_probs(hidden, head, ids, mask, with_gradients=False)
    assert without.sum().item() == pytest.approx(-loss.item(), rel=1e-6)


def test_no_token_counts():
    """Catches an empty batch that fails."""
    hidden, ids, _ = inputs(0)
    values = token_log_probs(hidden, HEADS["linear"](), ids, mx.zeros((B, L), dtype=mx.bool_))
    assert values.shape == ids.shape and mx.abs(values).max().item() == 0


@pytest.mark.parametrize("k", [0, 4])
@pytest.mark.parametrize("frozen", [False, True])
def test_memory_stays_at_a_few_chunks(monkeypatch, frozen, k):
    """Catches chunks that are all alive at once, in either pass."""
    monkeypatch.setattr(head_chunks, "CPU_LOGITS", 64 * 8192)
    monkeypatch.setattr(head_chunks, "MIN_ROWS", 64)
    mx.random.seed(0)
    head = Head(nn.Embedding(8192, 16), tied=True)
    if frozen:
        head.module.freeze()
    hidden = mx.random.normal((1, 2048, 16))
    ids = mx.random.randint(0, 8192, (1, 2048, k) if k else (1, 2048))
    cotangent = mx.random.normal(ids.shape)
    mx.eval(hidden, ids, cotangent, head.module.parameters())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    values_and_grads(token_log_probs, head, hidden, ids, cotangent)
    used = mx.get_peak_memory() - before
    assert used < 10 * 64 * 8192 * 4, f"{used / 2**20:.0f} MiB"
