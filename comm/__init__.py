"""Groups, meshes and collectives that behave alike on every MLX backend.

Names are loaded on first use, so `import comm` and `python -m comm --help` cost nothing.
MLX does the communication; this package adds what each backend lacks, gradients, fused
reduction, a watchdog and a launcher. Jupyter has a package of the same name, whose names work
here too (`comm.jupyter`).
"""

from importlib import import_module
from pkgutil import extend_path
from typing import Any

__path__ = extend_path(__path__, __name__)  # this folder first, then Jupyter's, where it is another

_HOME = {
    "CAPABILITIES": "capabilities",
    "Capabilities": "capabilities",
    "GradientFusion": "fusion",
    "Group": "group",
    "LinkFit": "link",
    "Mesh": "mesh",
    "MeshShape": "mesh_shape",
    "init": "backend",
    "is_lost_peer": "ending",
    "leave": "ending",
    "solo": "group",
    "all_gather_object": "objects",
    "broadcast_object": "objects",
    "copy_to_group": "autograd",
    "gather_from_shards": "autograd",
    "gather_over_group": "autograd",
    "measure_link": "link",
    "recv_forward": "autograd",
    "reduce_scatter_over_group": "autograd",
    "scatter_over_group": "autograd",
    "send_forward": "autograd",
    "sum_over_group": "autograd",
}
_JUPYTER_HOME = {"create_comm": "jupyter", "get_comm_manager": "jupyter"}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    home = (_HOME | _JUPYTER_HOME).get(name)
    if home is None:
        raise AttributeError(f"module 'comm' has no attribute {name!r}")
    try:
        module = import_module(f"comm.{home}")
    except ImportError as error:
        if error.name == "comm.base_comm":
            raise AttributeError(f"comm.{name} is Jupyter's; it needs ipykernel installed.") from None
        if "mlx" not in str(error):
            raise
        raise ImportError(
            "comm needs an MLX backend: pip install -e '.[cpu]' on Linux, "
            "'.[cuda12]' or '.[cuda13]' with an NVIDIA GPU, or `mlx` itself on a Mac."
        ) from None
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
