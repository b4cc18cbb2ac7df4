"""Data sets of the Hugging Face hub, through `datasets` (imported when one is opened, not before)."""

import hashlib
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from .files import RawRow, file_digest

if TYPE_CHECKING:
    from datasets import Dataset


class HubRows:
    """The rows of one split of a repo.

    Args:
        path: What `datasets.load_dataset` takes: a repo, or a folder in the hub's layout.
        split: A split's name, or a slice of one such as `train[:90%]`.
    """

    def __init__(self, path: str, split: str):
        self.path = path
        self.split = split
        self.name = f"{path}:{split}"

    @cached_property
    def _dataset(self) -> "Dataset":
        from datasets import load_dataset

        return load_dataset(self.path, split=self.split)

    def digest(self) -> str:
        """A hash of the split's Arrow files and of the part of them that is taken."""
        files = [file_digest(Path(file["filename"])) for file in self._dataset.cache_files]
        return hashlib.sha256(repr((self.split, files, len(self._dataset))).encode()).hexdigest()

    def __iter__(self) -> Iterator[RawRow]:
        for number, row in enumerate(self._dataset, 1):
            yield RawRow(f"{self.name}:row {number}", row)


def open_hub_split(path: str, names: tuple[str, ...]) -> HubRows | None:
    """The first of these splits that a repo has, None when it has none of them.

    Raises:
        ValueError: The repo is not there or cannot be reached; the hub's own reason is in the message.
    """
    from datasets import get_dataset_split_names

    try:
        splits = get_dataset_split_names(path)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"There is no file or folder {path!r}, and no data set of that name: {reason}") from error
    found = next((name for name in names if re.split(r"[\[+]", name)[0] in splits), None)
    return HubRows(path, found) if found else None
