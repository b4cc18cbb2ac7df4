"""Gradient checkpointing of layers that take more than their input: every array gets its gradient."""

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from trainer.layers.checkpointing import checkpoint_layers

SHAPE = dict(
    hidden_size=32, num_hidden_layers=4, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    rms_norm_eps=1e-5, norm_eps=1e-5, vocab_size=64, rope_theta=10000.0, max_position_embeddings=512, attention_bias=False,
    tie_word_embeddings=False,
)  # fmt: skip
KINDS = ["sliding_attention", "full_attention"] * 2
# Layers that hand keys and values, tuples, or what the first layer computed, on to later ones.
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma4_text": dict(
        global_head_dim=16, vocab_size_per_layer_input=64, num_kv_shared_layers=2, hidden_size_per_layer_input=16,
        sliding_window=8, final_logit_softcapping=30.0, layer_types=KINDS, tie_word_embeddings=True, use_double_wide_mlp=True,
        rope_parameters={
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4},
        },
    ),
    "hunyuan": dict(
        moe_topk=2, num_experts=4, num_shared_expert=1, use_mixed_mlp_moe=True, use_qk_norm=True, use_cla=True,
        cla_share_factor=2, rope_scaling={"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
    ),
    "talkie": {},
}  # fmt: skip


class Sum(nn.Module):
    """A layer that adds up arrays wherever they stand in its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = mx.array([2.0, 3.0])

    def __call__(self, x: mx.array, pair: tuple[mx.array, None], named: dict[str, mx.array], last: mx.array) -> Any:
        return (x * pair[0] * self.weight, [named["a"] * last])


class Appending(nn.Module):
    """A layer that leaves something behind in what it is given."""

    def __call__(self, x: mx.array, kept: Any) -> mx.array:
        if isinstance(kept, list):
            kept.append(x)
        else:
            kept.keys = x
        return x


class Box:
    """An object with a place for an array."""

    keys: mx.array | None = None


def test_every_array_argument_gets_its_gradient() -> None:
    """Catches arguments other than the first being constants: their gradients would be zero, and the loss the same."""
    layer = Sum()
    checkpoint_layers([layer])

    def loss(arrays: list[mx.array]) -> mx.array:
        x, second, third, fourth = arrays
        product, (other,) = layer(x, (second, None), {"a": third}, last=fourth)
        return product.sum() + other.sum()

    arrays = [mx.array([float(i), i + 1.0]) for i in range(1, 5)]
    checkpointed = mx.grad(loss)(arrays)
    layer.eval()
    plain = mx.grad(loss)(arrays)
    assert all(gradient.abs().sum().item() > 0 for gradient in plain)
    for mine, expected in zip(checkpointed, plain, strict=True):
        assert mx.array_equal(mine, expected), (mine, expected)


@pytest.mark.parametrize("kept", [[], Box()], ids=["list", "object"])
def test_a_layer_that_changes_what_it_is_given(kept: Any) -> None:
    """Catches a second pass that would append a second time."""
    layer = Appending()
    checkpoint_layers([layer])
    with pytest.raises(ValueError, match="Appending changes an object"):
        layer(mx.array([1.0]), kept)


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_that_share_arrays(name: str) -> None:
    """Catches gradients that are lost between layers of real architectures: loss and every gradient against plain."""
    plain, checkpointed = (model(name) for _ in range(2))
    checkpoint_layers(checkpointed.layers)
    tokens = mx.random.randint(0, 64, (2, 12), key=mx.random.key(1))

    def loss(model: nn.Module, tokens: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(tokens)[:, :-1], tokens[:, 1:], reduction="sum")

    expected = nn.value_and_grad(plain, loss)(plain, tokens)
    got = nn.value_and_grad(checkpointed, loss)(checkpointed, tokens)
    assert got[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
    for (path, mine), (_, theirs) in zip(tree_flatten(got[1]), tree_flatten(expected[1]), strict=True):
        distance = (mine - theirs).abs().max().item() / max(theirs.abs().max().item(), 1e-12)
        assert distance < 1e-5, f"{path}: {distance:.1e}"


def model(name: str) -> nn.Module:
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(0)
    made = module.Model(module.ModelArgs.from_dict({**SHAPE, "model_type": name, **CONFIGS[name]}))
    made.train()
    mx.eval(made.parameters())
    return made
