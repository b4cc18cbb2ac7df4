"""NVIDIA GPUs of this host, as the launcher sees them: it imports no MLX."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("mlx-cuda-12", "mlx-cuda-13")


def visible_gpus(environ: Mapping[str, str], folder: str = "/proc/driver/nvidia/gpus") -> list[str]:
    """The GPUs that MLX can use here, as `CUDA_VISIBLE_DEVICES` names them; none without MLX's CUDA build.

    Args:
        environ: Its `CUDA_VISIBLE_DEVICES`, where set, leaves only those.
        folder: Where NVIDIA's driver lists all.
    """
    if not any(_is_installed(name) for name in PACKAGES):
        return []
    if "CUDA_VISIBLE_DEVICES" in environ:
        return [name for name in environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    path = Path(folder)
    return [str(number) for number in range(len(list(path.iterdir())))] if path.is_dir() else []


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
