"""Bytes of a plan against those of a real step."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map
from test_placement import CONFIGS, QWEN3, make

from parallel import clip_grad_norm, value_and_grad
from trainer.footprint import Footprints
from trainer.optim import Optimizer
from trainer.rules import MeshSizes

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


def measure(recipe, planned, accumulation: int) -> tuple[int, int, int, int]:
    """Bytes of weights, gradients, optimizer and peak in two real steps of the loop."""
    model, loss = planned.model, planned.loss
    batch = Footprints(recipe, planned)._batch
    # Drawing random weights would take longer than the steps.
    model.update(tree_map(lambda p: mx.full(p.shape, 0.01, dtype=p.dtype), model.parameters()))
    mx.eval(model.parameters(), batch)
    optimizer = Optimizer(model.trainable_parameters(), recipe.optimizer)
    mx.eval([array for _, array in optimizer.tensors()])
    step = value_and_grad(model, loss)
    weights = nbytes(model.parameters())
    mx.clear_cache()
    rest = mx.get_active_memory() - weights - sum(array.nbytes for _, array in optimizer.tensors())

    def one_step() -> int:
        """As the loop: no name keeps a gradient after the step."""
        value, grads, count = step([batch] * accumulation)
        grads, norm = clip_grad_norm(grads, recipe.max_grad_norm, model)
        mx.eval(value, norm, count, grads)
        optimizer.update(model, grads, 1e-4)
        mx.eval(model.trainable_parameters(), optimizer.state)
        return nbytes(grads)

    mx.reset_peak_memory()
    gradients = one_step()
    state = sum(array.nbytes for _, array in optimizer.tensors())
    return weights, gradients, state, mx.get_peak_memory() - rest


def nbytes(tree) -> int:
    return sum(array.nbytes for _, array in tree_flatten(tree))


@pytest.mark.parametrize(
    "method, length, accumulation, checkpointing, packing",
    [("full", 48, 2, False, "auto"), ("lora", 96, 1, False, "auto"), ("lora", 192, 1, True, False)],
)
def test_peak_within_a_quarter_of_what_a_step_needs(method, length, accumulation, checkpointing, packing):
    """A plan that says a model fits which does not; weights, gradients and optimizer are exact."""
    recipe, planned = make(
        LARGE,
        method=method,
        batch_size_per_device=1,
        data={"train": "synthetic:sql", "max_seq_len": length, "packing": packing},
        gradient_checkpointing=checkpointing,
    )
    footprint = Footprints(recipe, planned).of(MeshSizes(), accumulation)
    weights, gradients, state, peak = measure(recipe, planned, accumulation)
    assert (footprint.weights, footprint.gradients, footprint.optimizer) == (weights, gradients, state)
    assert footprint.peak == pytest.approx(peak, rel=0.25), f"{footprint.peak / 2**20} {peak / 2**20}"


@pytest.mark.parametrize("name", CONFIGS)
def test_each_axis_saves_what_it_should(name):
    """An axis whose saving is forgotten, or one that is counted although it saves nothing."""
    recipe, planned = make(CONFIGS[name], method="full")
    footprints = Footprints(recipe, planned)
    one = footprints.of(MeshSizes(), 2)
    for mesh in (MeshSizes(tp=2), MeshSizes(pp=2), MeshSizes(dp_shard=2)):
        divided = footprints.of(mesh, 2)
        assert 0.45 * one.optimizer < divided.optimizer < 0.75 * one.optimizer
        assert divided.weights < 0.75 * one.weights
    replicated = footprints.of(MeshSizes(dp_replicate=2), 2)
    assert (replicated.weights, replicated.optimizer) == (one.weights, one.optimizer)
    assert replicated.buffers > one.buffers == 0


def test_the_model_is_left_as_it_was():
    """Tracers left in the model, or experts that stay frozen."""
    recipe, planned = make(CONFIGS["moe"], method="full")
    before = planned.trainable
    Footprints(recipe, planned).of(MeshSizes(pp=2), 2)
    assert planned.trainable == before
    mx.eval(planned.model.parameters())
