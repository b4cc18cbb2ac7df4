"""A mesh of ranks: one group per axis."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from comm.capabilities import CAPABILITIES, missing_variables
from comm.group import Group
from comm.mesh_shape import AXES, MeshShape
from comm.subgroups import SubGroups, Wish


@dataclass(frozen=True)
class Mesh:
    """One group per axis, of size 1 where the axis is off.

    Attributes:
        shape: The resolved shape.
        world: All ranks.
        dp_replicate, dp_shard, pp, tp: The groups that this rank is in.
        dp: Dp_replicate and dp_shard together: all ranks that see different data.
    """

    shape: MeshShape
    world: Group
    dp_replicate: Group
    dp_shard: Group
    pp: Group
    tp: Group
    dp: Group

    @classmethod
    def build(
        cls, shape: MeshShape, world: Group, backend: str | Mapping[str, str] = "any"
    ) -> "Mesh":
        """Makes the groups; every rank must call it with the same arguments.

        Args:
            shape: Ranks per axis.
            world: All ranks.
            backend: Backend of every axis, or a map such as {"tp": "jaccl", "default": "ring"}.
                Default: "any", see `axis_backends`.

        Raises:
            ValueError: The shape does not fit the world, or an axis cannot have its backend.
        """
        shape = shape.resolve(world.size)
        backends = axis_backends(backend, world.backend, shape, _has_rdma())
        wanted = {axis: shape.members(world.rank, axis) for axis in AXES}
        wanted["dp"] = shape.members(world.rank, "dp_replicate", "dp_shard")
        groups = _build(world, wanted, backends)
        return cls(shape, world, **groups)


def axis_backends(
    choice: str | Mapping[str, str], world_backend: str, shape: MeshShape, has_rdma: bool
) -> dict[str, str]:
    """Which backend carries each axis, and "dp".

    The rule of "any": the world's backend; but ring for the axes that a JACCL world cannot
    split off and for pp beside NCCL, which cannot send; and JACCL for tp when the world is a ring
    and RDMA devices are named.

    Raises:
        ValueError: An axis or backend is unknown, or cannot be had beside this world.
    """
    named = {"default": choice} if isinstance(choice, str) else dict(choice)
    unknown = sorted(set(named) - {*AXES, "dp", "default"})
    if unknown:
        allowed = ", ".join((*AXES, "dp", "default"))
        raise ValueError(f"backend has the keys {', '.join(unknown)}; allowed are {allowed}.")
    backends = {}
    for axis in (*AXES, "dp"):
        wish = named.get(axis, named.get("default", "any"))
        if wish == "any":
            wish = _rule(axis, world_backend, shape, has_rdma)
        if wish not in (world_backend, "ring", "jaccl", "jaccl-ring"):
            added = "ring, jaccl and jaccl-ring"
            known = "cannot be added to" if wish in CAPABILITIES else "is no backend; beside"
            raise ValueError(
                f"backend of {axis} is {wish!r}, which {known} a {world_backend} world: "
                f"allowed are {world_backend}, {added}."
            )
        backends[axis] = wish
    return backends


def _rule(axis: str, world_backend: str, shape: MeshShape, has_rdma: bool) -> str:
    if axis == "dp":
        size = shape.dp_replicate * shape.dp_shard
    else:
        size = getattr(shape, axis)
    whole = size == shape.world
    if world_backend.startswith("jaccl") and not whole:
        return "ring"
    if world_backend == "nccl" and axis == "pp":
        return "ring"
    if world_backend == "ring" and axis == "tp" and has_rdma and size > 1:
        return "jaccl"
    return world_backend


def _require_one_jaccl_mesh(world: Group, wishes: Mapping[str, Wish]) -> None:
    """Refuse what ends the process inside MLX, without an error: a mesh takes most of a device's memory regions."""
    meshes = [name for name, wish in wishes.items() if wish.backend == "jaccl"]
    if world.backend == "jaccl":
        meshes = ["the world", *meshes]
    if len(meshes) > 1:
        raise ValueError(
            f"{' and '.join(meshes)} would be JACCL meshes side by side, but an RDMA device has memory regions for one "
            "(mlx#3162). Give one of them JACCL, and the others ring."
        )


def _has_rdma() -> bool:
    return not missing_variables("jaccl", os.environ)


def _build(
    world: Group, wanted: dict[str, tuple[int, ...]], backends: dict[str, str]
) -> dict[str, Group]:
    """A group per name; equal ones are made once, and the world itself is used where it fits."""
    groups: dict[str, Group] = {}
    wishes: dict[str, Wish] = {}
    made: dict[tuple[tuple[int, ...], str], str] = {}
    for name, members in wanted.items():
        backend = backends[name]
        limit = CAPABILITIES[backend].max_ranks if backend in CAPABILITIES else None
        if limit and len(members) > limit:
            raise ValueError(f"{name} has {len(members)} ranks; {backend} reaches {limit}.")
        twin = made.setdefault((members, backend), name)
        if len(members) == 1:
            groups[name] = Group(None, backend, members=members, progress=world.progress)
        elif len(members) == world.size and backend == world.backend:
            groups[name] = world
        elif twin == name and backend == world.backend and world.capabilities.split:
            groups[name] = world.split(members[0])
        elif twin == name:
            wishes[name] = Wish(world, members[0], backend=backend)
    _require_one_jaccl_mesh(world, wishes)
    if wishes:
        maker = world.splitter if isinstance(world.splitter, SubGroups) else SubGroups(world)
        groups.update(zip(wishes, maker.split(list(wishes.values())), strict=True))
    return {
        name: groups.get(name) or groups[made[members, backends[name]]]
        for name, members in wanted.items()
    }
