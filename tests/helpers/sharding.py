"""Dividing the tests that only run with `--exhaustive` into parts of about the same length, for several machines."""

import argparse
from collections import Counter
from collections.abc import Sequence


def shard_of(text: str) -> tuple[int, int]:
    """The part and the number of parts in "2/5".

    Raises:
        argparse.ArgumentTypeError: It is something else, such as a path that came after a bare `--exhaustive`.
    """
    part, _, count = text.partition("/")
    if part.isdecimal() and count.isdecimal() and 1 <= int(part) <= int(count):
        return int(part), int(count)
    raise argparse.ArgumentTypeError(f"{text!r} is not PART/PARTS, such as 2/5; paths go before a bare --exhaustive.")


def parts_of(files: Sequence[str], count: int) -> list[int]:
    """The part, from 1 on, of each test.

    Every file's tests are spread over all parts, as a file's tests take about equally long; neighbours stay together, as
    they share launches. Files begin at different parts, so that those of one test do not all meet in the first.

    Args:
        files: The file of each test, in the order of collection.
        count: The number of parts.
    """
    sizes, seen = Counter(files), Counter[str]()
    first = {file: index for index, file in enumerate(sizes)}
    parts = []
    for file in files:
        parts.append((first[file] + seen[file] * count // sizes[file]) % count + 1)
        seen[file] += 1
    return parts
