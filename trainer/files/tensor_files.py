"""Safetensors files written one tensor at a time, bfloat16 included.

MLX's own saver wants every tensor in memory at once. Here each is evaluated, written and dropped before the next is
asked for, so the extra memory is that of the largest tensor, and tensors may be gathered from other ranks on the way.
Bytes depend on the tensors and their order only. Format: an 8-byte header length, a JSON header that may end in spaces,
the tensors back to back (https://huggingface.co/docs/safetensors). The header comes first but is known last: room is
left for it.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np

from trainer.files.storage import CHUNK_BYTES, FileRecord, file_record

MAX_SHARD_BYTES = 5 * 10**9
# About 450 tensors; a shard with more is closed, like one with too many bytes.
HEADER_ROOM_BYTES = 64 * 2**10

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


def write_tensors(
    folder: Path,
    stem: str,
    tensors: NamedTensors,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    header_room_bytes: int = HEADER_ROOM_BYTES,
) -> dict[str, FileRecord]:
    """Write `folder/stem.safetensors`, or `stem-0000i-of-0000n.safetensors` when the tensors need several files.

    After a failed write the remaining tensors are still asked for and evaluated, so that other ranks which take part
    in a gather are not left waiting; then the error is raised.

    Args:
        folder: An existing folder, not in use: files are renamed when their number is known.
        stem: File name without the suffix.
        tensors: (name, array) pairs; the order is the order in the files.
        max_shard_bytes: A file is closed before its tensors would grow past this. Default 5 GB. One larger tensor
            gets a file of its own.
        header_room_bytes: Room left for each file's header; a file is closed before it would outgrow that.

    Returns:
        file name -> record, in order. At least one file, even for no tensors.

    Raises:
        OSError: The disk is full, or the folder cannot be written.
        ValueError: Two tensors of one name.
    """
    shards = _Shards(folder, stem, max_shard_bytes, header_room_bytes)
    failure: OSError | None = None
    for name, tensor in tensors:
        mx.eval(tensor)
        if failure is None:
            try:
                shards.add(name, tensor)
            except OSError as error:
                failure = error
        del tensor  # before the next one is made
    if failure is not None:
        raise failure
    return shards.finish()


def consume(tensors: NamedTensors) -> None:
    """Evaluate every tensor in order and drop it: what a rank without a disk does while rank 0 writes."""
    for _, tensor in tensors:
        mx.eval(tensor)
        del tensor


@contextmanager
def consuming(tensors: NamedTensors) -> Iterator[NamedTensors]:
    """Tensors to write, of which those that an error leaves over are evaluated all the same.

    Other ranks take part in gathering them and would wait for ever.
    """
    remaining = iter(tensors)
    try:
        yield remaining
    except OSError:
        consume(remaining)
        raise


def write_tensor_file(path: Path, tensors: NamedTensors) -> None:
    """Write one safetensors file of any size, with a header no longer than needed. Holds all tensors at once."""
    named = list(tensors)
    mx.eval([tensor for _, tensor in named])
    shard = _Shard(path, len(_header(_entries(named))))
    for name, tensor in named:
        shard.add(name, tensor)
    shard.close()


def read_tensor_file(path: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file by name. Lazy: each is read from the disk when it is evaluated.

    Raises:
        ValueError: The file is torn, or of another format.
    """
    try:
        # An array or a tuple, which MLX's annotation allows too, is what other formats and options give.
        return cast(dict[str, mx.array], mx.load(str(path)))
    except RuntimeError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def tensor_sizes(path: Path) -> dict[str, int]:
    """Tensor name -> bytes, from the header of a safetensors file."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: end - start for name, (start, end) in spans.items()}


class _Shards:
    """The files of one set of tensors; their names hold their number, which is known at the end."""

    def __init__(self, folder: Path, stem: str, max_shard_bytes: int, header_room_bytes: int) -> None:
        self.folder = folder
        self.stem = stem
        self.max_shard_bytes = max_shard_bytes
        self.header_room_bytes = header_room_bytes
        self.names: set[str] = set()
        self.closed: list[tuple[Path, FileRecord]] = []
        self.shard: _Shard | None = None

    def add(self, name: str, tensor: mx.array) -> None:
        if name in self.names:
            raise ValueError(f"two tensors are named {name!r}; names must be unique.")
        self.names.add(name)
        if self.shard is not None and not self.shard.has_room(name, tensor, self.max_shard_bytes):
            self._close(self.shard)
            self.shard = None
        self.shard = self.shard or self._open()
        self.shard.add(name, tensor)

    def finish(self) -> dict[str, FileRecord]:
        self._close(self.shard or self._open())
        records = {}
        for index, (path, record) in enumerate(self.closed):
            name = self.stem if len(self.closed) == 1 else f"{self.stem}-{index + 1:05d}-of-{len(self.closed):05d}"
            path.rename(self.folder / f"{name}.safetensors")
            records[f"{name}.safetensors"] = record
        return records

    def _open(self) -> "_Shard":
        path = self.folder / f"{self.stem}-{len(self.closed) + 1:05d}.part"
        return _Shard(path, self.header_room_bytes)

    def _close(self, shard: "_Shard") -> None:
        shard.close()
        # Hashed while the system still has it in memory.
        self.closed.append((shard.path, file_record(shard.path)))


class _Shard:
    """One file in the making: tensors are appended behind the room for the header."""

    def __init__(self, path: Path, header_room_bytes: int) -> None:
        self.path = path
        self.header_room_bytes = header_room_bytes
        self.entries: dict[str, dict] = {}
        self.num_bytes = 0
        self.num_header_bytes = len(_header({}))
        path.write_bytes(b" " * header_room_bytes)

    def has_room(self, name: str, tensor: mx.array, max_bytes: int) -> bool:
        """Whether one more tensor fits; an empty file takes a tensor of any size."""
        num_header_bytes = self.num_header_bytes + len(json.dumps(_entries([(name, tensor)], self.num_bytes)))
        fits = self.num_bytes + tensor.nbytes <= max_bytes and num_header_bytes <= self.header_room_bytes
        return fits or not self.entries

    def add(self, name: str, tensor: mx.array) -> None:
        entry = _entries([(name, tensor)], self.num_bytes)
        self.entries |= entry
        self.num_header_bytes += len(json.dumps(entry))
        self.num_bytes += tensor.nbytes
        with open(self.path, "ab") as file:
            for chunk in _chunks(tensor):
                file.write(chunk)

    def close(self) -> None:
        """Write the header and flush the file to the disk."""
        header = _header(self.entries)
        assert len(header) <= self.header_room_bytes, f"{len(header)} bytes of header, {self.header_room_bytes} of room"
        text = header[8:].ljust(self.header_room_bytes - 8)
        with open(self.path, "r+b") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            os.fsync(file.fileno())


def _entries(tensors: NamedTensors, offset: int = 0) -> dict[str, dict]:
    """Header entries of tensors that lie back to back from `offset`."""
    entries = {}
    for name, tensor in tensors:
        span = [offset, offset + tensor.nbytes]
        entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.nbytes
    return entries


def _header(entries: dict[str, dict]) -> bytes:
    """Length and JSON, padded to a multiple of 8 bytes as the format's own writer does."""
    text = json.dumps({"__metadata__": {"format": "mlx"}} | entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _chunks(tensor: mx.array) -> Iterator[memoryview]:
    """The row-major little-endian bytes, in pieces: one write of more than 2 GiB fails on macOS."""
    if tensor.dtype == mx.bfloat16:  # numpy has no bfloat16
        tensor = tensor.view(mx.uint16)
    array = np.ascontiguousarray(np.asarray(tensor))
    if array.size == 0:
        return
    view = array.reshape(-1).data.cast("B")
    for start in range(0, len(view), CHUNK_BYTES):
        yield view[start : start + CHUNK_BYTES]
