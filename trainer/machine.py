"""What a run ran on, for reports: device, memory, versions, ranks. No host name, no path, no time."""

import os
import platform
from importlib.metadata import version

import mlx.core as mx

from trainer import __version__

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
