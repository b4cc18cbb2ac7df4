"""A YAML file and `key=value` overrides become a `Recipe`, or one error that lists all that is wrong.

OmegaConf reads the YAML (so `1e-5` is a number and `${...}` refers to other keys) and applies the
overrides; the dataclasses of `trainer.recipe.config` decide what is allowed. No model, data or MLX is touched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from trainer.nearest import nearest
from trainer.recipe.config import Recipe
from trainer.recipe.fill import fill, walk
from trainer.recipe.interpolation import LONGEST, too_long
from trainer.recipe.paths import found_beside
from trainer.recipe.problems import Problem, RecipeError
from trainer.recipe.rules import check

__all__ = ["Problem", "Recipe", "RecipeError", "load_recipe", "recipe_from", "to_yaml"]


def load_recipe(source: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        source: The YAML file, its settings as a dictionary, or a `Recipe`.
        overrides: Settings such as `optimizer.lr=2e-4`, applied in order; the values are YAML.

    Returns:
        The recipe with every default filled in and `{recipe}` in its output folder replaced. Relative paths are
        looked for in the working folder, then beside the file.

    Raises:
        FileNotFoundError: There is no such file.
        RecipeError: Anything else is wrong; it lists every problem.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = Path(source) if isinstance(source, (str, Path)) else Path("recipe")
    problems: list[Problem] = []
    try:
        try:
            tree = OmegaConf.create(_read_text(path) if isinstance(source, (str, Path)) else _settings(source))
        except AssertionError:  # OmegaConf's word for a number, a truth value or a set at the top
            tree = None
        # An empty file is an empty recipe; text or a list at the top has no keys to set.
        if not OmegaConf.is_dict(tree):
            raise RecipeError([Problem("", None, "a recipe is a map of keys to values")], str(path))
        for override in overrides:
            _apply(tree, override, problems)
        if key := too_long(flattened(OmegaConf.to_container(tree, resolve=False))):
            what = f"its references make it longer than {LONGEST:,} characters"
            raise RecipeError([*problems, Problem("", None, f"{key}: {what}")], str(path))
        # A dictionary, as the tree is one; OmegaConf annotates what any tree gives.
        values = cast(dict[str, Any], OmegaConf.to_container(tree, resolve=True, throw_on_missing=True))
    except (OmegaConfBaseException, YAMLError) as error:
        raise RecipeError([*problems, Problem("", None, _one_line(error))], str(path)) from error
    except RecursionError as error:
        raise RecipeError([*problems, Problem("", None, "nested too deeply to be a recipe")], str(path)) from error
    return found_beside(recipe_from(values, path, problems), path.parent)


def recipe_from(
    values: dict[str, Any], source: str | Path = "recipe", problems: Sequence[Problem] = ()
) -> Recipe:
    """The recipe for a plain dictionary of settings.

    Args:
        values: Settings in the shape of the YAML file.
        source: The file they come from: named in errors, and its stem replaces `{recipe}`.
        problems: Problems found before, reported with the others.

    Raises:
        RecipeError: Something is wrong; it lists every problem.
    """
    found = list(problems)
    recipe = fill(Recipe, values, found)
    # A rule is not judged on a default that stands in for a value already refused.
    refused = {problem.path for problem in found}
    rules = [problem for problem in check(recipe) if not refused & {problem.path, *problem.about}]
    if found or rules:
        raise RecipeError([*found, *rules], str(source))
    return dataclasses.replace(recipe, output_dir=recipe.output_dir.replace("{recipe}", Path(source).stem))


def _settings(source: dict[str, Any] | Recipe) -> dict[str, Any]:
    return dataclasses.asdict(source) if isinstance(source, Recipe) else source


def to_yaml(recipe: Recipe) -> str:
    """Every key of the recipe as YAML that `load_recipe` reads back to an equal recipe."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(recipe)))


def _read_text(path: Path) -> str:
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError([Problem("", None, f"not text in UTF-8 ({error})")], str(path)) from error
    if path.is_dir():
        raise FileNotFoundError(
            f"{path} is a folder; a recipe is a YAML file, such as {path / 'recipe.yaml'}."
        )
    beside = sorted(map(str, path.parent.glob("*.yaml"))) if path.parent.is_dir() else []
    close = nearest(path, beside)
    hint = f"did you mean {close}?" if close else "`python -m trainer ls` lists the recipes that are there."
    raise FileNotFoundError(f"There is no recipe {path}; {hint}")


def _apply(tree: Any, override: str, problems: list[Problem]) -> None:
    """Set one `key=value` in the OmegaConf tree."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    key, equals, text = override.partition("=")
    if not equals or not key:
        close = nearest(override, (known for known, _ in walk(Recipe)))
        problems.append(
            Problem(
                "", None, f"override {override}: not of the form key=value", nearest=close and f"{close}=..."
            )
        )
        return
    try:
        value = OmegaConf.from_dotlist([f"value={text}"])["value"]
        OmegaConf.update(tree, key, value, merge=True)
    except (OmegaConfBaseException, YAMLError, TypeError, ValueError, IndexError) as error:
        problems.append(Problem(key, text, f"cannot be set: {_one_line(error)}"))


def _one_line(error: Exception) -> str:
    """OmegaConf adds its own bookkeeping in further lines; YAML's place in the file is worth keeping."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"not YAML: {getattr(error, 'problem', '')} in line {mark.line + 1}, column {mark.column + 1}"
    return str(error).splitlines()[0]


def flattened(settings: object, prefix: str = "") -> dict[str, object]:
    """Nested dictionaries as dotted keys."""
    if not isinstance(settings, dict):
        return {}
    flat: dict[str, object] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
