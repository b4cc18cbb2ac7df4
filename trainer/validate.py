"""`python -m trainer validate`: checks a recipe and says what it means, without model, data or MLX."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

from trainer.config import DataSource, Recipe
from trainer.problems import Problem, RecipeError
from trainer.recipe import load_recipe, to_yaml
from trainer.rules import resolve_batch, resolve_mesh, warnings

_FILE_ENDINGS = (".jsonl", ".json", ".parquet", ".csv")


def main(arguments: argparse.Namespace) -> int:
    """Print the resolved recipe and its meaning for `arguments.world` ranks.

    Raises:
        RecipeError: The recipe cannot run, or a local path in it does not exist.
    """
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    lines = meaning(recipe, arguments.world)
    if missing := missing_paths(recipe):
        raise RecipeError(missing, arguments.recipe)
    print(to_yaml(recipe))
    print("\n".join([*lines, *(f"warning: {text}" for text in warnings(recipe))]))
    if remote := [path for _, path in _named_paths(recipe) if not is_local(path)]:
        print(f"not looked up: {', '.join(dict.fromkeys(remote))}")
    return 0


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


def missing_paths(recipe: Recipe) -> list[Problem]:
    """One problem for each local path of the recipe that does not exist."""
    return [
        Problem(
            key, path, "there is no such file or folder", "a path that exists, or OWNER/NAME on Hugging Face"
        )
        for key, path in _named_paths(recipe)
        if is_local(path) and not os.path.exists(os.path.expanduser(path))
    ]


def is_local(path: str) -> bool:
    """Whether a path is on this machine; OWNER/NAME that does not exist here is taken for Hugging Face."""
    if os.path.exists(os.path.expanduser(path)):
        return True
    looks_local = path.startswith((".", "/", "~")) or path.endswith(_FILE_ENDINGS)
    return looks_local or path.count("/") > 1


def _named_paths(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Key and value of every setting that names something to read."""
    named = {
        "model.path": recipe.model.path,
        "model.tokenizer": recipe.model.tokenizer,
        "lora.init_from": recipe.lora.init_from,
    }
    if recipe.checkpoint.resume not in ("auto", "none"):
        named["checkpoint.resume"] = recipe.checkpoint.resume
    for key, sources in (("data.train", recipe.data.train), ("data.valid", recipe.data.valid)):
        listed = sources if isinstance(sources, list) else [DataSource(path=sources or "")]
        suffix = "[{}].path" if isinstance(sources, list) else ""
        named |= {key + suffix.format(index): source.path for index, source in enumerate(listed)}
    for key, path in named.items():
        if path and not path.startswith(("bpe:", "synthetic:")):
            yield key, path
