"""How a module gets a further class while it stays the same object, and how it loses it again.

MLX keeps parameters in the module itself, so its class can be exchanged: names, flags, attributes and `isinstance` stay as
they were, and whoever holds the module holds the extended one. Classes are made once, so that equal layers have equal
classes.
"""

import re
from functools import cache
from typing import Any

import mlx.nn as nn


@cache
def extended_class(mixin: type, base: type, name: str = "") -> type:
    """The class of a `base` that is a `mixin` first; the same class every time.

    Args:
        mixin: Its methods go before those of `base`.
        base: A module's class.
        name: Of the class. Default: the mixin's name without its last word, and the base's.
    """
    name = name or re.sub("(Linear|Embedding|Block|Module)$", "", mixin.__name__) + base.__name__
    return type(name, (mixin, base), {"__module__": base.__module__, "extended_from": base, "extended_by": mixin})


def overridden_class(base: type, members: dict[str, Any]) -> type:
    """A class with the name, module and docstring of `base`, and other members; a new one every time."""
    return type(base.__name__, (base,), {**members, "__module__": base.__module__, "__doc__": base.__doc__})


def extend(module: nn.Module, mixin: type, name: str = "") -> None:
    """Make `module` an instance of `mixin` too."""
    module.__class__ = extended_class(mixin, type(module), name)


def class_before(cls: type, mixin: type) -> type:
    """What `cls` was before `mixin`, or a subclass of it, extended it; `cls` itself where none did."""
    return vars(cls)["extended_from"] if issubclass(vars(cls).get("extended_by", object), mixin) else cls


def take_back(module: nn.Module) -> None:
    """Give `module` the class again that it had before it was extended last."""
    module.__class__ = vars(type(module))["extended_from"]
