"""What is wrong with a recipe: one `Problem` per key, one `RecipeError` for all of them; and errors of all ranks.

Pure text, no parsing and no rules: those are in `trainer.recipe.fill` and `trainer.recipe.rules`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing to mend in a recipe.

    Args:
        path: Dotted key path, such as `optimizer.lr`; empty for the recipe as a whole.
        value: What was written there; None is shown as null.
        wrong: What is wrong with it.
        allowed: What may be written instead.
        nearest: The known key or word that was probably meant.
        about: Further key paths that the complaint depends on.
    """

    path: str
    value: Any
    wrong: str
    allowed: str = ""
    nearest: str = ""
    about: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.path} = {show(self.value)}: {self.wrong}" if self.path else self.wrong
        if self.allowed:
            text += f"; allowed: {self.allowed}"
        if self.nearest:
            text += f"; did you mean {self.nearest}?"
        return text


class RecipeError(ValueError):
    """A recipe that cannot run, with every problem listed. Every rank of a run meets the same one.

    Args:
        problems: All that was found.
        source: The recipe's file, shown first.
    """

    def __init__(self, problems: Iterable[Problem], source: str = "recipe") -> None:
        self.problems = tuple(problems)
        self.source = source
        lines = [self.headline, *(f"  {problem}" for problem in self.problems)]
        super().__init__("\n".join(lines))

    @property
    def headline(self) -> str:
        """The source and the number of problems, in one line."""
        count = len(self.problems)
        return f"{self.source}: {count} problem{'s' if count != 1 else ''}"


# What a user can mend: wrong words, and paths that are not what they should be.
USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


class AgreedError(Exception):
    """Raised on every rank with the same text, so that rank 0 alone tells it."""


class AgreedUserError(AgreedError, ValueError):
    """One that the user can mend."""


class AgreedSystemError(AgreedError, OSError):
    """Another one of the system's, such as a full disk."""


def sentence(error: Exception) -> str:
    """An error's text, without the bookkeeping of the operating system's errors."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error) or type(error).__name__


def show(value: Any) -> str:
    """A value as one would write it in YAML, cut to one short line."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else str(value)
    text = "".join(c if c.isprintable() else "·" for c in " ".join(text.split())) or "''"
    return text if len(text) <= 80 else f"{text[:77]}..."


def listing(words: Iterable[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last
