"""Groups, meshes and collectives that behave alike on every MLX backend.

Names are loaded on first use, so `import comm` and `python -m comm --help` cost nothing.
MLX does the communication; this package adds what each backend lacks, gradients, fused
reduction, a watchdog and a launcher. Jupyter has a package of the same name, whose names work
here too (`comm.jupyter`).
"""

from importlib import import_module
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from comm.autograd import (
        copy_to_group as copy_to_group,
        gather_from_shards as gather_from_shards,
        gather_over_group as gather_over_group,
        recv_forward as recv_forward,
        reduce_scatter_over_group as reduce_scatter_over_group,
        scatter_over_group as scatter_over_group,
        send_forward as send_forward,
        sum_over_group as sum_over_group,
    )
    from comm.backend import init as init
    from comm.capabilities import CAPABILITIES as CAPABILITIES, Capabilities as Capabilities
    from comm.ending import is_lost_peer as is_lost_peer, leave as leave
    from comm.fusion import GradientFusion as GradientFusion
    from comm.group import Group as Group, solo as solo
    from comm.link import LinkFit as LinkFit, measure_link as measure_link
    from comm.mesh import Mesh as Mesh
    from comm.mesh_shape import MeshShape as MeshShape
    from comm.objects import all_gather_object as all_gather_object, broadcast_object as broadcast_object
    from comm.typed import (
        CustomFunction as CustomFunction,
        custom_function as custom_function,
        integers as integers,
        named_arrays as named_arrays,
        number as number,
    )


__path__ = extend_path(__path__, __name__)  # this folder first, then Jupyter's, where it is another

_HOME = {
    "CAPABILITIES": "capabilities",
    "Capabilities": "capabilities",
    "CustomFunction": "typed",
    "GradientFusion": "fusion",
    "Group": "group",
    "LinkFit": "link",
    "Mesh": "mesh",
    "MeshShape": "mesh_shape",
    "init": "backend",
    "integers": "typed",
    "is_lost_peer": "ending",
    "leave": "ending",
    "solo": "group",
    "all_gather_object": "objects",
    "broadcast_object": "objects",
    "copy_to_group": "autograd",
    "custom_function": "typed",
    "gather_from_shards": "autograd",
    "gather_over_group": "autograd",
    "measure_link": "link",
    "named_arrays": "typed",
    "number": "typed",
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
