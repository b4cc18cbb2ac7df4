"""The JSON Schema accepts what the loader accepts, and the shipped recipes keep to it."""

import json
from typing import Any

import pytest

from trainer.recipe.load import load_recipe
from trainer.verbs.schema import recipe_schema
from trainer.verbs.shipped import SCHEMA_NAME, recipes_folder
from trainer.verbs.validate import meaning

RECIPES = sorted(recipes_folder().glob("*.yaml"))
TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def accepts(schema: dict[str, Any], value: Any) -> bool:
    """Whether a value keeps to the part of JSON Schema that `trainer.verbs.schema` uses."""
    if "anyOf" in schema:
        return any(accepts(option, value) for option in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if kind in ("integer", "number"):
        is_number = isinstance(value, int if kind == "integer" else (int, float)) and not isinstance(
            value, bool
        )
        return is_number and (
            schema.get("minimum", value) <= value <= schema.get("maximum", value)
            and schema.get("exclusiveMinimum", value - 1) < value < schema.get("exclusiveMaximum", value + 1)
        )
    if not isinstance(value, TYPES[kind]):
        return False
    if kind == "array":
        return all(accepts(schema["items"], item) for item in value)
    return kind != "object" or _accepts_object(schema, value)


def _accepts_object(schema: dict[str, Any], value: dict[str, Any]) -> bool:
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    names = schema.get("propertyNames", {}).get("enum")
    return all(
        (names is None or key in names)
        and (
            accepts(known[key], item)
            if key in known
            else others is True or bool(others and accepts(others, item))
        )
        for key, item in value.items()
    )


def plain(path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(path), resolve=True)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes(path):
    """A shipped recipe that does not load, does not fit four ranks, or that an editor marks as wrong."""
    recipe = load_recipe(path)
    assert accepts(recipe_schema(), plain(path))
    assert meaning(recipe, 4)
    first, second = path.read_text().splitlines()[:2]
    assert first == f"# yaml-language-server: $schema={SCHEMA_NAME}"
    assert second.startswith("# ") and f"python -m trainer recipes/{path.name}" in path.read_text()


def test_there_are_recipes():
    """A folder that was moved, with which the test above would test nothing."""
    assert {"qwen-9b-lora", "qwen-9b-qlora", "qwen-9b-full"} <= {path.stem for path in RECIPES}


def test_shipped_schema_is_current():
    """A new key that editors mark as wrong: `python -m trainer schema > recipes/recipe.schema.json`."""
    assert json.loads((recipes_folder() / SCHEMA_NAME).read_text()) == recipe_schema()


@pytest.mark.parametrize(
    "wrong",
    [
        {"optimzer": {}},
        {"method": "loar"},
        {"lora": {"rank": 0}},
        {"optimizer": {"betas": [0.9, 1.0]}},
        {"parallel": {"backend": {"tpp": "ring"}}},
        {"model": {"quantize": {"bits": 7}}},
        {"data": {"train": [{"pth": "x"}]}},
    ],
)
def test_schema_refuses_what_the_loader_refuses(wrong):
    """A schema so wide that editors check nothing."""
    assert not accepts(recipe_schema(), wrong)


def test_every_key_of_the_schema_has_a_description():
    """Completion in an editor without a word of help."""

    def walk(schema: dict[str, Any]):
        for key, child in schema.get("properties", {}).items():
            yield key, child
            for part in (child, *child.get("anyOf", [])):
                yield from walk(part)

    assert all("description" in child for _, child in walk(recipe_schema()))
