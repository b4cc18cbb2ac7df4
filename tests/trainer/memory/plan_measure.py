"""Bytes of real training steps beside those of the plan."""

import gc
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

import comm
from parallel import value_and_grad
from trainer.build import wrap
from trainer.layers.checkpointing import checkpoint_layers
from trainer.memory import plan_memory
from trainer.model.shapes import planned_model
from trainer.recipe.config import Recipe
from trainer.recipe.rules import resolve_mesh
from trainer.training.loop import clipped_gradients
from trainer.training.optim import Optimizer


@dataclass
class Measured:
    """Bytes on one rank.

    Attributes:
        weights, gradients, optimizer, peak: of real steps.
        plan: the same of the plan for this rank, with its buffers and activations.
    """

    weights: int
    gradients: int
    optimizer: int
    peak: int
    plan: dict[str, int]


def measure(recipe: Recipe, world: comm.Group, accumulation: int) -> Measured:
    """Bytes on this rank in a step of the loop, once the optimizer has state, and those that the plan says."""
    sizes = resolve_mesh(recipe.parallel, world.size)
    memory = plan_memory(recipe, planned_model(recipe))
    batch = memory.batch
    # In a run, layers are checkpointed last.
    real = planned_model(replace(recipe, gradient_checkpointing=False))
    model = real.model
    # Drawing random weights would take longer than the steps.
    model.update(tree_map(lambda p: mx.full(p.shape, 0.01, dtype=p.dtype), model.parameters()))
    mesh = comm.Mesh.build(sizes, world)
    plan = memory.stage(sizes, accumulation, mesh.pp.rank)
    wrap(model, recipe.parallel, mesh)
    checkpoint_layers(model.layers, recipe.gradient_checkpointing)
    mx.eval(model.parameters(), batch)
    optimizer = Optimizer(model.trainable_parameters(), recipe.optimizer)
    mx.eval([array for _, array in optimizer.tensors()])
    step = value_and_grad(model, plan_memory(recipe, real).loss)
    weights = nbytes(model.parameters())
    gc.collect()
    mx.clear_cache()
    rest = mx.get_active_memory() - weights - state_bytes(optimizer)

    def one_step() -> int:
        """As the loop: no name keeps a gradient after the step."""
        _, grads, _, _ = clipped_gradients(step, [batch] * accumulation, recipe.max_grad_norm, model)
        optimizer.update(model, grads, 1e-4)
        mx.eval(model.trainable_parameters(), optimizer.state)
        return nbytes(grads)

    for _ in range(2):
        mx.reset_peak_memory()
        gradients = one_step()
    return Measured(
        weights, gradients, state_bytes(optimizer), mx.get_peak_memory() - rest, asdict(plan) | {"peak": plan.peak}
    )


def state_bytes(optimizer: Optimizer) -> int:
    return sum(array.nbytes for _, array in optimizer.tensors())


def nbytes(tree: Any) -> int:
    return sum(array.nbytes for _, array in tree_flatten(tree))
