"""Operations per token against sums written out by hand, and the table of chips."""

from math import prod

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from tiny import make
from trainer.memory.tracing import trace
from trainer.model.flops import peak_tflops, token_flops
from trainer.model.lora import DropoutKeys, LoRASpec, attach, find_targets

MLP = 3 * 32 * 48
ATTENTION = 32 * 32 + 2 * 32 * 16 + 32 * 32
HEAD = 64 * 32
EXPERTS_OF_A_TOKEN = 2 * (3 * 32 * 16 * 2)
LINEAR_STATE, LINEAR_CONVOLUTION = 7 * 4 * 8 * 8, 2 * 4 * 64


def test_full_training():
    """Catches the classic 6 N per token with a part missing: llama, all parameters trained, 100 keys on average."""
    flops = token_flops(make("llama"), 200)
    matrices = 2 * (MLP + ATTENTION) + HEAD
    scores = 2 * 4 * 32 * 100
    assert flops.forward == 2 * matrices + scores
    assert flops.backward == 2 * flops.forward


def test_tied_head_counts_once():
    """Catches a head that is free because it is the embedding."""
    assert token_flops(make("llama", tie_word_embeddings=True), 200) == token_flops(make("llama"), 200)


def test_lora_has_a_smaller_backward():
    """Catches weight gradients counted for frozen matrices, and adapters left out."""
    model = make("llama")
    model.freeze()
    attach(model, LoRASpec(find_targets(model, ["q_proj"], "all", "lora"), 4, 1.0, 0.0, "lora"), DropoutKeys(), 0)
    matrices, scores, adapters = 2 * (MLP + ATTENTION) + HEAD, 2 * 4 * 32 * 100, 2 * 4 * (32 + 32)
    flops = token_flops(model, 200)
    assert flops.forward == 2 * (matrices + adapters) + scores
    assert flops.backward == 2 * matrices + 4 * adapters + 2 * scores


def test_backward_ends_at_the_first_trained_layer():
    """Catches a backward pass counted below the first adapter."""
    model = make("llama")
    model.freeze()
    attach(model, LoRASpec(find_targets(model, ["q_proj"], 1, "lora"), 4, 1.0, 0.0, "lora"), DropoutKeys(), 0)
    layer, adapters, scores = MLP + ATTENTION, 4 * (32 + 32), 4 * 32 * 100
    assert token_flops(model, 200).backward == 2 * (layer + HEAD) + 4 * adapters + 2 * scores


def test_experts_count_by_their_share():
    """Catches all experts counted as active: 2 of 4 chosen, router and shared expert whole."""
    flops = token_flops(make("qwen3_moe"), 2)
    experts = 3 * 32 * 16 * 2
    matrices = 2 * (ATTENTION + experts + 32 * 4) + HEAD
    assert flops.forward == 2 * matrices + 2 * 4 * 32


def test_linear_attention_does_not_grow_with_context():
    """Catches linear attention counted like attention: only one of two layers grows."""
    model = make("qwen3_5")
    assert token_flops(model, 4000).forward - token_flops(model, 2000).forward == 4 * 32 * 1000
    linears = 32 * 64 + 32 * 32 + 2 * 32 * 4 + 32 * 32
    gated_attention = ATTENTION + 32 * 32
    expected = 2 * (linears + gated_attention + 2 * MLP + HEAD) + LINEAR_STATE + LINEAR_CONVOLUTION + 4 * 32
    assert token_flops(model, 2).forward == expected


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5"])
def test_full_training_of_other_layers(name):
    """Catches a part of experts or linear attention that is left out of the backward pass: twice the forward."""
    flops = token_flops(make(name), 200)
    assert flops.backward == 2 * flops.forward


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "qwen3_5"])
def test_products_of_a_graph(name):
    """Catches a matrix that the count forgets or counts twice: the matrix products of the traced forward pass, beside
    which attention, linear attention and its convolution are the only rest.
    """
    model, num_tokens = make(name), 4
    graph = trace(lambda x: [model(x)], [mx.zeros((1, num_tokens), mx.int32)])
    sizes = {array: shape for op in graph.operations for array, shape in zip(op.outputs, op.shapes)}
    weights = {value.shape[::-1] for _, value in tree_flatten(model.parameters()) if value.ndim == 2}
    products = [op for op in graph.operations if op.name in ("Matmul", "AddMM")]
    dense = sum(
        2 * prod(op.shapes[0]) * sizes[op.inputs[1]][-2] for op in products if sizes.get(op.inputs[1]) in weights
    )
    layers = {"llama": 0, "qwen3_moe": 2 * EXPERTS_OF_A_TOKEN, "qwen3_5": LINEAR_STATE + LINEAR_CONVOLUTION}
    attention = {"llama": 2, "qwen3_moe": 2, "qwen3_5": 1}[name] * 4 * 32 * num_tokens / 2
    assert dense / num_tokens + layers[name] + attention == token_flops(model, num_tokens).forward


def test_windows_bound_attention():
    """Catches sliding layers counted at full context."""
    model = make("gemma3_text")
    assert token_flops(model, 4000).forward - token_flops(model, 2000).forward == 4 * 32 * 1000


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Apple M2 Ultra", 27.2),
        ("Apple M1", 2.6),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_known_chips(name, expected):
    """Catches a name that matches another chip's entry."""
    assert peak_tflops(name) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "name",
    ["Apple M9 Ultra", "NVIDIA L400", "", "some CPU", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA H200 NVL", "NVIDIA GB200"],
)
def test_unknown_chips_have_no_peak(name):
    """Catches a guess where there should be no figure, and a variant taken for the chip that it is named after."""
    assert peak_tflops(name) is None
