"""`python -m trainer validate`: checks a recipe and says what it means, without weights or data."""

from __future__ import annotations

import argparse

from comm.mesh_shape import MeshShape
from trainer.recipe.config import Recipe
from trainer.recipe.load import load_recipe, to_yaml
from trainer.recipe.paths import is_local, missing_paths, named_paths
from trainer.recipe.problems import RecipeError
from trainer.recipe.rules import resolve_batch, resolve_mesh, warnings


def main(arguments: argparse.Namespace) -> int:
    """Print the resolved recipe and its meaning for `arguments.world` ranks.

    Raises:
        RecipeError: The recipe cannot run, or a local path in it does not exist.
        ValueError: The model's config is at hand and cannot be divided so.
    """
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    lines = meaning(recipe, arguments.world)
    if missing := missing_paths(recipe):
        raise RecipeError(missing, arguments.recipe)
    _check_mesh(recipe, resolve_mesh(recipe.parallel, arguments.world))
    print(to_yaml(recipe))
    print("\n".join([*lines, *(f"warning: {text}" for text in warnings(recipe))]))
    if remote := [path for _, path in named_paths(recipe) if not is_local(path)]:
        print(f"not looked up: {', '.join(dict.fromkeys(remote))}")
    return 0


def _check_mesh(recipe: Recipe, mesh: MeshShape) -> None:
    """Whether the model can be divided so, where its config is at hand: heads, layers, architecture."""
    path = recipe.model.path
    if (mesh.tp > 1 or mesh.pp > 1) and (path is None or is_local(path)):
        # MLX is loaded here only: everything else answers without it.
        from trainer.model.shapes import check_mesh

        check_mesh(recipe, mesh)


def meaning(recipe: Recipe, world: int) -> list[str]:
    """What the recipe's numbers come to for `world` ranks, one line per subject.

    Raises:
        RecipeError: The mesh or the batch does not fit that number of ranks.
    """
    mesh = resolve_mesh(recipe.parallel, world)
    batch = resolve_batch(recipe, mesh.dp)
    length = f"{recipe.max_steps} steps" if recipe.max_steps else f"{recipe.epochs} epoch(s)"
    most_tokens = batch.global_size * recipe.data.max_seq_len
    return [
        f"mesh: {mesh} = {world} rank(s)",
        f"global batch: {batch.per_device} rows * {batch.dp} data-parallel rank(s) * "
        f"{batch.accumulation} accumulation step(s) = {batch.global_size} rows, at most {most_tokens} tokens",
        f"length: {length}",
        f"output: {recipe.output_dir}",
    ]
