"""The machine of a run: how its cores are used, and facts for reports (no host name, no path, no time)."""

import os
import platform
from importlib.metadata import version

import mlx.core as mx

from parallel import RowThreads
from trainer import __version__
from trainer.blas import one_blas_thread

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
    if "memory_size" in info:
        facts["memory_gib"] = round(info["memory_size"] / 2**30, 1)
    return facts


def row_threads(num_ranks: int) -> RowThreads | None:
    """Threads for the rows of a micro-batch where MLX computes on a CPU with more than one core for each rank.

    Args:
        num_ranks: Ranks of the run; they are taken to share this machine.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_threads = cores // num_ranks
    if mx.default_device() != mx.cpu or num_threads < 2:
        return None
    return RowThreads(num_threads, around=one_blas_thread)
