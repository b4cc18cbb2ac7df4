"""Fills a tree of dataclasses from plain dictionaries, strictly, and collects every problem on the way.

The types of the fields decide: dataclass = section, `Literal` = words, unions, lists, dictionaries and
scalars. A number may be written as text (`1e-5` is text to some YAML readers). Where something is wrong
the default stays in its place, so that all other keys are still checked.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trainer.nearest import nearest
from trainer.recipe.problems import Problem, listing

_REFUSED = object()  # stands for a value that has been reported
_LARGEST_WHOLE = 2**63 - 1  # MLX takes no larger integer
_BOUNDS = {"minimum": ">=", "above": ">", "maximum": "<=", "below": "<"}


def fill(
    section: type, values: Any, problems: list[Problem], path: str = "", root: type | None = None
) -> Any:
    """An instance of the dataclass `section` with `values` in it.

    Args:
        section: The dataclass to fill.
        values: A mapping from field names to plain values.
        problems: Gets one entry per thing that is wrong.
        path: Dotted path of the section, empty at the top.
        root: The whole tree, searched for the key that was probably meant; default `section`.
    """
    root = root or section
    if not isinstance(values, Mapping):
        hint = "a section; leave the key out for its defaults" if values is None else describe(section, {})
        problems.append(Problem(path, values, "not a section", hint))
        return _REFUSED if path else section()
    fields = {field.name: field for field in dataclasses.fields(section)}
    kinds = get_type_hints(section)
    filled = {}
    for key, value in values.items():
        at = f"{path}.{key}" if path else str(key)
        if key not in fields:
            problems.append(
                Problem(at, value, "no such key", listing(fields), _nearest_key(at, fields, path, root))
            )
            continue
        result = _read(kinds[key], value, at, fields[key].metadata, problems, root)
        if result is not _REFUSED:
            filled[key] = result
    return section(**filled)


def walk(section: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Dotted path and field of every key below a dataclass, optional sections included."""
    kinds = get_type_hints(section)
    for field in dataclasses.fields(section):
        yield prefix + field.name, field
        for kind in (kinds[field.name], *get_args(kinds[field.name])):
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                yield from walk(kind, f"{prefix}{field.name}.")


def describe(kind: Any, metadata: Mapping[str, Any], plural: bool = False) -> str:
    """What may be written for a type: words, ranges and sections in plain language."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is type(None):
        return "null"
    if origin is Literal:
        return listing(map(str, arguments))
    if origin in (Union, types.UnionType):
        return listing(describe(argument, metadata, plural) for argument in arguments)
    if origin is list:
        return f"a list of {describe(arguments[0], metadata, plural=True)}"
    if origin is dict:
        keys = "" if arguments[0] is str else f" from {describe(arguments[0], {})}"
        return f"a map{keys}" + ("" if arguments[1] is Any else f" to {describe(arguments[1], {})}")
    if dataclasses.is_dataclass(kind):
        keys = ", ".join(field.name for field in dataclasses.fields(kind))
        return f"{'sections' if plural else 'a section'} with the keys {keys}"
    return _describe_scalar(kind, metadata, plural)


def _describe_scalar(kind: Any, metadata: Mapping[str, Any], plural: bool) -> str:
    bounds = " and ".join(f"{sign} {_number(metadata[name])}" for name, sign in _BOUNDS.items() if name in metadata)
    if kind is str and metadata.get("words") and not plural:
        return listing([*metadata["words"], "text"])
    if kind in (int, float):
        noun = "whole number" if kind is int else "number"
        return f"{f'{noun}s' if plural else f'a {noun}'} {bounds}".strip()
    return {str: "text", bool: "true or false", Any: "anything"}[kind]


def _nearest_key(at: str, siblings: Mapping[str, Any], path: str, root: type) -> str:
    """The key that other trainers call so, else a sibling much like it, else the key most like it anywhere."""
    name = at.rpartition(".")[2]
    by_name = {sibling: f"{path}.{sibling}" if path else sibling for sibling in siblings}
    for known, field in walk(root):
        if name in field.metadata["also"]:
            return known
        by_name.setdefault(field.name, known)
    close = nearest(name, siblings, cutoff=0.8) or nearest(name, by_name)
    return by_name.get(close, "")


def _read(
    kind: Any, value: Any, path: str, metadata: Mapping[str, Any], problems: list[Problem], root: type
) -> Any:
    """The value as `kind`, or _REFUSED after adding to `problems`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return fill(kind, value, problems, path, root)
    if origin in (Union, types.UnionType):
        return _read_union(arguments, value, path, metadata, problems, root)
    if origin is list and isinstance(value, list):
        items = [
            _read(arguments[0], item, f"{path}[{i}]", metadata, problems, root)
            for i, item in enumerate(value)
        ]
        return _REFUSED if any(item is _REFUSED for item in items) else items
    if origin is dict and isinstance(value, Mapping):
        return _read_map(arguments, value, path, problems, root)
    if kind is Any:
        return value
    if origin is Literal:
        result = _read_literal(arguments, value)
    else:
        result = _REFUSED if origin else _read_scalar(kind, value, metadata)
    if result is _REFUSED:
        words = arguments if origin is Literal else metadata.get("words", ())
        close = nearest(value, map(str, words)) if isinstance(value, str) else ""
        problems.append(Problem(path, value, _refusal(value), describe(kind, metadata), close))
    return result


