"""Prepared models compute what mlx-lm's own code computes, values and gradients, and generate with mlx-lm's
code.
"""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gated_delta, gemma3_text

from tiny import CONFIGS, make
from trainer.layers import prepare
from trainer.layers.causal_conv import causal_conv
from trainer.layers.elementwise import exp, precise_swiglu, silu, swiglu
from trainer.layers.segments import StateSegments
from trainer.model.method import prepare_for_training


def loss_and_grads(model, tokens, cache=None, mask=None):
    """Sum of next-token losses and all gradients by name."""

    def loss(model):
        logits = model(tokens) if cache is None else model(tokens, cache=cache)
        losses = nn.losses.cross_entropy(logits[:, :-1], tokens[:, 1:])
        return losses.sum() if mask is None else (losses * mask[:, 1:]).sum()

    value, grads = nn.value_and_grad(model, loss)(model)
    mx.eval(value, grads)
    return value.item(), dict(tree_flatten(grads))


def assert_same(got, want, tolerance):
    assert abs(got[0] / want[0] - 1) < tolerance
    assert got[1].keys() == want[1].keys()
    for name, expected in want[1].items():
        norm = lambda x: mx.linalg.norm(x.reshape(-1)).item()
        error = norm(got[1][name] - expected) / max(norm(expected), 1e-3)
        assert error < tolerance, f"gradient of {name} is off by {error:.1e}"


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_mlx_lm(name):
    """Catches a replaced function with another meaning: loss and every gradient, sliding windows included, in full
    training.
    """
    tokens = mx.random.randint(0, 64, (2, 40), key=mx.random.key(0))
    want = loss_and_grads(make(name), tokens)
    # The gradient of Kimi's A_log is a sum that all but cancels, in mlx-lm as here.
    tolerance = 2e-5 if name == "kimi_linear" else 1e-5
    assert_same(loss_and_grads(prepare_for_training(make(name)), tokens), want, tolerance)


def test_names_and_classes_stay():
    """Catches a preparation that renames weights, hides a class from isinstance, or touches another model of the
    class.
    """
    model, other = make("qwen3_5"), make("qwen3_5")
    names, classes = [n for n, _ in tree_flatten(model.parameters())], [type(m) for m in model.modules()]
    prepare_for_training(model)
    assert [n for n, _ in tree_flatten(model.parameters())] == names
    assert all(isinstance(m, c) and type(m).__name__ == c.__name__ for m, c in zip(model.modules(), classes))
    assert [type(m) for m in other.modules()] == classes


def test_generation_runs_mlx_lm_code(monkeypatch):
    """Catches our functions in generation: with one of mlx-lm's caches and in eval mode none of them runs."""
    model = prepare_for_training(make("qwen3_5"))
    model.eval()
    tokens = mx.random.randint(0, 64, (1, 12))
    expected = model(tokens)

    def fail(*args, **kwargs):
        raise AssertionError("a training function ran in generation")

    for name in ("blockwise_attention", "gated_delta_update", "causal_conv"):
        monkeypatch.setattr(prepare, name, fail)
    cache = model.make_cache()
    got = mx.concatenate([model(tokens[:, :7], cache=cache), model(tokens[:, 7:], cache=cache)], axis=1)
    assert mx.abs(got - expected).max().item() < 1e-4


def test_no_loop_over_tokens(monkeypatch):
    """Catches a layer that still trains with mlx-lm's loop over tokens, with and without segments."""
    monkeypatch.setattr(gated_delta, "gated_delta_ops", None)
    tokens = mx.random.randint(0, 64, (2, 40))
    for name in ("qwen3_5", "qwen3_next", "kimi_linear"):
        mx.eval(prepare_for_training(make(name))(tokens))


def test_windows_are_told_in_words(monkeypatch):
    """Catches sliding-window layers that get a T x T array as their mask."""
    monkeypatch.setattr(gemma3_text, "create_causal_mask", None, raising=False)
    masks = []
    noting = lambda q, k, v, **options: masks.append(options["window"]) or q
    monkeypatch.setattr(prepare, "blockwise_attention", noting)
    prepare_for_training(make("gemma3_text"))(mx.random.randint(0, 64, (1, 40)))
    assert masks == [16, None]


