"""LoRA layers in one function against mlx-lm's own, and layers under gradient checkpointing against plain ones."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear
from test_prepare import assert_same, loss_and_grads

from tiny import make
from trainer.layers.checkpointing import checkpoint_layers
from trainer.layers.lora_matmul import lora_matmul, use_fast_lora
from trainer.model.lora import DropoutKeys, LoRASpec, attach, find_targets
from trainer.model.method import prepare_for_training

BASES = {
    "linear": lambda: nn.Linear(64, 48, bias=False),
    "bias": lambda: nn.Linear(64, 48),
    "quantized": lambda: nn.QuantizedLinear(64, 48, bias=False),
    "bfloat16": lambda: half(nn.Linear(64, 48, bias=False)),
}


def half(module):
    module.set_dtype(mx.bfloat16)
    return module


def layer_and_input(kind, frozen=True):
    mx.random.seed(0)
    base = BASES[kind]()
    layer = LoRALinear.from_base(base, r=4, scale=2.0)
    layer.lora_b = mx.random.normal(layer.lora_b.shape)
    if frozen:
        base.freeze()
    dtype = mx.bfloat16 if kind == "bfloat16" else mx.float32
    return layer, mx.random.normal((2, 7, 64)).astype(dtype)


def value_and_grads(layer, x):
    def scalar(parameters, x):
        layer.update(parameters)
        return (layer(x).astype(mx.float32) * mx.cos(mx.arange(48))).sum()

    parameters = layer.trainable_parameters()
    value, (grads, dx) = mx.value_and_grad(scalar, argnums=(0, 1))(parameters, x)
    layer.update(parameters)
    return value.item(), {**dict(tree_flatten(grads)), "x": dx}


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("kind", BASES)
def test_equals_mlx_lm(kind, frozen):
    """Catches a lost scale, bias or base gradient, for every kind of base."""
    layer, x = layer_and_input(kind, frozen)
    want = value_and_grads(layer, x)
    use_fast_lora(layer)
    got = value_and_grads(layer, x)
    tolerance = 2e-2 if kind == "bfloat16" else 2e-6
    assert abs(got[0] - want[0]) < tolerance * max(abs(want[0]), 50)
    assert got[1].keys() == want[1].keys()
    for name, expected in want[1].items():
        assert got[1][name].dtype == expected.dtype
        assert (mx.abs(got[1][name] - expected).max() / mx.abs(expected).max()).item() < tolerance, name


def lora_model(dropout):
    """A prepared Qwen3.5 with LoRA everywhere, and its dropout keys."""
    model, keys = prepare_for_training(make("qwen3_5")), DropoutKeys()
    model.freeze()
    attach(model, LoRASpec(find_targets(model, "all-linear", "all", "lora"), 4, 2.0, dropout, "lora"), keys, seed=0)
    mx.random.seed(2)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape)
    model.train()
    keys.current = mx.array([[1, 2], [3, 4]], dtype=mx.uint32)
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_model(dropout):
    """Catches dropout that is lost or drawn twice in the joint function: a whole model, all adapters."""
    tokens = mx.random.randint(0, 64, (2, 40), key=mx.random.key(0))
    model = lora_model(dropout)
    want = loss_and_grads(model, tokens)
    use_fast_lora(model)
    assert_same(loss_and_grads(model, tokens), want, 1e-5)
    assert sum(type(m).__call__ is not LoRALinear.__call__ for m in model.modules() if isinstance(m, LoRALinear)) > 10


@pytest.mark.parametrize("every", [True, 2])
def test_checkpointing(every):
    """Catches gradients that differ from the plain ones, with keyed dropout, LoRA and packed rows together."""
    tokens = mx.random.randint(0, 64, (2, 40), key=mx.random.key(0))
    segments = mx.array([[1] * 40, [1] * 13 + [2] * 27])
    model = lora_model(0.3)
    use_fast_lora(model)
    want = loss_and_grads(model, tokens, cache=model.segment_cache(segments))
    checkpoint_layers(model.layers, every)
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert_same(loss_and_grads(model, tokens, cache=model.segment_cache(segments)), want, 1e-6)
    assert [name for name, _ in tree_flatten(model.trainable_parameters())] == names


def test_checkpointing_trains_every_parameter():
    """Catches parameters that a checkpointed layer treats as constants: full training."""
    tokens = mx.random.randint(0, 64, (2, 40), key=mx.random.key(0))
    want = loss_and_grads(prepare_for_training(make("gemma3_text")), tokens)
    model = prepare_for_training(make("gemma3_text"))
    checkpoint_layers(model.layers)
    assert_same(loss_and_grads(model, tokens), want, 1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_checkpointing_saves_memory(packed):
    """Catches a checkpoint that keeps what it should compute again, and masks of packed rows made ahead for all
    layers.
    """
    segments = mx.arange(256)[None] // 100 + mx.zeros((4, 1), mx.int32)

    def peak(every):
        model = prepare_for_training(make("llama", num_hidden_layers=8))
        checkpoint_layers(model.layers, every)
        tokens = mx.random.randint(0, 64, (4, 256))
        cache = model.segment_cache(segments) if packed else None
        mx.eval(tokens)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        loss_and_grads(model, tokens, cache)
        return mx.get_peak_memory() - before

    assert peak(True) < 0.5 * peak(False)


def test_checkpointing_refuses_unkeyed_dropout():
    """Catches nn.Dropout under checkpointing, whose second mask differs from the first."""
    model = make("llama")
    model.layers[0].dropout = nn.Dropout(0.1)
    with pytest.raises(ValueError, match="keys"):
        checkpoint_layers(model.layers)
    with pytest.raises(ValueError, match="-1"):
        checkpoint_layers(model.layers, -1)


def test_a_quantized_base_is_unpacked_for_many_rows_on_cuda(monkeypatch):
    """Catches another gradient where CUDA's slow kernel for the backward direction is gone around."""
    base = nn.QuantizedLinear.from_linear(nn.Linear(64, 96, bias=False), group_size=32, bits=4)
    base.freeze()
    mx.random.seed(0)
    rows, dy = mx.random.normal((200, 64)), mx.random.normal((200, 96))
    a, b = mx.random.normal((64, 4)), mx.random.normal((4, 96))
    expected = mx.vjp(lambda x: [lora_matmul(x, base, a, b, 2.0)], [rows], [dy])[1][0]
    unpacked = []
    dequantize = mx.dequantize
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "dequantize", lambda *x, **options: unpacked.append(x) or dequantize(*x, **options))
    found = mx.vjp(lambda x: [lora_matmul(x, base, a, b, 2.0)], [rows], [dy])[1][0]
    assert unpacked and mx.abs(found - expected).max().item() <= 1e-5 * mx.abs(expected).max().item()
