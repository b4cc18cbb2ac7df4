"""Checkpoint folders: whole or absent, checked before use, pruned without losing the last usable one."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from safetensors import safe_open

from trainer.checkpoint.folder import CheckpointError, CheckpointFolder, open_checkpoint
from trainer.files.storage import atomic_file, file_record
from trainer.files.tensor_files import write_tensors


def tensors_of(step: int) -> dict[str, mx.array]:
    return {
        "layers.0.weight": mx.full((3, 4), step, dtype=mx.bfloat16),
        "layers.0.bias": mx.arange(5, dtype=mx.float32) + step,
        "count": mx.array(step, dtype=mx.uint64),
        "flags": mx.array([True, False]),
        "empty": mx.zeros((0, 2)),
    }


def save(folder: CheckpointFolder, step: int, state: dict | None = None) -> Path:
    tensors = tensors_of(step)
    path = folder.save(step, {"weights": tensors.items(), "optimizer": iter(tensors.items())}, state or {"epoch": 1})
    assert path is not None
    return path


def steps_in(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    """A dtype, shape, scalar or state value that changes on its way through the disk."""
    folder = CheckpointFolder(tmp_path, keep_last=2)
    save(folder, 100, {"epoch": 3, "mesh": {"tp": 2}, "loss": 0.1})
    found = folder.newest(pytest.fail)
    assert found is not None
    assert (found.step, found.state) == (100, {"epoch": 3, "mesh": {"tp": 2}, "loss": 0.1})
    for name in ("weights", "optimizer"):
        loaded = found.tensors(name)
        for key, value in tensors_of(100).items():
            assert (loaded[key].dtype, loaded[key].shape) == (value.dtype, value.shape), key
            assert mx.array_equal(loaded[key], value), key
    with pytest.raises(KeyError, match="gradients"):
        found.tensors("gradients")


def test_files_open_with_the_safetensors_package(tmp_path: Path) -> None:
    """A header that MLX forgives and everyone else's reader refuses."""
    path = save(CheckpointFolder(tmp_path, keep_last=None), 7)
    with safe_open(path / "weights.safetensors", framework="numpy") as file:
        assert set(file.keys()) == set(tensors_of(7))
        assert file.get_tensor("layers.0.bias").tolist() == [7, 8, 9, 10, 11]
        assert file.get_tensor("count").item() == 7


