"""Batch and mesh arithmetic, and settings without effect."""

import pytest

from comm import MeshShape
from trainer.recipe.config import EvalConfig, ParallelConfig, Recipe
from trainer.recipe.load import RecipeError, recipe_from
from trainer.recipe.rules import resolve_batch, resolve_mesh, validation_warnings, warnings

GOOD = {"model": {"path": "owner/name"}, "data": {"train": "rows.jsonl"}}


def test_batch_size_scales_by_the_data_parallel_ranks():
    """A global batch that does not grow with the ranks, or accumulation that is forgotten in it."""
    recipe = recipe_from(GOOD | {"batch_size_per_device": 3, "grad_accumulation_steps": 2})
    assert [resolve_batch(recipe, dp).global_size for dp in (1, 2, 5)] == [6, 12, 30]


def test_accumulation_follows_from_the_global_batch():
    """Accumulation that changes the global batch instead of keeping it."""
    recipe = recipe_from(GOOD | {"global_batch_size": 24})
    assert [resolve_batch(recipe, dp).accumulation for dp in (1, 2, 3, 6)] == [6, 3, 2, 1]
    assert all(resolve_batch(recipe, dp).global_size == 24 for dp in (1, 2, 3, 6))


def test_indivisible_global_batch_names_sizes_that_work():
    """A global batch rounded silently, or an error that leaves the arithmetic to the reader."""
    recipe = recipe_from(GOOD | {"global_batch_size": 18})
    with pytest.raises(RecipeError) as caught:
        resolve_batch(recipe, 2)
    text = str(caught.value)
    assert "batch_size_per_device(4) * 2 data-parallel ranks = 8" in text
    assert "16 or 24 (multiples of 8), or batch_size_per_device 1, 3 or 9" in text


@pytest.mark.parametrize(
    "settings, world, sizes",
    [
        ({}, 4, MeshShape(4, 1, 1, 1)),
        ({"tp": 2}, 4, MeshShape(2, 1, 1, 2)),
        ({"dp_shard": -1, "dp_replicate": 1, "pp": 2}, 8, MeshShape(1, 4, 2, 1)),
        ({"dp_replicate": 2, "pp": 2, "tp": 2}, 8, MeshShape(2, 1, 2, 2)),
    ],
)
def test_mesh_takes_the_ranks_that_are_left(settings, world, sizes):
    """An axis that gets the wrong share of the world."""
    assert resolve_mesh(ParallelConfig(**settings), world) == sizes
    assert sizes.world == world


def test_mesh_that_does_not_fit_shows_the_equation():
    """An error from which one cannot see which factor is wrong."""
    with pytest.raises(RecipeError, match=r"dp_replicate\(2\).*tp\(3\) = 6, but the world has 4 ranks"):
        resolve_mesh(ParallelConfig(dp_replicate=2, tp=3), 4)
    with pytest.raises(RecipeError, match=r"is a multiple of 3, but the world has 4 ranks"):
        resolve_mesh(ParallelConfig(tp=3), 4)


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"max_steps": 10, "epochs": 3}, "epochs"),
        ({"method": "full", "lora": {"rank": 16}}, "lora.rank"),
        ({"lora": {"init_from": "adapters", "alpha": 3}}, "lora.alpha"),
        ({"data": {"train": "x", "valid": "y", "val_fraction": 0.1}}, "data.val_fraction"),
        ({"eval": {"max_new_tokens": 9}}, "eval.max_new_tokens"),
        ({"logging": {"wandb": {"name": "run"}}}, "logging.wandb.name"),
        ({"schedule": {"name": "constant", "min_lr_ratio": 0.1}}, "schedule.min_lr_ratio"),
        ({"parallel": {"schedule": "gpipe"}}, "parallel.schedule"),
        ({"optimizer": {"name": "sgd", "betas": [0.5, 0.5]}}, "optimizer.betas"),
    ],
)
def test_a_setting_without_effect_is_a_warning(changes, key):
    """A setting that is silently ignored."""
    found = warnings(recipe_from(GOOD | changes))
    assert len(found) == 1 and found[0].startswith(f"{key} = ") and "no effect" in found[0]


def test_no_warnings_for_defaults():
    """Noise for a recipe that sets nothing."""
    assert warnings(recipe_from(GOOD)) == []
    assert warnings(recipe_from(GOOD | {"max_steps": 5, "method": "full"})) == []


def test_a_warmup_as_long_as_the_run_is_a_warning():
    """A run whose learning rate never reaches its peak."""
    assert warnings(recipe_from(GOOD | {"max_steps": 5, "schedule": {"warmup_steps": 5}}))


@pytest.mark.parametrize("name", ["muon", "adafactor"])
@pytest.mark.parametrize("axis", ["tp", "dp_shard"])
def test_optimizers_of_whole_matrices_refuse_slices(name, axis):
    """Catches an optimizer that orthogonalises or factors a rank's slice as if it were the matrix."""
    settings = GOOD | {"method": "full", "optimizer": {"name": name}}
    with pytest.raises(RecipeError, match=rf"optimizer.name = {name}: needs whole matrices, but parallel.{axis} divides"):
        recipe_from(settings | {"parallel": {axis: 2}})
    assert recipe_from(settings | {"parallel": {"dp_replicate": 2, "pp": 2}}).optimizer.name == name


def test_what_validation_needs_rows_for() -> None:
    """Catches a patience or generations that never come, without a word, as there are no rows to validate on."""
    assert validation_warnings(Recipe()) == []
    recipe = Recipe(eval=EvalConfig(patience=3, generate=4))
    found = validation_warnings(recipe)
    assert [line.split(" has no effect")[0] for line in found] == ["eval.generate = 4", "eval.patience = 3"]
    assert all("data.val_fraction" in line for line in found)
