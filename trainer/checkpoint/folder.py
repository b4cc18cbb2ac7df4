"""Checkpoints on rank 0's disk: complete or absent, checked before use, the same bytes for the same run.

    checkpoints/step-0000100/   weights.safetensors optimizer.safetensors …  state.json  manifest.json
    checkpoints/best            names the checkpoint that is kept as the best one; usable wherever a checkpoint is

A checkpoint is written as `step-0000100.tmp`, flushed, and renamed; `manifest.json` holds each file's SHA-256 and
size. What a run needs beside tensors goes into `state.json`; its meaning is the training loop's business.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx

from trainer.files.storage import (
    TMP_SUFFIX,
    FileRecord,
    atomic_file,
    atomic_folder,
    explain,
    file_record,
    read_json,
    remove,
    write_json,
)
from trainer.files.tensor_files import MAX_SHARD_BYTES, NamedTensors, consume, read_tensor_file, write_tensors

STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
MANIFEST_FORMAT = 1
BEST_FILE = "best"
RESULT_FILE = "result.json"
STEP_NAME = re.compile(r"step-(\d{7,})")


class CheckpointError(OSError):
    """A checkpoint that could not be written, or that is not whole."""


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint on the disk.

    Args:
        path: Its folder.
        step: Optimizer updates done when it was written.
        state: What was given to `CheckpointFolder.save` as `state`.
    """

    path: Path
    step: int
    state: dict

    def tensors(self, name: str) -> dict[str, mx.array]:
        """Tensors of one of the saved sets, by tensor name. Lazy: each is read from the disk when it is evaluated.

        Raises:
            KeyError: The checkpoint has no set of that name.
        """
        pattern = re.compile(rf"{re.escape(name)}(-\d{{5}}-of-\d{{5}})?\.safetensors")
        shards = [self.path / file for file in sorted(_manifest(self.path)) if pattern.fullmatch(file)]
        if not shards:
            raise KeyError(f"{self.path} holds no tensors called {name!r}.")
        return {key: tensor for shard in shards for key, tensor in read_tensor_file(shard).items()}


