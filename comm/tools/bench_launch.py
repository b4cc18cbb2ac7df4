"""`python -m comm bench --launchers`: our launcher against `mlx.launch`, on this machine.

Each starts four ring ranks that do one all_sum and end; in turn, so that other load hits both.
"""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from comm.launcher.launch import agent_environment

NUM_RANKS = 4
PROGRAM = """
import mlx.core as mx
group = mx.distributed.init(strict=True, backend="ring")
mx.eval(mx.distributed.all_sum(mx.ones((1,)), group=group, stream=mx.cpu))
"""


def compare_launchers(num_repeats: int) -> dict[str, float]:
    """Median seconds of each, and the median of `mlx.launch`'s time by ours.

    Raises:
        ValueError: Mlx.launch is not installed.
    """
    beside = Path(sys.executable).parent / "mlx.launch"
    other = str(beside) if beside.exists() else shutil.which("mlx.launch")
    if not other:
        raise ValueError("mlx.launch is not installed, so there is nothing to compare with.")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "program.py")
        program.write_text(PROGRAM)
        command = [sys.executable, str(program)]
        ours = [sys.executable, "-m", "comm", "launch", "-n", str(NUM_RANKS), "--", *command]
        theirs = [other, "-n", str(NUM_RANKS), *command]
        rounds = [(_seconds(ours), _seconds(theirs)) for _ in range(num_repeats)]
    return {
        "comm_launch_seconds": statistics.median(mine for mine, _ in rounds),
        "mlx_launch_seconds": statistics.median(their for _, their in rounds),
        "mlx_by_comm": statistics.median(their / mine for mine, their in rounds),
    }


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(
        command, check=True, env=agent_environment(), stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return time.perf_counter() - start
