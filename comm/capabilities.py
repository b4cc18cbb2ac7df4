"""What each MLX backend can do, as data.

Everything in `comm` that differs between backends reads this table; no other file names a
backend to decide what to call. Read from MLX 0.32's sources; the entries for MPI and ring are
also held by tests. No MLX import, so tools can read it without a backend.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class Capabilities:
    """One row of the table.

    Attributes:
        name: The name that `mx.distributed.init` knows.
        split: MLX can split a group; otherwise further ring groups are made.
        reduce_scatter: MLX has `sum_scatter`; otherwise all_sum and a slice.
        point_to_point: Which pairs `send` and `recv` reach.
        device: The device whose streams the collectives run on.
        shared_stream: All groups of the process must use one stream (MPI is single-threaded).
        default_stream: The collectives run on the device's default stream, in order with what computes their inputs.
        max_ranks: Largest group, or None.
        spoils_first_message: The first message after connecting can arrive damaged, so one is spent.
        widen: Types that a reduction must not get, and the type that carries their values.
        variables: The environment it is started with; alternatives separated by "|".
    """

    name: str
    split: bool
    reduce_scatter: bool
    point_to_point: Literal["any", "neighbours", "none"]
    device: Literal["cpu", "gpu"]
    shared_stream: bool = False
    default_stream: bool = False
    max_ranks: int | None = None
    spoils_first_message: bool = False
    widen: Mapping[str, str] = field(default_factory=dict)
    variables: tuple[str, ...] = ()


_JACCL_VARIABLES = (
    "JACCL_RANK|MLX_RANK",
    "JACCL_IBV_DEVICES|MLX_IBV_DEVICES",
    "JACCL_COORDINATOR|MLX_JACCL_COORDINATOR",
)

CAPABILITIES: Mapping[str, Capabilities] = MappingProxyType(
    {
        "ring": Capabilities(
            "ring", False, False, "neighbours", "cpu",
            widen={"bool": "int32"}, variables=("MLX_RANK", "MLX_HOSTFILE"),
        ),
        "jaccl": Capabilities(
            "jaccl", False, True, "any", "cpu", max_ranks=8, spoils_first_message=True,
            widen={"bool": "int32"}, variables=_JACCL_VARIABLES,
        ),
        "jaccl-ring": Capabilities(
            "jaccl-ring", False, True, "neighbours", "cpu", spoils_first_message=True,
            widen={"bool": "int32"}, variables=(*_JACCL_VARIABLES, "JACCL_RING|MLX_JACCL_RING"),
        ),
        "mpi": Capabilities(
            "mpi", True, False, "any", "cpu", shared_stream=True,
            widen={"bool": "int32"},  # MPI_SUM on MPI_C_BOOL aborts the whole job
            variables=("OMPI_COMM_WORLD_SIZE|PMI_SIZE|PMIX_RANK",),
        ),
        "nccl": Capabilities(
            "nccl", True, True, "none", "gpu", default_stream=True,
            widen={"bool": "int32", "int16": "int32", "uint16": "uint32"},
            variables=("MLX_RANK", "MLX_WORLD_SIZE", "NCCL_HOST_IP", "NCCL_PORT"),
        ),
    }
)  # fmt: skip


def missing_variables(backend: str, environ: Mapping[str, str]) -> list[str]:
    """The environment variables that `backend` needs and does not find."""
    return [
        " or ".join(names.split("|"))
        for names in CAPABILITIES[backend].variables
        if not any(name in environ for name in names.split("|"))
    ]
