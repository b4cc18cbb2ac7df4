"""Files that are whole or not there: written beside their name, flushed to the disk, then renamed.

Bytes depend on what is written only: no time, host or path.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHUNK_BYTES = 16 * 2**20
TMP_SUFFIX = ".tmp"


@dataclass(frozen=True)
class FileRecord:
    """What the manifest keeps of one written file: its SHA-256 (hex) and its size in bytes."""

    sha256: str
    num_bytes: int


def write_json(path: Path, value: object) -> FileRecord:
    """Write a JSON file with sorted keys, so that equal values give equal bytes; flushed to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return file_record(path)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: It is torn, not JSON, or nested too deeply; names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error


def digest_of(value: object) -> str:
    """16 hexadecimal digits that differ for values whose JSON differs; what JSON cannot hold counts by its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_record(path: Path) -> FileRecord:
    """Hash and measure a file that is already on the disk."""
    digest, num_bytes = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
    return FileRecord(digest.hexdigest(), num_bytes)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder that appears under its name only when it is complete.

    Yields `<target>.tmp`, empty. When the block ends, the folder is flushed and takes the place of `target`; an
    older `target` is gone only once the new one stands. When the block raises, what was written is removed.
    """
    tmp = target.with_name(target.name + TMP_SUFFIX)
    replaced = target.with_name(f"{target.name}.replaced{TMP_SUFFIX}")
    remove(tmp)
    remove(replaced)
    tmp.mkdir(parents=True)
    try:
        yield tmp
        sync_folder(tmp)
        if target.exists():
            target.rename(replaced)
        tmp.rename(target)
        sync_folder(target.parent)
    except BaseException:
        remove(tmp)
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise
    remove(replaced)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A file that appears under its name only when it is complete. Yields `<target>.tmp`, to be written."""
    tmp = target.with_name(target.name + TMP_SUFFIX)
    tmp.unlink(missing_ok=True)  # a left-over, or a link that leads elsewhere
    try:
        yield tmp
        with open(tmp, "rb") as file:
            os.fsync(file.fileno())
        os.replace(tmp, target)
        sync_folder(target.parent)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk; without it a rename may be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Flush the files directly in `folder` that other packages wrote."""
    for path in folder.iterdir():
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Remove a folder with its content, if it is there."""
    if path.exists():
        shutil.rmtree(path)


def explain(error: OSError, folder: Path) -> str:
    """One sentence on why writing into `folder` failed, with the free space when that is what ran out."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        reason += f" ({shutil.disk_usage(existing).free / 2**30:.2f} GiB free)"
    return reason
