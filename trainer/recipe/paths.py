"""The paths of a recipe: which are on this machine, which are missing, and whether the output can be written.

No path is opened, and nothing of MLX is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.nearest import nearest
from trainer.recipe.config import DataSource, Recipe
from trainer.recipe.problems import Problem, RecipeError

_FILE_ENDINGS = (".jsonl", ".json", ".parquet", ".csv")
# What every rank reads from its own disk; a checkpoint is read by rank 0 alone.
READ_BY_ALL = ("model", "lora", "data")


def require_paths(recipe: Recipe, sections: Iterable[str] = READ_BY_ALL) -> None:
    """Refuse a recipe that names files or folders which are not there.

    Args:
        recipe: A checked recipe.
        sections: The first words of the keys to look at.

    Raises:
        RecipeError: Paths are missing; the text lists every one.
    """
    wanted = tuple(sections)
    if missing := [problem for problem in missing_paths(recipe) if problem.path.startswith(wanted)]:
        raise RecipeError(missing)


def missing_paths(recipe: Recipe) -> list[Problem]:
    """One problem for each local path of the recipe that does not exist."""
    return [
        Problem(
            key,
            path,
            "there is no such file or folder",
            "a path that exists, or OWNER/NAME on Hugging Face",
            nearest=nearest_path(path),
        )
        for key, path in named_paths(recipe)
        if is_local(path) and not os.path.exists(os.path.expanduser(path))
    ]


def is_local(path: str) -> bool:
    """Whether a path is on this machine; OWNER/NAME that does not exist here is taken for Hugging Face."""
    if os.path.exists(os.path.expanduser(path)):
        return True
    looks_local = path.startswith((".", "/", "~")) or path.endswith(_FILE_ENDINGS)
    return looks_local or path.count("/") > 1


def nearest_path(missing: str) -> str:
    """The existing path most like a missing one, by the first of its parts that is not there; empty when none is alike."""
    path = Path(missing)
    folder = path.parent
    while not folder.expanduser().is_dir():
        folder = folder.parent
    close = nearest(path.relative_to(folder).parts[0], (item.name for item in folder.expanduser().iterdir()))
    return str(folder / close) if close else ""


def named_paths(recipe: Recipe) -> Iterator[tuple[str, str]]:
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


def found_beside(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with paths from `folder`, where its file lies, for those that are not found from the working folder."""

    def find(path: str) -> str:
        beside = folder / path
        return str(beside) if not os.path.exists(os.path.expanduser(path)) and beside.exists() else path

    return _with_paths(recipe, find)


def found_from_anywhere(recipe: Recipe) -> Recipe:
    """The recipe with whole paths for what is on this machine, to be kept in a folder that may be moved."""
    return _with_paths(recipe, lambda path: os.path.abspath(path) if os.path.exists(path) else path)


def _with_paths(recipe: Recipe, change: Callable[[str], str]) -> Recipe:
    """The recipe with every setting changed that names something to read."""
    changed = {path: change(path) for _, path in named_paths(recipe)}

    def new(value: Any) -> Any:
        if isinstance(value, list):
            return [replace(source, path=new(source.path)) for source in value]
        return changed.get(value, value)

    return replace(
        recipe,
        model=replace(recipe.model, path=new(recipe.model.path), tokenizer=new(recipe.model.tokenizer)),
        lora=replace(recipe.lora, init_from=new(recipe.lora.init_from)),
        data=replace(recipe.data, train=new(recipe.data.train), valid=new(recipe.data.valid)),
        checkpoint=replace(recipe.checkpoint, resume=new(recipe.checkpoint.resume)),
    )


def require_writable(output_dir: str) -> None:
    """Refuse an output folder that cannot be made or written; makes nothing.

    Raises:
        RecipeError: It cannot be made or written; the text says what stands in the way.
    """
    folder = Path(output_dir)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        wrong = f"{existing} is a file"
    elif not os.access(existing, os.W_OK | os.X_OK):
        wrong = f"{existing} cannot be written"
    else:
        return
    raise RecipeError([Problem("output_dir", output_dir, wrong, "a folder that can be made and written")])