def _read_union(
    options: tuple[Any, ...],
    value: Any,
    path: str,
    metadata: Mapping[str, Any],
    problems: list[Problem],
    root: type,
) -> Any:
    """The first option that takes the value; a mapping or list is only held against options of that shape."""
    if value is None and type(None) in options:
        return None
    shaped = [option for option in options if option is not type(None) and _same_shape(option, value)]
    if len(shaped) == 1 and isinstance(value, (Mapping, list)):
        return _read(shaped[0], value, path, metadata, problems, root)
    words = list(metadata.get("words", ()))
    for option in shaped:
        scratch: list[Problem] = []
        result = _read(option, value, path, metadata, scratch, root)
        if not scratch:
            return result
        words += map(str, get_args(option) if get_origin(option) is Literal else ())
    allowed = listing(describe(option, metadata) for option in options)
    problems.append(Problem(path, value, _refusal(value), allowed, nearest(value, words)))
    return _REFUSED


def _refusal(value: Any) -> str:
    return "too large" if isinstance(value, (int, float)) and value > _LARGEST_WHOLE else "not allowed"


def _same_shape(option: Any, value: Any) -> bool:
    """Whether mapping meets mapping, list meets list, and scalar meets scalar."""
    is_map = dataclasses.is_dataclass(option) or get_origin(option) is dict
    is_list = get_origin(option) is list
    return is_map == isinstance(value, Mapping) and is_list == isinstance(value, list)


def _read_map(kinds: tuple[Any, ...], value: Mapping, path: str, problems: list[Problem], root: type) -> Any:
    before = len(problems)
    for key, item in value.items():
        _read(kinds[0], key, f"{path}.{key}", {}, problems, root)
        _read(kinds[1], item, f"{path}.{key}", {}, problems, root)
    return dict(value) if len(problems) == before else _REFUSED


def _read_literal(words: tuple[Any, ...], value: Any) -> Any:
    """Compared with its type, because True == 1 in Python."""
    return next((word for word in words if word == value and type(word) is type(value)), _REFUSED)


def _read_scalar(kind: type, value: Any, metadata: Mapping[str, Any]) -> Any:
    if kind is bool:
        return value if isinstance(value, bool) else _REFUSED
    if kind is str:
        return _read_text(value, metadata.get("words", ()))
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return _REFUSED
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return _REFUSED
    exact = value if isinstance(value, int) else number  # a float rounds whole numbers from 2^53 on
    if not math.isfinite(number) or (kind is int and (number != int(number) or exact > _LARGEST_WHOLE)):
        return _REFUSED
    in_range = (
        number >= metadata.get("minimum", -math.inf)
        and number > metadata.get("above", -math.inf)
        and number <= metadata.get("maximum", math.inf)
        and number < metadata.get("below", math.inf)
    )
    return kind(exact) if in_range else _REFUSED


def _read_text(value: Any, words: tuple[str, ...]) -> Any:
    """Text; a whole number is taken as text, and a near miss of a special word is refused."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        return _REFUSED
    near_miss = value not in words and nearest(value, words, cutoff=0.8)
    return _REFUSED if near_miss else value


def _number(value: float) -> str:
    """A whole number in full, another one short."""
    return str(value) if isinstance(value, int) else f"{value:g}"