@pytest.mark.parametrize("fn", ["silu", "swiglu"])
def test_activations(fn):
    """Catches a wrong derivative, and overflow at either end."""
    x, y = mx.concatenate([mx.random.normal((200,)) * 4, mx.array([-200.0, 0.0, 200.0])]), mx.random.normal((203,))
    pairs = {
        "silu": (lambda x, y: silu(x), lambda x, y: nn.silu(x)),
        "swiglu": (swiglu, lambda x, y: nn.silu(x) * y),
    }
    ours, theirs = pairs[fn]
    got = mx.value_and_grad(lambda x, y: (ours(x, y) * mx.cos(x)).sum(), argnums=(0, 1))(x, y)
    want = mx.value_and_grad(lambda x, y: (theirs(x, y) * mx.cos(x)).sum(), argnums=(0, 1))(x, y)
    assert abs(got[0].item() - want[0].item()) < 1e-4
    for a, b in zip(got[1], want[1]):
        assert mx.abs(a - b).max().item() < 2e-5


def test_precise_swiglu_keeps_dtype():
    """Catches a half-precision product where mlx-lm computes in float32."""
    x = mx.random.normal((3, 8)).astype(mx.bfloat16)
    assert precise_swiglu(x, x, x).dtype == mx.bfloat16


def test_exp_is_exact():
    """Catches an exponential that is fast but coarse."""
    x = mx.linspace(-80, 80, 2001)
    assert mx.abs(exp(x) / mx.exp(x) - 1).max().item() < 5e-6


@pytest.mark.parametrize("segments", [None, [[1] * 7 + [2] * 2 + [3] * 11, [1] * 19 + [0]]])
def test_causal_conv(segments):
    """Catches wrong taps, taps across documents, and wrong gradients of input and weight."""
    segments = None if segments is None else mx.array(segments)
    x, weight, bias = mx.random.normal((2, 23, 5)), mx.random.normal((5, 4, 1)), mx.random.normal((5,))

    def reference(x, weight):
        if segments is None:
            return mx.conv1d(x, weight, groups=5)
        before = mx.concatenate([mx.repeat(segments[:, :1], 3, 1), segments], axis=1)
        outputs = []
        for t in range(20):
            seen = mx.where((before[:, t : t + 4] == segments[:, t : t + 1])[..., None], x[:, t : t + 4], 0)
            outputs.append(mx.conv1d(seen, weight, groups=5))
        return mx.concatenate(outputs, axis=1)

    ours = lambda x, weight: causal_conv(x, weight, bias, segments) - bias
    for fn in (lambda f: f(x, weight), lambda f: mx.grad(lambda *a: (f(*a) ** 2).sum(), argnums=0)(x, weight)):
        assert mx.abs(fn(ours) - fn(reference)).max().item() < 1e-4
    grad = lambda f: mx.grad(lambda *a: (f(*a) ** 2).sum(), argnums=1)(x, weight)
    assert mx.abs(grad(ours) - grad(reference)).max().item() < 1e-4


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_causal_conv_of_few_tokens(num_tokens):
    """Catches rows shorter than the convolution's reach, whose taps all lie before them."""
    x, weight = mx.random.normal((2, num_tokens + 3, 5)), mx.random.normal((5, 4, 1))
    y = causal_conv(x, weight, segments=mx.ones((2, num_tokens), dtype=mx.int32))
    assert mx.abs(y - mx.conv1d(x, weight, groups=5)).max().item() < 1e-5


def test_kimi_segments_reach_nested_convolutions():
    """Catches convolutions inside a layer's parts that look across documents: Kimi's KDA layer, packed and
    alone.
    """
    layer = prepare_for_training(make("kimi_linear")).layers[0].self_attn
    x = mx.random.normal((1, 30, 32))
    packed = layer(x, None, StateSegments(mx.array([[1] * 11 + [2] * 19])))
    assert mx.abs(packed[:, 11:] - layer(x[:, 11:])).max().item() < 1e-5


@pytest.mark.parametrize(
    ("dtype", "length", "dims", "is_fused"),
    [(mx.bfloat16, 256, 64, True), (mx.float32, 256, 64, False), (mx.bfloat16, 200, 64, False), (mx.float16, 128, 192, False)],
)
def test_attention_on_cuda(monkeypatch, dtype, length, dims, is_fused):
    """Catches MLX's own attention where CUDA has no fused backward pass for it, and holds all scores."""
    fused = []
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", lambda q, *rest, **options: fused.append(1) or q)
    x = mx.zeros((1, 2, length, dims), dtype=dtype)
    prepare.attention(x, x, x, None, 1.0, "causal")
    assert bool(fused) == is_fused
