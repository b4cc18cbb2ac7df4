"""The known word that was probably meant."""

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(word: Any, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The known word most like `word`, or an empty string when none is alike.

    Args:
        word: What was written.
        known: What would have been right.
        cutoff: How alike they must be, from 0 to 1; see `difflib.get_close_matches`.
    """
    matches = difflib.get_close_matches(str(word), list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else ""
