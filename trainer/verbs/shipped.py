"""`python -m trainer ls` and `cp`: the recipes that come with the package."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from trainer.nearest import nearest

SCHEMA_NAME = "recipe.schema.json"


def recipes_folder() -> Path:
    """Where the recipes are: beside the packages, in a checkout and installed alike."""
    return Path(__file__).resolve().parents[2] / "recipes"


def ls(arguments: argparse.Namespace) -> int:
    """Print each recipe's name and the first line of its header."""
    found = [path for path in sorted(recipes_folder().glob("*.yaml")) if arguments.pattern in path.stem]
    if not found:
        raise FileNotFoundError(f"No recipe in {recipes_folder()} has {arguments.pattern!r} in its name.")
    width = max(len(path.stem) for path in found)
    print("\n".join(f"{path.stem:<{width}}  {_headline(path)}" for path in found))
    return 0


def cp(arguments: argparse.Namespace) -> int:
    """Copy a recipe, and beside it the schema that its first line names.

    Raises:
        FileNotFoundError: There is no such recipe or target folder.
        ValueError: The target exists and `--force` was not given.
    """
    name = Path(arguments.name).stem
    source = recipes_folder() / f"{name}.yaml"
    if not source.is_file():
        known = [path.stem for path in recipes_folder().glob("*.yaml")]
        close = nearest(name, known)
        hint = f"did you mean {close}?" if close else f"there are: {', '.join(sorted(known))}."
        raise FileNotFoundError(f"There is no recipe {name}; {hint}")
    target = Path(arguments.target)
    target = target / source.name if target.is_dir() else target
    if target.exists() and not arguments.force:
        raise ValueError(f"{target} exists; give another name, or --force to write over it.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {target.parent}.")
    shutil.copyfile(source, target)
    print(f"{target}  (check it: python -m trainer validate {target})")
    schema = target.parent / SCHEMA_NAME
    if not schema.exists():
        shutil.copyfile(recipes_folder() / SCHEMA_NAME, schema)
    return 0


def _headline(path: Path) -> str:
    """The first line of the header that is for people; the modeline before it is for editors."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "yaml-language-server" not in line:
            return line.lstrip("# ")
    return ""
