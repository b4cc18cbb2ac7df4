"""Programs on several machines with network stacks of their own: starting, cables, and machines that go away."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from machines import Desk, why_not

from ranks import slowness
from trainer.metrics.records import read_records

ROOT = Path(__file__).parents[2]
JOB = str(ROOT / "tests" / "comm" / "workers" / "job.py")
STEPS = str(Path(__file__).parent / "workers" / "steps.py")
TIMEOUT_SECONDS = 5


@pytest.fixture
def make_desk() -> Iterator[Callable[..., Desk]]:
    """Makes desks that are taken down after the test."""
    if reason := why_not():
        pytest.skip(reason)
    made: list[Desk] = []

    def make(count: int, cables: int = 0) -> Desk:
        made.append(Desk(count, cables))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("cables", [0, 1])
def test_three_machines_from_a_fourth(make_desk: Callable[..., Desk], tmp_path: Path, cables: int) -> None:
    """Catches control traffic on a cable, which only its two ends reach."""
    job = launch(make_desk(3, cables), tmp_path, JOB, "sum")
    output, _ = job.communicate(timeout=120 * slowness())
    assert job.returncode == 0, output
    assert output.count("of 3 on ring: 3.0") == 3, output


@pytest.mark.parametrize("cables", [1, 2])
def test_a_pair_of_neighbours_uses_all_their_cables(make_desk: Callable[..., Desk], tmp_path: Path, cables: int) -> None:
    """Catches a sub-group that half runs over the control network, or fails as its ranks have unequally many addresses."""
    desk = make_desk(3, cables)
    # MLX connects one cable after the other, and waits for seconds where the next is not listened on yet.
    job = launch(desk, tmp_path, str(Path(__file__).parent / "workers" / "pair.py"), seconds=30)
    output, _ = job.communicate(timeout=120 * slowness())
    assert job.returncode == 0, output
    found = [json.loads(line.split("PAIR ")[1]) for line in output.splitlines() if "PAIR " in line]
    ends = [[f"10.78.{number}.{end}" for number in range(cables)] for end in (1, 2)]
    assert sorted(found, key=str) == [[3.0, ends], [3.0, ends], [4.0, None]], output


def test_mlx_launch_on_a_ring_of_cables(make_desk: Callable[..., Desk], tmp_path: Path) -> None:
    """Catches a watchdog that ends a healthy job, because two machines without a cable do not reach each other."""
    desk = make_desk(3, cables=1)
    command = [
        str(Path(sys.executable).parent / "mlx.launch"), "--hostfile", hostfile(desk, tmp_path), "--backend", "ring",
        "--python", sys.executable, "--cwd", str(ROOT), "--env", f"PYTHONPATH={ROOT}", JOB, "sum",
    ]  # fmt: skip
    # mlx.launch calls `ssh` by name.
    (tmp_path / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/{desk.ssh} "$@"\n')
    (tmp_path / "ssh").chmod(0o755)
    job = desk.start("env", f"PATH={tmp_path}:/usr/bin:/bin", *command)
    output, _ = job.communicate(timeout=120 * slowness())
    assert output.count("of 3 on ring: 3.0") == 3, output


def test_a_machine_that_vanishes(make_desk: Callable[..., Desk], tmp_path: Path) -> None:
    """Catches a launcher that waits for ever for the connection to a machine without power."""
    desk = make_desk(2)
    job = launch(desk, tmp_path, STEPS)
    seconds, output = after(job, 2, lambda: desk.unplug(1))
    assert job.returncode not in (0, None), output
    assert seconds < TIMEOUT_SECONDS + 10, f"{seconds:.1f} s\n{output}"
    assert "10.77.0.2" in output, output


@pytest.mark.usefixtures("exhaustive")
def test_a_cable_that_is_pulled_out(make_desk: Callable[..., Desk], tmp_path: Path) -> None:
    """Catches a message that blames every rank where one cable is at fault."""
    desk = make_desk(3, cables=1)
    job = launch(desk, tmp_path, STEPS)
    seconds, output = after(job, 3, lambda: desk.cut(1))
    assert job.returncode not in (0, None), output
    assert seconds < TIMEOUT_SECONDS + 10, f"{seconds:.1f} s\n{output}"
    assert "gets no answer from rank 2" in output, output


@pytest.mark.usefixtures("exhaustive")
@pytest.mark.parametrize("cables", [0, 1, 2])
@pytest.mark.parametrize("mesh", ["dp_replicate=4", "dp_shard=2", "tp=2", "pp=4", "{pp: 2, tp: 2}"])
def test_meshes_train_as_one_machine_does(make_desk: Callable[..., Desk], tmp_path: Path, cables: int, mesh: str) -> None:
    """Catches groups of ranks that meet at addresses which only some machines reach, or that mix up their members."""
    setting = f"parallel={mesh}" if mesh.startswith("{") else f"parallel.{mesh}"
    recipe = [
        "trainer", str(ROOT / "recipes" / "quickstart.yaml"), "max_steps=2", "logging.every=1", "global_batch_size=8",
        "batch_size_per_device=1", "optimizer.name=adamw", "eval.generate=0", "eval.exact_match=false",
    ]  # fmt: skip
    words = ("-m", *recipe, setting, f"output_dir={tmp_path}/desk")
    job = launch(make_desk(4, cables), tmp_path, *words, seconds=TIMEOUT_SECONDS if cables < 2 else 60)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    subprocess.run([sys.executable, "-m", *recipe, f"output_dir={tmp_path}/alone"], cwd=ROOT, check=True, timeout=300)
    losses = [
        [row[key] for row in read_records(tmp_path / name / "metrics.jsonl") for key in ("train/loss", "eval/loss") if key in row]
        for name in ("desk", "alone")
    ]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_doctor_asks_the_interpreter_of_the_job(make_desk: Callable[..., Desk], tmp_path: Path) -> None:
    """Catches a doctor that looks at another Python than the job's, or at the launcher's machine alone."""
    desk = make_desk(2)
    command = [sys.executable, "-m", "comm", "doctor", "--hostfile", hostfile(desk, tmp_path), "--ssh", desk.ssh]
    output, _ = desk.start(*command, "--python", sys.executable, cwd=ROOT).communicate(timeout=120)
    assert output.count(" answers") == 2 and "ports are free" in output and "fail" not in output, output
    output, _ = desk.start(*command, "--python", "/no/python", cwd=ROOT).communicate(timeout=120)
    assert output.count("does not answer") == 2 and "/no/python" in output, output


def after(job: "subprocess.Popen[str]", count: int, fault: Callable[[], None]) -> tuple[float, str]:
    """Waits until `count` ranks are under way; gives the seconds from the fault to the job's end, and its output."""
    output = ""
    while output.count("under way") < count:
        line = job.stdout.readline()
        assert line, f"the job ended before the fault:\n{output}"
        output += line
    fault()
    began = time.monotonic()
    rest, _ = job.communicate(timeout=120 * slowness())
    return time.monotonic() - began, output + rest


def hostfile(desk: Desk, folder: Path) -> str:
    path = folder / "hosts.json"
    path.write_text(json.dumps(desk.hosts()))
    return str(path)


def launch(desk: Desk, folder: Path, *command: str, seconds: float = TIMEOUT_SECONDS) -> "subprocess.Popen[str]":
    return desk.start(
        sys.executable, "-m", "comm", "launch", "--hostfile", hostfile(desk, folder), "--ssh", desk.ssh,
        "--python", sys.executable, "--cwd", str(ROOT), "--timeout", str(seconds), "--",
        "env", f"PYTHONPATH={ROOT}", sys.executable, *command, cwd=ROOT,
    )  # fmt: skip
