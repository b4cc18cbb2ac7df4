"""`python -m trainer schema`: the JSON Schema of recipes, made from the dataclasses of `trainer.recipe.config`.

Editors with a YAML language server complete and check a recipe whose first line names the schema:
`# yaml-language-server: $schema=recipe.schema.json`. Rules between keys are not part of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trainer.recipe.config import Recipe

_BOUNDS = {
    "minimum": "minimum",
    "above": "exclusiveMinimum",
    "maximum": "maximum",
    "below": "exclusiveMaximum",
}
_SCALARS = {int: "integer", float: "number", bool: "boolean", str: "string", type(None): "null"}


def main(arguments: argparse.Namespace) -> int:
    """Print the schema."""
    print(json.dumps(recipe_schema(), indent=2))
    return 0


def recipe_schema() -> dict[str, Any]:
    """The schema of a whole recipe, in draft 7, which editors know best."""
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "mlx-trainer recipe"}
    return head | _section(Recipe)


def _section(section: type) -> dict[str, Any]:
    kinds = get_type_hints(section)
    properties = {field.name: _key(field, kinds[field.name]) for field in dataclasses.fields(section)}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _key(field: dataclasses.Field, kind: Any) -> dict[str, Any]:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    schema = _kind(kind, field.metadata) | {"description": field.metadata["help"]}
    return schema if dataclasses.is_dataclass(default) else schema | {"default": default}


def _kind(kind: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _section(kind)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_kind(argument, metadata) for argument in arguments]}
    if origin is list:
        return {"type": "array", "items": _kind(arguments[0], metadata)}
    if origin is dict:
        return _map(*arguments)
    schema = {"type": _SCALARS[kind]}
    if kind in (int, float):
        schema |= {_BOUNDS[name]: metadata[name] for name in _BOUNDS if name in metadata}
    return schema


def _map(key: Any, value: Any) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    if value is not Any:
        schema["additionalProperties"] = _kind(value, {})
    if get_origin(key) is Literal:
        schema["propertyNames"] = {"enum": list(get_args(key))}
    return schema
