"""The machine of a run: how its cores are used, and facts for reports (no host name, no path, no time)."""

import os
import platform
import socket
from functools import cache
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

import comm
from parallel import RowThreads
from trainer import __version__
from trainer.machine.blas import one_blas_thread

MACHINE_FILE = "machine.json"


def machine_facts(num_devices: int, backend: str, mesh: dict[str, int]) -> dict[str, object]:
    """Facts about rank 0's machine, JSON-able.

    Args:
        num_devices: Ranks of the run.
        backend: Communication backend of the world.
        mesh: Size of each mesh axis by name.
    """
    info = mx.device_info()
    facts: dict[str, object] = {
        "device": info.get("device_name", info.get("architecture", platform.machine())),
        "mlx_device": mx.default_device().type.name,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "num_devices": num_devices,
        "backend": backend,
        "mesh": mesh,
        "python": platform.python_version(),
        "mlx_trainer": __version__,
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
    }
    if memory := info.get("memory_size", info.get("total_memory")):  # Metal's name and CUDA's
        facts["memory_gib"] = round(int(memory) / 2**30, 1)
    return facts


def row_threads(world: comm.Group) -> RowThreads | None:
    """Threads for the rows of a micro-batch where MLX computes on a CPU with more than one core for each rank.

    Args:
        world: All ranks; every one must call this.
    """
    here = socket.gethostname()
    ranks_here = comm.all_gather_object(here, world).count(here)
    num_threads = usable_cores() // ranks_here
    if mx.default_device() != mx.cpu or num_threads < 2:
        return None
    return _shared_threads(num_threads)


def usable_cores(quota_file: str = "/sys/fs/cgroup/cpu.max") -> int:
    """Cores that this process may use: those it is bound to, and no more than its container's share of time.

    Args:
        quota_file: Microseconds of CPU time per period and the period, of Linux's control groups (version 2).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path(quota_file).read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return cores


@cache
def _shared_threads(num_threads: int) -> RowThreads:
    """The same for all runs of a process, as MLX does not give back the streams of threads that have ended."""
    return RowThreads(num_threads, around=one_blas_thread)
