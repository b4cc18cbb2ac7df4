"""Documents packed into one row give the losses and gradients they give alone, for every architecture that allows
packing.
"""

import mlx.core as mx
import mlx.nn as nn
import pytest
from test_prepare import assert_same, loss_and_grads

from tiny import CONFIGS, make
from trainer.layers.segments import segment_caches
from trainer.model.architectures import ARCHITECTURES, packing_supported
from trainer.model.method import prepare_for_training

PACKED = [name for name in CONFIGS if name in ARCHITECTURES and ARCHITECTURES[name].packs]


def test_every_row_that_packs_is_tried():
    """Catches a row of the table without its parity test; a text-only twin is what its family's model holds."""
    assert set(PACKED) == {name for name, row in ARCHITECTURES.items() if row.packs and not row.opened_as}


def documents(lengths):
    mx.random.seed(3)
    return [mx.random.randint(0, 64, (1, n)) for n in lengths]


def pack(docs, length):
    """One row of ``length`` tokens: tokens, segments, and a mask without first tokens and padding."""
    sizes = [doc.shape[1] for doc in docs]
    padding = length - sum(sizes)
    tokens = mx.concatenate([*docs, mx.zeros((1, padding), docs[0].dtype)], axis=1)
    segments = [n for i, size in enumerate(sizes) for n in [i + 1] * size] + [0] * padding
    mask = [t > 0 for size in sizes for t in range(size)] + [False] * padding
    return tokens, mx.array([segments]), mx.array([mask])


def separately(model, docs):
    """Sum of the losses and gradients of each document alone."""
    losses, grads = zip(*[loss_and_grads(model, doc) for doc in docs])
    return sum(losses), {name: sum(g[name] for g in grads) for name in grads[0]}, losses


def packed_losses(model, docs, length):
    tokens, segments, mask = pack(docs, length)
    logits = model(tokens, cache=model.segment_cache(segments))
    losses = nn.losses.cross_entropy(logits[:, :-1], tokens[:, 1:]) * mask[:, 1:]
    return [mx.where(segments[:, 1:] == i + 1, losses, 0).sum().item() for i in range(len(docs))]


@pytest.mark.parametrize("name", PACKED)
def test_equals_separate_documents(name):
    """Catches any leak between documents: each document's loss and all gradients, rows of 512, mlx-lm's own code as
    the reference.
    """
    docs = documents([37, 3, 130, 64, 2, 200])
    tokens, segments, mask = pack(docs, 512)
    loss, grads, losses = separately(make(name), docs)
    model = prepare_for_training(make(name))
    got = loss_and_grads(model, tokens, cache=model.segment_cache(segments), mask=mask)
    assert_same(got, (loss, grads), 1e-5)
    for document, (a, b) in enumerate(zip(packed_losses(model, docs, 512), losses)):
        assert abs(a - b) <= 1e-5 * max(b, 1.0), f"document {document}"


@pytest.mark.parametrize("name", ["llama", "qwen3_5"])
def test_long_rows(name):
    """Catches positions that do not restart with each document (their rounding grows with the row): 2048 tokens,
    within 1e-5.
    """
    docs = documents([700, 500, 848])
    tokens, segments, mask = pack(docs, 2048)
    model = prepare_for_training(make(name))
    loss, grads, _ = separately(model, docs)
    assert_same(loss_and_grads(model, tokens, cache=model.segment_cache(segments), mask=mask), (loss, grads), 1e-5)


def test_unproven_architecture_refuses():
    """Catches packing of an architecture nobody has checked, and of a RoPE that depends on the row's length."""
    assert "kimi_linear" in packing_supported(make("kimi_linear"))
    assert packing_supported(make("llama")) is None
    dynamic = make("llama", rope_scaling={"type": "dynamic", "factor": 2.0})
    assert "RoPE" in packing_supported(dynamic)


def test_keys_before_every_document_are_skipped():
    """Catches a start that cuts a document in one of the rows, and one that skips nothing."""
    layers = make("llama").layers
    segments = mx.array([[1] * 100 + [2] * 412, [1] * 129 + [2] * 129 + [0] * 254])
    starts = segment_caches(layers, segments)[0].starts
    assert [int(starts[t]) for t in (0, 99, 100, 128, 129, 257, 258, 511)] == [0, 0, 0, 0, 64, 64, 64, 64]
    assert int(segment_caches(layers, segments[1:])[0].starts[511]) == 256


def test_windows_and_starts_together():
    """Catches a window that is lost in packed rows."""
    segments = mx.array([[1] * 100 + [2] * 412])
    cache = segment_caches(make("llama").layers, segments)[0]
    assert cache.make_mask(512, window_size=128).window == 128
    assert cache.make_mask(512).window is None
    assert cache.make_mask(512).starts is cache.starts
