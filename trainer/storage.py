"""Files that are whole or not there: atomic folders, and safetensors written one tensor at a time.

MLX's own saver wants every tensor in memory at once; here each is evaluated, written and dropped in turn, so the
extra memory is that of the largest tensor. Shapes and dtypes of lazy arrays are known before evaluation, which is
what the safetensors header needs. Bytes depend on the tensors and their order only: no time, host or path.
Format: https://huggingface.co/docs/safetensors (8-byte header length, JSON header, tensors back to back).
"""

import errno
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

MAX_SHARD_BYTES = 5 * 10**9
CHUNK_BYTES = 16 * 2**20
TMP_SUFFIX = ".tmp"

DTYPE_NAMES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.uint16: "U16",
    mx.uint32: "U32",
    mx.uint64: "U64",
    mx.int8: "I8",
    mx.int16: "I16",
    mx.int32: "I32",
    mx.int64: "I64",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.float32: "F32",
    mx.complex64: "C64",
}

NamedTensors = Iterable[tuple[str, mx.array]]


@dataclass(frozen=True)
class FileRecord:
    """What the manifest keeps of one written file: its SHA-256 (hex) and its size in bytes."""

    sha256: str
    num_bytes: int


def write_tensors(
    folder: Path, stem: str, tensors: NamedTensors, max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, FileRecord]:
    """Write ``folder/stem.safetensors``, or ``stem-0000i-of-0000n.safetensors`` when the tensors need several files.

    The iterable is read to its end first, so it should yield lazy arrays (a gather per tensor, say); each is then
    evaluated in order, written, and dropped. After a failed write the remaining tensors are still evaluated, so that
    other ranks which take part in a tensor's gather are not left waiting; then the error is raised.

    Args:
        folder: An existing folder.
        stem: File name without the suffix.
        tensors: (name, array) pairs; the order is the order in the file.
        max_shard_bytes: A shard is closed before it would grow past this. Default 5 GB. One larger tensor gets a
            shard of its own.

    Returns:
        file name -> record, in shard order. At least one file, even for no tensors.

    Raises:
        OSError: The disk is full, or the folder cannot be written.
        ValueError: Two tensors of one name.
    """
    shards = _split(tensors, max_shard_bytes)
    records: dict[str, FileRecord] = {}
    failure: OSError | None = None
    for index, shard in enumerate(shards):
        name = shard_name(stem, index, len(shards))
        if failure is not None:
            _drain(shard)
            continue
        try:
            records[name] = _write_shard(folder / name, shard)
        except OSError as error:
            failure = error
    if failure is not None:
        raise failure
    return records


def write_tensor_file(path: Path, tensors: NamedTensors) -> FileRecord:
    """Write one safetensors file, whatever its size; laziness, errors and order as in ``write_tensors``."""
    return _write_shard(path, deque(tensors))


def tensor_sizes(path: Path) -> dict[str, int]:
    """Tensor name -> bytes, from the header of a safetensors file."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: end - start for name, (start, end) in spans.items()}


def consume(tensors: NamedTensors) -> None:
    """Evaluate every tensor in order and drop it: what a rank without a disk does while rank 0 writes."""
    _drain(deque(tensors))


def shard_name(stem: str, index: int, num_shards: int) -> str:
    """Hugging Face's file name of shard ``index`` (from 0)."""
    if num_shards == 1:
        return f"{stem}.safetensors"
    return f"{stem}-{index + 1:05d}-of-{num_shards:05d}.safetensors"


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Write chunks to a new file, flushed to the disk itself, hashed on the way."""
    digest, num_bytes = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            num_bytes += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(digest.hexdigest(), num_bytes)


def write_json(path: Path, value: object) -> FileRecord:
    """Write a JSON file with sorted keys, so that equal values give equal bytes."""
    return write_file(path, [(json.dumps(value, indent=2, sort_keys=True) + "\n").encode()])


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

    Yields ``<target>.tmp``, empty. When the block ends, the folder is flushed and takes the place of ``target``; an
    older ``target`` is gone only once the new one stands. When the block raises, what was written is removed.
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
    """A file that appears under its name only when it is complete. Yields ``<target>.tmp``, to be written."""
    tmp = target.with_name(target.name + TMP_SUFFIX)
    try:
        yield tmp
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
    """Flush the files directly in ``folder`` that other packages wrote."""
    for path in folder.iterdir():
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Remove a folder with its content, if it is there."""
    if path.exists():
        shutil.rmtree(path)


def explain(error: OSError, folder: Path) -> str:
    """One sentence on why writing into ``folder`` failed, with the free space when that is what ran out."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        reason += f" ({shutil.disk_usage(existing).free / 2**30:.2f} GiB free)"
    return reason


def _split(tensors: NamedTensors, max_shard_bytes: int) -> list[deque[tuple[str, mx.array]]]:
    """Deal tensors, in order, into shards of at most ``max_shard_bytes``."""
    shards, shard_bytes, names = [deque()], 0, set()
    for name, tensor in tensors:
        if name in names:
            raise ValueError(f"two tensors are named {name!r}; names must be unique.")
        names.add(name)
        if shards[-1] and shard_bytes + tensor.nbytes > max_shard_bytes:
            shards.append(deque())
            shard_bytes = 0
        shards[-1].append((name, tensor))
        shard_bytes += tensor.nbytes
    return shards


def _write_shard(path: Path, pending: deque[tuple[str, mx.array]]) -> FileRecord:
    """Write one file, emptying the queue; on an error too, for the other ranks' sake."""
    try:
        return write_file(path, _safetensors_chunks(pending))
    finally:
        _drain(pending)


def _drain(pending: deque[tuple[str, mx.array]]) -> None:
    while pending:
        mx.eval(pending.popleft()[1])


def _safetensors_chunks(tensors: deque[tuple[str, mx.array]]) -> Iterator[bytes | memoryview]:
    """The bytes of one safetensors file; takes the tensors out of the queue as it goes."""
    yield _header(tensors)
    while tensors:
        yield from _chunks(tensors.popleft()[1])


def _header(tensors: Iterable[tuple[str, mx.array]]) -> bytes:
    """Length and JSON header; padded with spaces to a multiple of 8, as the format's own writer does."""
    entries: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for name, tensor in tensors:
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _chunks(tensor: mx.array) -> Iterator[memoryview]:
    """The tensor's row-major little-endian bytes, in pieces: one write of more than 2 GiB fails on macOS."""
    mx.eval(tensor)
    if tensor.dtype == mx.bfloat16:  # numpy has no bfloat16
        tensor = tensor.view(mx.uint16)
    array = np.ascontiguousarray(np.asarray(tensor))
    if array.size == 0:
        return
    view = memoryview(array.reshape(-1)).cast("B")
    for start in range(0, len(view), CHUNK_BYTES):
        yield view[start : start + CHUNK_BYTES]
