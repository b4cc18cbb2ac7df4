"""How long the values of a recipe become once `${key}` stands for another value: a few lines can ask for gigabytes."""

import re
from collections.abc import Mapping

LONGEST = 1 << 20
_REFERENCE = re.compile(r"\$\{([^${}]+)\}")


def too_long(flat: Mapping[str, object]) -> str:
    """The first key whose value becomes longer than `LONGEST` characters, or an empty string.

    Args:
        flat: Every value by its dotted key, with its references as they are written.
    """
    lengths: dict[str, int] = {}

    def length(key: str) -> int:
        if key not in lengths:
            lengths[key] = 0  # a circle, which is refused elsewhere, adds nothing
            values = [flat[key]] if key in flat else [v for other, v in flat.items() if other.startswith(f"{key}.")]
            texts = [str(value) for value in values]
            lengths[key] = sum(map(len, texts)) + sum(length(name) for text in texts for name in _REFERENCE.findall(text))
        return lengths[key]

    return next((key for key in flat if length(key) > LONGEST), "")
