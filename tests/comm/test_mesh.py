"""Mesh coordinates as arithmetic, the backend of each axis, and 2 x 2 meshes of real processes."""

import json
from pathlib import Path

import pytest

from comm.group import Group, solo
from comm.mesh import AXES, MeshShape, _require_one_jaccl_mesh, axis_backends
from comm.subgroups import Wish
from ranks import run_ranks

WORKER = Path(__file__).parent / "workers" / "mesh.py"


def test_rank_and_coordinates_are_inverse() -> None:
    """Catches a swapped axis order: tp must be innermost, dp_replicate outermost."""
    shape = MeshShape(2, 3, 2, 4)
    for rank in range(48):
        assert shape.rank(**shape.coordinates(rank)) == rank
    assert shape.coordinates(1) == {"dp_replicate": 0, "dp_shard": 0, "pp": 0, "tp": 1}
    assert shape.coordinates(24)["dp_replicate"] == 1


def test_members_partition_the_world() -> None:
    """Catches groups that overlap or miss a rank."""
    shape = MeshShape(2, 2, 1, 3)
    for axes in [(axis,) for axis in AXES] + [("dp_replicate", "dp_shard")]:
        groups = {shape.members(rank, *axes) for rank in range(12)}
        assert sorted(rank for group in groups for rank in group) == list(range(12)), axes
    assert shape.members(0, "tp") == (0, 1, 2)
    assert shape.members(0, "dp_replicate", "dp_shard") == (0, 3, 6, 9)


@pytest.mark.parametrize(
    ("shape", "size", "words"),
    [
        (MeshShape(2, 1, 1, 3), 4, "dp_replicate(2) * dp_shard(1) * pp(1) * tp(3) = 6"),
        (MeshShape(-1, 1, 1, 3), 4, "4 ranks do not divide by 3"),
        (MeshShape(-1, -1), 4, "only one axis"),
        (MeshShape(0), 4, "dp_replicate is 0"),
    ],
)
def test_a_wrong_shape_is_refused(shape: MeshShape, size: int, words: str) -> None:
    """Catches a shape that does not fit the world being accepted, or an unclear message."""
    with pytest.raises(ValueError) as error:
        shape.resolve(size)
    assert words in str(error.value)


def test_the_free_axis_takes_the_rest() -> None:
    """Catches -1 being resolved to the wrong axis or size."""
    assert MeshShape(tp=2).resolve(8) == MeshShape(4, 1, 1, 2)
    assert MeshShape(2, -1).resolve(8) == MeshShape(2, 4, 1, 1)


def test_backends_by_rule() -> None:
    """Catches an axis put on a backend that cannot carry it."""
    shape = MeshShape(2, 1, 2, 2)
    assert set(axis_backends("any", "ring", shape, False).values()) == {"ring"}
    assert axis_backends("any", "ring", shape, True)["tp"] == "jaccl"
    assert set(axis_backends("any", "jaccl", shape, True).values()) == {"ring"}
    assert axis_backends("any", "jaccl", MeshShape(1, 1, 1, 4), True)["tp"] == "jaccl"
    assert axis_backends("any", "nccl", shape, False)["pp"] == "ring"
    assert axis_backends("any", "nccl", shape, False)["tp"] == "nccl"
    mixed = axis_backends({"tp": "mpi", "default": "ring"}, "mpi", shape, False)
    assert mixed["tp"] == "mpi" and mixed["dp"] == "ring"


@pytest.mark.parametrize("choice", [{"tq": "ring"}, {"tp": "mpi"}, "tcp"])
def test_backends_that_cannot_be_had(choice: object) -> None:
    """Catches a misspelt axis or backend going unnoticed."""
    with pytest.raises(ValueError, match="allowed are"):
        axis_backends(choice, "ring", MeshShape(1, 1, 1, 2), False)


@pytest.mark.parametrize(
    ("carrier", "backend"),
    [("ring", "any"), ("mpi", "any"), ("mpi", {"tp": "mpi", "default": "ring"})],
    ids=["ring", "mpi", "mixed"],
)
def test_two_by_two(carrier: str, backend: object) -> None:
    """Catches a group with wrong members, a hijacked default group and an unclean exit."""
    ranks = run_ranks(WORKER, 4, backend=carrier, args=(json.dumps(backend),), timeout=90)
    named = {} if backend == "any" else backend
    for rank, one in enumerate(ranks):
        row, column = divmod(rank, 2)
        dp, tp = 10**column * 101, 100**row * 11
        got = one.result
        assert got["tp"] == [named.get("tp", carrier), column, tp], got
        assert got["dp"] == [named.get("default", carrier), row, dp], got
        assert got["dp_replicate"] == got["dp"] and got["one_group"], got
        assert got["pp"][2] == got["dp_shard"][2] == 10**rank, got
        assert got["world"] == [carrier, rank, 1111] and got["mixed"] == 1.5, got
        assert got["default"] == [rank, 4] and got["default_sum"] == 1111, got
        assert got["environment_kept"], "MLX_RANK or MLX_HOSTFILE was left changed"


@pytest.mark.parametrize("backend", ["ring", "mpi"])
def test_groups_may_be_dropped_while_they_work(backend: str) -> None:
    """Catches MLX closing a group under an operation that still runs over it."""
    ranks = run_ranks(WORKER.with_name("dropped_groups.py"), 3, backend=backend)
    assert not any(rank.stderr for rank in ranks)


def test_two_jaccl_meshes_are_refused() -> None:
    """Catches a second mesh on the same RDMA devices, which ends the process inside MLX without an error."""
    wishes = {"tp": Wish(solo(), 0, backend="jaccl"), "dp": Wish(solo(), 0, backend="jaccl")}
    with pytest.raises(ValueError, match="tp and dp would be JACCL meshes"):
        _require_one_jaccl_mesh(solo(), wishes)
    with pytest.raises(ValueError, match="the world and tp would be"):
        _require_one_jaccl_mesh(Group(None, "jaccl"), {"tp": wishes["tp"]})
    _require_one_jaccl_mesh(solo(), {"tp": wishes["tp"], "dp": Wish(solo(), 0, backend="ring")})
