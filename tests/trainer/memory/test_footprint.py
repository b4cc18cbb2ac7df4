"""Bytes of a plan against those of a real step."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from plan_measure import measure
from test_placement import CONFIGS, QWEN3, make

import comm
from comm import MeshShape
from trainer.memory import plan_memory

# 52 M parameters: 206 MiB in float32.
LARGE = QWEN3 | {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 16000,
    "tie_word_embeddings": False,
}


def small(layers: int, dims: int, vocabulary: int) -> dict:
    """A config whose activations outweigh its weights."""
    sizes = {"hidden_size": dims, "intermediate_size": 3 * dims, "num_hidden_layers": layers}
    return LARGE | sizes | {"vocab_size": vocabulary}


@pytest.mark.parametrize("method, checkpointing", [("lora", True), ("full", True), ("lora", False)])
def test_activations_within_a_quarter_of_what_a_step_needs(method, checkpointing):
    """A plan blind to what a step computes; a step that computes checkpointed layers again before their turn."""
    recipe, _ = make(
        small(8, 256, 2000),
        method=method,
        batch_size_per_device=1,
        data={"train": "synthetic:sql", "max_seq_len": 384},
        gradient_checkpointing=checkpointing,
    )
    found = measure(recipe, comm.solo(), accumulation=1)
    plan = found.plan
    assert (plan["weights"], plan["gradients"], plan["optimizer"]) == (found.weights, found.gradients, found.optimizer)
    kept = found.weights + found.optimizer
    assert plan["peak"] - kept == pytest.approx(found.peak - kept, rel=0.25), f"{plan} {found.peak}"


@pytest.mark.parametrize("name", CONFIGS)
def test_each_axis_saves_what_it_should(name):
    """An axis whose saving is forgotten, or one that is counted although it saves nothing."""
    recipe, planned = make(CONFIGS[name], method="full")
    plan = plan_memory(recipe, planned)
    one = plan.of(MeshShape(1), 2)
    for mesh in (MeshShape(1, tp=2), MeshShape(1, pp=2), MeshShape(1, dp_shard=2)):
        divided = plan.of(mesh, 2)
        assert 0.45 * one.optimizer < divided.optimizer < 0.75 * one.optimizer
        assert divided.weights < 0.75 * one.weights
    replicated = plan.of(MeshShape(dp_replicate=2), 2)
    assert (replicated.weights, replicated.optimizer) == (one.weights, one.optimizer)
    assert replicated.buffers > one.buffers == 0


def test_the_model_is_left_as_it_was():
    """Tracers left in the model, or experts that stay frozen."""
    recipe, planned = make(CONFIGS["moe"], method="full")
    before = set(dict(tree_flatten(planned.model.trainable_parameters())))
    plan_memory(recipe, planned).of(MeshShape(1, pp=2), 2)
    assert set(dict(tree_flatten(planned.model.trainable_parameters()))) == before
    mx.eval(planned.model.parameters())
