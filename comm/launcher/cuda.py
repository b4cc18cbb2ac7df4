"""NVIDIA GPUs of this host, as the launcher sees them: it imports no MLX."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("mlx-cuda-12", "mlx-cuda-13")


def num_gpus(folder: str = "/proc/driver/nvidia/gpus") -> int:
    """How many GPUs MLX can use here: those of NVIDIA's driver, 0 where MLX's CUDA build is not installed."""
    if not any(_is_installed(name) for name in PACKAGES):
        return 0
    path = Path(folder)
    return len(list(path.iterdir())) if path.is_dir() else 0


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
