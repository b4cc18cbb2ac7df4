"""The chunked loss against the plain one: value, and every gradient, for every kind of head."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

from parallel.lm_head import Head
from trainer.layers import head_chunks
from trainer.layers.linear_cross_entropy import linear_cross_entropy

B, L, D, V = 2, 350, 64, 96


def lora(base):
    """A LoRA layer whose second factor is not zero, around a frozen base."""
    base.freeze()
    layer = (LoRAEmbedding if isinstance(base, nn.Embedding) else LoRALinear).from_base(base, r=4, scale=2.0)
    layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.1
    return layer


HEADS = {
    "linear": lambda: Head(nn.Linear(D, V, bias=False)),
    "bias": lambda: Head(nn.Linear(D, V)),
    "tied": lambda: Head(nn.Embedding(V, D), tied=True),
    "scale and softcap": lambda: Head(nn.Linear(D, V, bias=False), scale=3.0, softcap=2.0),
    "quantized": lambda: Head(nn.QuantizedLinear(D, V, bias=False)),
    "lora": lambda: Head(lora(nn.Linear(D, V, bias=False))),
    "quantized lora": lambda: Head(lora(nn.QuantizedLinear(D, V, bias=False))),
    "tied lora": lambda: Head(lora(nn.Embedding(V, D)), tied=True),
}


def batch(share=0.4):
    mx.random.seed(1)
    hidden = mx.random.normal((B, L, D))
    return hidden, mx.random.randint(0, V, (B, L)), mx.random.uniform(shape=(B, L)) < share


def plain(hidden, head, targets, mask):
    losses = nn.losses.cross_entropy(head(hidden).astype(mx.float32), targets)
    return (losses * mask).sum(), mask.sum()


def loss_and_grads(fn, head, hidden, targets, mask):
    """Loss and gradients of half the loss (so that a dropped cotangent shows) for hidden states and trainable
    arrays.
    """
    names = [name for name, _ in tree_flatten(head.module.trainable_parameters())]

    def scalar(parameters, hidden):
        head.module.update(parameters)
        return 0.5 * fn(hidden, head, targets, mask)[0]

    original = head.module.trainable_parameters()
    loss, (grads, d_hidden) = mx.value_and_grad(scalar, argnums=(0, 1))(original, hidden)
    head.module.update(original)
    mx.eval(loss, grads, d_hidden)
    return loss, dict(zip(names, [x for _, x in tree_flatten(grads)]), hidden=d_hidden)


@pytest.mark.parametrize("kind", HEADS)
def test_equals_plain(kind):
    """Catches a wrong gradient of any head's arrays or of the hidden states; 1e-6 of each tensor's largest
    entry.
    """
    head = HEADS[kind]()
    loss, grads = loss_and_grads(linear_cross_entropy, head, *batch())
    expected, expected_grads = loss_and_grads(plain, head, *batch())
    assert abs(loss.item() / expected.item() - 1) < 1e-6
    assert grads.keys() == expected_grads.keys()
    for name, want in expected_grads.items():
        assert (mx.abs(grads[name] - want).max() / mx.abs(want).max()).item() < 1e-6, name


@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_any_share_of_targets(share):
    """Catches an empty batch that fails or divides by zero, and one where no row is dropped."""
    head = HEADS["linear"]()
    hidden, targets, mask = batch(share)
    loss, num_tokens = linear_cross_entropy(hidden, head, targets, mask)
    expected, _ = plain(hidden, head, targets, mask)
    assert num_tokens.item() == mask.sum().item()
    assert abs(loss.item() - expected.item()) <= 1e-6 * expected.item()


def test_masked_rows_never_reach_the_head():
    """Catches logits made for tokens that do not count."""
    rows = []

    class Counting(nn.Linear):
        def __call__(self, x):
            rows.append(x.shape[0])
            return super().__call__(x)

    hidden, targets, mask = batch(share=0.1)
    linear_cross_entropy(hidden, Head(Counting(D, V)), targets, mask)
    assert sum(rows[1:]) <= mask.sum().item() + 64


def test_extreme_logits():
    """Catches an exponential taken without subtracting the largest logit."""
    hidden, targets, mask = batch()
    head = HEADS["linear"]()
    loss, grads = loss_and_grads(linear_cross_entropy, head, hidden * 1e3, targets, mask)
    expected, expected_grads = loss_and_grads(plain, head, hidden * 1e3, targets, mask)
    assert abs(loss.item() / expected.item() - 1) < 1e-6
    assert mx.abs(grads["hidden"] - expected_grads["hidden"]).max().item() < 1e-5


def test_memory_stays_at_one_chunk(monkeypatch):
    """Catches chunks that are all alive at once: with 32 times the rows of a chunk, the peak is a few chunks'
    logits.
    """
    monkeypatch.setattr(head_chunks, "CPU_LOGITS", 64 * 8192)
    monkeypatch.setattr(head_chunks, "MIN_ROWS", 64)
    mx.random.seed(0)
    head = Head(nn.Embedding(8192, 16), tied=True)
    head.module.freeze()
    hidden, targets = mx.random.normal((1, 2048, 16)), mx.random.randint(0, 8192, (1, 2048))
    step = mx.value_and_grad(lambda x: linear_cross_entropy(x, head, targets, mx.ones((1, 2048), mx.bool_))[0])
    mx.eval(hidden, targets, head.module.parameters())
    mx.reset_peak_memory()
    mx.eval(step(hidden))
    used = mx.get_peak_memory() - mx.get_active_memory()
    assert used < 10 * 64 * 8192 * 4, f"{used / 2**20:.0f} MiB"


def test_without_gradients():
    """Catches an evaluation path with another loss."""
    hidden, targets, mask = batch()
    head = HEADS["scale and softcap"]()
    loss, _ = linear_cross_entropy(hidden, head, targets, mask, with_gradients=False)
    assert abs(loss.item() / plain(hidden, head, targets, mask)[0].item() - 1) < 1e-6


def test_bfloat16_accumulates_in_float32():
    """Catches sums of bfloat16 gradients over chunks: the head's gradient is as good as that of one product."""
    hidden, targets, mask = batch(share=1.0)
    head = HEADS["linear"]()
    _, expected = loss_and_grads(plain, head, hidden, targets, mask)
    head.module.set_dtype(mx.bfloat16)
    _, grads = loss_and_grads(linear_cross_entropy, head, hidden.astype(mx.bfloat16), targets, mask)
    assert grads["weight"].dtype == mx.bfloat16
    assert (mx.abs(grads["weight"] - expected["weight"]).max() / mx.abs(expected["weight"]).max()).item() < 2e-2
