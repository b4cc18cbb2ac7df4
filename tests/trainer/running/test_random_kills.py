"""Whatever is killed, and whenever: started again until it is done, a run leaves what an undisturbed one leaves.

200 kills in parts of 10, each a test. Killed are ranks, the launcher and its agents, while starting, in steps,
evaluations, checkpoints and the result.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ranks import MORTAL, ROOT, slowness
from tiny_recipes import tiny_recipe, write_rows
from trainer.metrics.records import read_records
from trainer.recipe.load import to_yaml

PARTS, KILLS_PER_PART = 20, 10
ALONE = range(16, 20)  # parts without a launcher
LAUNCH = ("-m", "comm", "launch", "-n", "2", "--timeout", "10", "--max-restarts", "2", "--", sys.executable)
STEPS = 150


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows for all runs."""
    return write_rows(tmp_path_factory.mktemp("rows"))


def command_for(rows: Path, folder: Path, is_alone: bool) -> list[str]:
    """The command of a run in `folder`; the one that is given again and again."""
    shape = {
        "max_steps": STEPS,
        "data": {"val_fraction": 0.2},
        "lora": {"dropout": 0.2},
        "eval": {"every": 10},
        "checkpoint": {"every": 3, "keep_last": 2},
    }
    folder.mkdir()
    path = folder / "recipe.yaml"
    path.write_text(to_yaml(tiny_recipe(rows, folder / "run", **shape)))
    launch = () if is_alone else LAUNCH
    return [*MORTAL, str(os.getpid()), sys.executable, *launch, "-m", "trainer", str(path)]


@contextmanager
def started(command: list[str], folder: Path) -> Iterator[subprocess.Popen]:
    """The job, its output at the end of a file; none of its processes is left afterwards."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (folder / "output").open("ab") as output:
        job = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield job
    finally:
        job.kill()
        job.wait()
        deadline = time.monotonic() + 10 * slowness()
        while left := processes_of(folder):
            assert time.monotonic() < deadline, f"processes {left} are left behind"
            time.sleep(0.05)


def processes_of(folder: Path) -> list[int]:
    """All processes that have `folder` on their command line, and the agents that started them."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() not in path.read_bytes():
                continue
            found.add(int(path.parent.name))
            parent = int((path.parent / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if b"comm.agent" in Path(f"/proc/{parent}/cmdline").read_bytes():
                found.add(parent)
        except OSError:
            continue  # has ended since
    return sorted(found)


def run_with_kills(
    command: list[str], folder: Path, chooser: random.Random, num_kills: int, longest_seconds: float
) -> int:
    """Runs to the end, with up to `num_kills` kills, at most `longest_seconds` apart; returns how many there were."""
    done = 0
    while True:
        with started(command, folder) as job:
            while done < num_kills:
                try:
                    job.wait(timeout=chooser.uniform(0, longest_seconds))
                    break
                except subprocess.TimeoutExpired:
                    done += kill_one(chooser, processes_of(folder))
            code = job.wait(timeout=120 * slowness())
        if code == 0:
            return done
        shown = (folder / "output").read_text(errors="replace")
        assert done and code != 2 and "Traceback" not in shown, f"exit code {code}\n{shown[-6000:]}"


def kill_one(chooser: random.Random, pids: list[int]) -> int:
    """Kills one of the processes; returns how many were killed, as it may have ended meanwhile."""
    try:
        os.kill(chooser.choice(pids), signal.SIGKILL)
    except (IndexError, ProcessLookupError):
        return 0
    return 1


def left_by(folder: Path) -> dict[str, bytes | None]:
    """Names of all files of a run, and the bytes of its weights."""
    files = [path for path in sorted((folder / "run").rglob("*")) if path.is_file()]
    named = {str(path.relative_to(folder)): path for path in files}
    return {name: path.read_bytes() if path.suffix == ".safetensors" else None for name, path in named.items()}


def assert_left_alike(folder: Path, whole: Path) -> None:
    """The same files and weights; the older of two checkpoints may be one of another step, that a signal asked for."""
    left, expected = left_by(folder), left_by(whole)
    step, usual = (min((each / "run" / "checkpoints").glob("step-*")).name for each in (folder, whole))
    if step != usual:
        left = {name.replace(step, usual): None if step in name else content for name, content in left.items()}
        expected = {name: None if usual in name else content for name, content in expected.items()}
    assert left == expected


def curve(folder: Path) -> list[tuple[float | None, ...]]:
    """(step, loss, norm, validation loss) of every row of metrics."""
    keys = ("train/global_step", "train/loss", "train/grad_norm", "eval/loss")
    return [tuple(row.get(key) for key in keys) for row in read_records(folder / "run" / "metrics.jsonl")]


@pytest.mark.usefixtures("exhaustive")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("part", range(PARTS))
def test_random_kills_change_nothing(rows: Path, tmp_path: Path, part: int) -> None:
    """Catches what only some moment shows: files that are half there, state that is lost, locks and processes that stay."""
    chooser, is_alone = random.Random(part), part in ALONE
    whole = tmp_path / "whole"
    began = time.monotonic()
    assert run_with_kills(command_for(rows, whole, is_alone), whole, chooser, 0, 0.0) == 0
    whole_seconds = time.monotonic() - began
    num_kills = num_runs = 0
    while num_kills < KILLS_PER_PART:
        folder = tmp_path / f"run-{num_runs}"
        left = KILLS_PER_PART - num_kills
        num_kills += run_with_kills(command_for(rows, folder, is_alone), folder, chooser, left, whole_seconds)
        num_runs += 1
        assert_left_alike(folder, whole)
        assert curve(folder) == curve(whole)
    print(f"{num_kills} kills in {num_runs} runs; undisturbed {whole_seconds:.1f} s")