def test_equal_saves_give_equal_bytes(tmp_path: Path) -> None:
    """Time, paths or dictionary order that leak into the files."""
    first = save(CheckpointFolder(tmp_path / "here", keep_last=None), 5, {"a": 1, "b": 2})
    second = save(CheckpointFolder(tmp_path / "there", keep_last=None), 5, {"b": 2, "a": 1})
    assert steps_in(first) == steps_in(second)
    for name in steps_in(first):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_tensors_are_evaluated_one_at_a_time_in_order(tmp_path: Path) -> None:
    """A writer that gathers everything before the first byte, or in another order than the other ranks."""
    big = 4 * 2**20

    def gathers() -> Iterator[tuple[str, mx.array]]:
        for index in range(16):
            full = mx.full((big // 4,), index, dtype=mx.float32) * 2
            mx.eval(full)
            yield f"tensor.{index}", full

    folder = CheckpointFolder(tmp_path, keep_last=1, max_shard_bytes=8 * big)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    path = folder.save(1, {"weights": gathers()}, {})
    assert mx.get_peak_memory() - before <= 3 * big, "16 tensors were held at once"
    assert path is not None
    shards = [name for name in steps_in(path) if name.endswith(".safetensors")]
    assert shards == ["weights-00001-of-00002.safetensors", "weights-00002-of-00002.safetensors"]
    found = folder.open(path).tensors("weights")
    assert [found[f"tensor.{i}"][0].item() for i in range(16)] == [2 * i for i in range(16)]


def test_many_tensors_in_little_room_for_the_header(tmp_path: Path) -> None:
    """A header that runs into the first tensor."""
    tensors = {f"layers.{i}.weight": mx.full((3,), i) for i in range(40)}
    records = write_tensors(tmp_path, "weights", tensors.items(), header_room_bytes=1024)
    assert len(records) > 3
    loaded = {key: value for name in records for key, value in mx.load(str(tmp_path / name)).items()}
    assert set(loaded) == set(tensors)
    assert all(mx.array_equal(loaded[key], value) for key, value in tensors.items())
    with pytest.raises(ValueError, match="two tensors are named 'a'"):
        write_tensors(tmp_path, "twice", [("a", mx.zeros(1)), ("a", mx.ones(1))])


def test_rank_without_a_disk_evaluates_the_same_tensors(tmp_path: Path) -> None:
    """Ranks other than 0 that skip the gathers rank 0 waits for, or that write files."""
    seen = []

    def gathers(name: str) -> Iterator[tuple[str, mx.array]]:
        for index in range(3):
            seen.append(f"{name}.{index}")
            yield f"{name}.{index}", mx.zeros(2**20) + index

    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    folder = CheckpointFolder(None, keep_last=1)
    assert folder.save(1, {"weights": gathers("w"), "optimizer": gathers("o")}, {}) is None
    assert seen == ["w.0", "w.1", "w.2", "o.0", "o.1", "o.2"]
    assert 4 * 2**20 <= mx.get_peak_memory() - before < 12 * 2**20, "evaluated one at a time"
    assert folder.newest(pytest.fail) is None
    assert steps_in(tmp_path) == []


def test_keeps_the_last_ones_and_the_pinned_one(tmp_path: Path) -> None:
    """Pruning one too many or too few, or the best checkpoint."""
    folder = CheckpointFolder(tmp_path, keep_last=2)
    save(folder, 100)
    folder.pin(100)
    for step in (200, 300, 400):
        save(folder, step)
    assert steps_in(tmp_path) == ["best", "step-0000100", "step-0000300", "step-0000400"]
    assert open_checkpoint(tmp_path / "best").step == 100
    folder.pin(None)
    save(folder, 500)
    assert steps_in(tmp_path) == ["step-0000400", "step-0000500"]
    with pytest.raises(ValueError, match="keep_last is 0"):
        CheckpointFolder(tmp_path, keep_last=0)


def test_torn_checkpoint_does_not_push_out_a_whole_one(tmp_path: Path) -> None:
    """Counting a torn checkpoint among the kept, so that the last usable one goes."""
    folder = CheckpointFolder(tmp_path, keep_last=2)
    save(folder, 100)
    torn = save(folder, 200)
    os.truncate(torn / "weights.safetensors", 20)
    save(folder, 300)
    assert steps_in(tmp_path) == ["step-0000100", "step-0000300"]


def test_later_steps_of_a_left_future_go(tmp_path: Path) -> None:
    """A run started again from step 100 that later resumes from step 300 of the run it replaced."""
    folder = CheckpointFolder(tmp_path, keep_last=None)
    for step in (100, 200, 300):
        save(folder, step)
    save(folder, 150)
    assert steps_in(tmp_path) == ["step-0000100", "step-0000150"]


def damage_missing(path: Path) -> None:
    (path / "optimizer.safetensors").unlink()


def damage_size(path: Path) -> None:
    os.truncate(path / "optimizer.safetensors", 50)


def damage_content(path: Path) -> None:
    with open(path / "weights.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x07")


def damage_state(path: Path) -> None:
    (path / "state.json").write_text((path / "state.json").read_text().replace("200", "900"))


def damage_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[: len(text) // 2])


def damage_manifest_gone(path: Path) -> None:
    (path / "manifest.json").unlink()


def damage_manifest_entries(path: Path) -> None:
    (path / "manifest.json").write_text(json.dumps({"format": 1, "files": {"state.json": 5}}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_missing, "optimizer.safetensors is missing"),
        (damage_size, "optimizer.safetensors has 50 bytes"),
        (damage_content, "the content of weights.safetensors is not what was written"),
        (damage_state, "the content of state.json is not what was written"),
        (damage_manifest, "manifest.json is torn"),
        (damage_manifest_gone, "it has no manifest.json"),
        (damage_manifest_entries, "manifest.json is not as written"),
    ],
)
def test_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path, damage, words: str) -> None:
    """Resuming from a torn or tampered checkpoint, or skipping it without a word."""
    folder = CheckpointFolder(tmp_path, keep_last=3)
    save(folder, 100)
    damage(save(folder, 200))
    notices: list[str] = []
    found = folder.newest(notices.append)
    assert found is not None
    assert found.step == 100
    assert len(notices) == 1
    assert words in notices[0]
    assert "step-0000200" in notices[0]
    with pytest.raises(CheckpointError, match="step-0000200"):
        folder.open(tmp_path / "step-0000200")


def test_leftovers_are_ignored_and_removed(tmp_path: Path) -> None:
    """A half-written folder that is taken for a checkpoint, or that stays for ever."""
    folder = CheckpointFolder(tmp_path, keep_last=3)
    (tmp_path / "step-0000900.tmp").mkdir()
    (tmp_path / "step-0000900.tmp" / "weights.safetensors").write_bytes(b"half")
    (tmp_path / "notes").mkdir()
    assert folder.newest(pytest.fail) is None
    save(folder, 100)
    assert steps_in(tmp_path) == ["notes", "step-0000100"]


def test_full_disk_is_one_error_and_loses_nothing(tmp_path: Path) -> None:
    """A failed save that leaves a torn folder, harms an earlier one, or leaves other ranks waiting in a gather."""
    folder = CheckpointFolder(tmp_path, keep_last=1)
    save(folder, 100)
    evaluated = []

    def gathers() -> Iterator[tuple[str, mx.array]]:
        for index in range(4):
            evaluated.append(index)
            yield f"tensor.{index}", mx.zeros(1024) + index

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        with pytest.raises(CheckpointError) as caught:
            folder.save(200, {"weights": gathers(), "optimizer": gathers()}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
    text = str(caught.value)
    assert "step 200 could not be written" in text
    assert "GiB free" in text
    assert "Earlier checkpoints are kept: step-0000100." in text
    assert evaluated == [0, 1, 2, 3] * 2
    assert steps_in(tmp_path) == ["step-0000100"]
    found = folder.newest(pytest.fail)
    assert found is not None
    assert found.step == 100


def test_no_permission_is_one_error(tmp_path: Path) -> None:
    """A traceback instead of a sentence when the folder's place is taken by a file."""
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="step 1 could not be written"):
        save(CheckpointFolder(tmp_path / "checkpoints", keep_last=1), 1)


KILLED = """
import sys
from pathlib import Path
import mlx.core as mx
from trainer.checkpoint.folder import CheckpointFolder
folder = CheckpointFolder(Path(sys.argv[1]), keep_last=2)
tensors = {f"t{i}": mx.full((50_000,), i) for i in range(20)}
for step in range(1, 10_000):
    folder.save(step, {"weights": tensors.items()}, {"step": step})
    print(step, flush=True)
"""


def test_killed_while_saving(tmp_path: Path) -> None:
    """SIGKILL in the middle of a save that leaves no whole checkpoint, or loses one that was reported as saved."""
    for _ in range(3):
        worker = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert worker.stdout is not None
        reported = 0
        for line in worker.stdout:
            reported = int(line)
            if reported == 5:
                worker.send_signal(signal.SIGKILL)
        worker.wait()
        worker.stdout.close()
        found = CheckpointFolder(tmp_path, keep_last=2).newest(pytest.fail)
        assert found is not None
        assert found.step >= reported
        assert found.tensors("weights")["t3"][0].item() == 3


def test_files_that_nobody_wrote_are_not_read(tmp_path: Path) -> None:
    """Catches a stray shard whose tensors take the place of the checkpoint's, though its own files are whole."""
    path = save(CheckpointFolder(tmp_path, None), 1)
    expected = {name: tensor.tolist() for name, tensor in open_checkpoint(path).tensors("weights").items()}
    stray = {name: mx.zeros_like(mx.array(tensor)) for name, tensor in expected.items()}
    mx.save_safetensors(str(path / "weights-00002-of-00002.safetensors"), stray | {"more": mx.zeros(1)})
    found = {name: tensor.tolist() for name, tensor in open_checkpoint(path).tensors("weights").items()}
    assert found == expected


def test_a_link_in_the_way_is_not_written_through(tmp_path: Path) -> None:
    """Catches a file elsewhere that a planted link lets a run overwrite."""
    other = tmp_path / "other"
    other.write_text("untouched")
    (tmp_path / "file.tmp").symlink_to(other)
    with atomic_file(tmp_path / "file") as file:
        file.write_text("new")
    assert other.read_text() == "untouched" and (tmp_path / "file").read_text() == "new"
    assert not (tmp_path / "file").is_symlink()


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"step": "x", "state": {}}', '{"step": 1, "state": []}', "[" * 100_000])
def test_a_state_of_another_shape(tmp_path: Path, content: str) -> None:
    """Catches a traceback for a state that somebody has written, its digest included."""
    path = save(CheckpointFolder(tmp_path, None), 1)
    (path / "state.json").write_text(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = vars(file_record(path / "state.json"))
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="state.json is not as written"):
        open_checkpoint(path)


def test_a_file_of_another_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches minutes of hashing for a file whose size alone says that it is not the one that was written."""
    path = save(CheckpointFolder(tmp_path, None), 1)
    with open(path / "weights.safetensors", "ab") as file:
        file.truncate(60 * 2**30)  # takes no room
    with pytest.raises(CheckpointError, match="weights.safetensors has 64424509440 bytes"):
        open_checkpoint(path)