class CheckpointFolder:
    """Writes, prunes and finds the checkpoints of one run.

    Args:
        folder: Where `step-*` folders live (made when first needed). None on ranks other than 0: `save` then only
            evaluates the tensors, so that gathers run on all ranks alike, and nothing is ever found.
        keep_last: How many of the newest checkpoints stay; None keeps all.
        max_shard_bytes: Upper limit of one safetensors file. Default 5 GB.
    """

    def __init__(self, folder: Path | None, keep_last: int | None, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; it must be at least 1, or null to keep every checkpoint.")
        self.folder = folder
        self.keep_last = keep_last
        self.max_shard_bytes = max_shard_bytes
        self.pinned: int | None = None

    def pin(self, step: int | None) -> None:
        """From the next save on, keep the checkpoint of this step, the best one, beside the last ones; None: none."""
        self.pinned = step

    def mark_best(self) -> None:
        """Let `best` name the pinned checkpoint; without one, `best` goes away. `save` does this too."""
        if self.folder is None:
            return
        mark = self.folder / BEST_FILE
        if self.pinned is None:
            mark.unlink(missing_ok=True)
        else:
            with atomic_file(mark) as file:
                file.write_text(_name(self.pinned) + "\n")

    def save(
        self, step: int, files: Mapping[str, NamedTensors], state: dict, *, keep_all: bool = False
    ) -> Path | None:
        """Write a checkpoint, then remove those that are no longer kept.

        Also removed: left-overs of interrupted saves, and checkpoints of later steps, which belong to a future that
        this run has left (it was started again from an earlier step).

        Args:
            step: Optimizer updates done.
            files: Set name -> (tensor name, array) pairs, the same sets in the same order on every rank. Pairs are
                asked for one at a time, each written before the next, so a generator may gather them.
            state: JSON-able.
            keep_all: Remove no earlier checkpoint this time.

        Returns:
            The checkpoint's folder; None without a disk.

        Raises:
            CheckpointError: It could not be written (disk full, no permission). Earlier checkpoints are untouched.
        """
        if self.folder is None:
            for tensors in files.values():
                consume(tensors)
            return None
        target = self.folder / _name(step)
        remaining = dict(files)
        try:
            with atomic_folder(target) as tmp:
                records: dict[str, FileRecord] = {}
                for name in files:
                    tensors = remaining.pop(name)
                    records |= write_tensors(tmp, name, tensors, max_shard_bytes=self.max_shard_bytes)
                _write_state(tmp, step, state, records)
            self.mark_best()
        except OSError as error:
            for tensors in remaining.values():
                consume(tensors)
            raise CheckpointError(self._failure(step, error)) from error
        self._prune(step, keep_all)
        return target

    def holds(self, step: int) -> bool:
        """Whether a checkpoint of this step is there."""
        return self.folder is not None and (self.folder / _name(step) / MANIFEST_FILE).is_file()

    def open_step(self, step: int) -> Checkpoint:
        """Open the checkpoint of a step, after the same check as `newest`. Raises CheckpointError."""
        assert self.folder is not None, "only a rank with a disk reads"
        return open_checkpoint(self.folder / _name(step))

    def states(self) -> list[dict]:
        """The states of all checkpoints whose state can be read, the oldest first."""
        found = []
        for path in self._folders():
            try:
                found.append({**read_json(path / STATE_FILE)["state"]})
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return found

    def newest(
        self, notice: Callable[[str], None], wanted: Callable[[dict], bool] = lambda state: True
    ) -> Checkpoint | None:
        """The newest checkpoint that is whole and whose state is wanted, or None.

        Every file is read and compared with its recorded SHA-256. A checkpoint that is torn or was changed is named
        through `notice` and passed over.
        """
        for path in reversed(self._folders()):
            try:
                checkpoint = open_checkpoint(path)
                if wanted(checkpoint.state):
                    return checkpoint
            except CheckpointError as error:
                notice(f"{error} Trying the one before it.")
        return None

    def open(self, path: Path) -> Checkpoint:
        """Open one checkpoint after the same check as `newest`. Raises CheckpointError if it is not whole."""
        return open_checkpoint(path)

    def _folders(self) -> list[Path]:
        if self.folder is None or not self.folder.is_dir():
            return []
        named = [path for path in self.folder.iterdir() if path.is_dir() and STEP_NAME.fullmatch(path.name)]
        return sorted(named, key=_step_of)

    def _prune(self, step: int, keep_all: bool) -> None:
        """Called only once the checkpoint of `step` stands."""
        assert self.folder is not None, "a rank without a disk has nothing to prune"
        for leftover in self.folder.glob(f"step-*{TMP_SUFFIX}"):
            remove(leftover)
        older = []
        for path in self._folders():
            if _step_of(path) > step:
                remove(path)
            elif path.name != _name(step):
                older.append(path)
        if self.keep_last is None or keep_all:
            return
        # One whose sizes are wrong is not counted, so it never pushes out one that could still be used.
        usable = [path for path in older if _sizes_match(path)]
        kept = usable[max(0, len(usable) - (self.keep_last - 1)) :]
        for path in older:
            if path not in kept and _step_of(path) != self.pinned:
                remove(path)

    def _failure(self, step: int, error: OSError) -> str:
        assert self.folder is not None, "only a rank with a disk writes"
        names = ", ".join(path.name for path in self._folders()) or "none yet"
        return (
            f"The checkpoint of step {step} could not be written to {self.folder}: {explain(error, self.folder)}. "
            f"Earlier checkpoints are kept: {names}."
        )


def follow_best(path: Path) -> Path:
    """The checkpoint that a `best` file names; any other path as it is.

    Raises:
        CheckpointError: The file names no checkpoint.
    """
    if path.name != BEST_FILE or not path.is_file():
        return path
    name = path.read_text().strip()
    if not STEP_NAME.fullmatch(name):
        raise CheckpointError(f"{path} was changed: it names no checkpoint.")
    return path.with_name(name)


def open_checkpoint(path: Path) -> Checkpoint:
    """Check every file of a checkpoint (or of the one that `best` names) against its manifest, and open it.

    Raises:
        CheckpointError: A file is missing, torn or changed, or the folder is no checkpoint. The text names it.
    """
    path = follow_best(path)
    for name, written in _manifest(path).items():
        if not (path / name).is_file():
            raise CheckpointError(f"Checkpoint {path} is not whole: {name} is missing.")
        try:
            num_bytes = (path / name).stat().st_size
            # A file of another size is not read: it may be any size.
            is_same = num_bytes == written.num_bytes and file_record(path / name) == written
        except OSError as error:
            raise CheckpointError(f"Checkpoint {path}: {name} cannot be read: {error.strerror}.") from error
        if num_bytes != written.num_bytes:
            raise CheckpointError(
                f"Checkpoint {path} is not whole: {name} has {num_bytes} bytes, {written.num_bytes} were written."
            )
        if not is_same:
            raise CheckpointError(f"Checkpoint {path} was changed: the content of {name} is not what was written.")
    try:
        saved = read_json(path / STATE_FILE)
        return Checkpoint(path, int(saved["step"]), {**saved["state"]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"Checkpoint {path} was changed: {STATE_FILE} is not as written.") from error


def _write_state(folder: Path, step: int, state: dict, records: dict[str, FileRecord]) -> None:
    records[STATE_FILE] = write_json(folder / STATE_FILE, {"step": step, "state": state})
    manifest = {"format": MANIFEST_FORMAT, "files": {name: asdict(record) for name, record in records.items()}}
    write_json(folder / MANIFEST_FILE, manifest)


def _manifest(path: Path) -> dict[str, FileRecord]:
    try:
        manifest = read_json(path / MANIFEST_FILE)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a whole checkpoint: it has no {MANIFEST_FILE}.") from None
    except (OSError, ValueError):
        raise CheckpointError(f"Checkpoint {path} is not whole: {MANIFEST_FILE} is torn.") from None
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise CheckpointError(f"Checkpoint {path} is not of format {MANIFEST_FORMAT}, which this version reads.")
    try:
        return {name: FileRecord(**record) for name, record in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"Checkpoint {path} was changed: {MANIFEST_FILE} is not as written.") from None


def _sizes_match(path: Path) -> bool:
    """Whether all files are there with their recorded sizes: a check that is cheap enough after every save."""
    try:
        records = _manifest(path)
    except CheckpointError:
        return False
    return all((path / name).is_file() and (path / name).stat().st_size == r.num_bytes for name, r in records.items())


def _name(step: int) -> str:
    return f"step-{step:07d}"


def _step_of(path: Path) -> int:
    match = STEP_NAME.fullmatch(path.name)
    assert match is not None, f"{path.name} is not a checkpoint's name"
    return int(match.group(1))
