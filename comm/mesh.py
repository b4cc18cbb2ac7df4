"""A mesh of ranks: which rank sits where, and one group per axis.

Coordinates are pure arithmetic. The axes are, from the outermost to the innermost,
dp_replicate, dp_shard, pp and tp: neighbouring ranks share a tp group, as that axis talks most.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from comm.capabilities import CAPABILITIES, missing_variables
from comm.group import Group
from comm.subgroups import SubGroups, Wish

AXES = ("dp_replicate", "dp_shard", "pp", "tp")


@dataclass(frozen=True)
class MeshShape:
    """How many ranks each axis has; one of them may be -1, for the ranks that are left.

    Attributes:
        dp_replicate: Copies of the model that see different data. Default: -1.
        dp_shard: Ranks over which one copy's weights are sharded (FSDP). Default: 1.
        pp: Pipeline stages. Default: 1.
        tp: Ranks that split each layer. Default: 1.
    """

    dp_replicate: int = -1
    dp_shard: int = 1
    pp: int = 1
    tp: int = 1

    def resolve(self, world_size: int) -> "MeshShape":
        """The shape without -1, for `world_size` ranks.

        Raises:
            ValueError: A size is not allowed, or the sizes do not multiply to `world_size`.
        """
        sizes = {axis: getattr(self, axis) for axis in AXES}
        wrong = [f"{axis} is {size}" for axis, size in sizes.items() if size < 1 and size != -1]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}; an axis has 1 or more ranks, or -1.")
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise ValueError(f"{' and '.join(free)} are -1; only one axis may take what is left.")
        fixed = prod(size for size in sizes.values() if size > 0)
        equation = " * ".join(f"{axis}({size})" for axis, size in sizes.items())
        if not free and fixed != world_size:
            raise ValueError(f"{equation} = {fixed}, but the world has {world_size} ranks.")
        if free and world_size % fixed:
            raise ValueError(
                f"{equation}: {world_size} ranks do not divide by {fixed}, so nothing fits {free[0]}."
            )
        return replace(self, **{axis: world_size // fixed for axis in free})

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where `rank` sits on each axis. The shape must be resolved."""
        place = {}
        for axis in reversed(AXES):
            rank, place[axis] = divmod(rank, getattr(self, axis))
        return {axis: place[axis] for axis in AXES}

    def rank(self, **coordinates: int) -> int:
        """The rank at these coordinates; an axis left out counts as 0."""
        number = 0
        for axis in AXES:
            number = number * getattr(self, axis) + coordinates.get(axis, 0)
        return number

    def members(self, rank: int, *axes: str) -> tuple[int, ...]:
        """The ranks that share every coordinate of `rank` but those of `axes`, in order."""
        here = self.coordinates(rank)
        fixed = [axis for axis in AXES if axis not in axes]
        everyone = range(prod(getattr(self, axis) for axis in AXES))
        places = ((other, self.coordinates(other)) for other in everyone)
        return tuple(
            other for other, place in places if all(place[a] == here[a] for a in fixed)
        )


@dataclass(frozen=True)
class Mesh:
    """One group per axis, of size 1 where the axis is off.

    Attributes:
        shape: The resolved shape.
        world: All ranks.
        dp_replicate, dp_shard, pp, tp: The groups that this rank is in.
        dp: dp_replicate and dp_shard together: all ranks that see different data.
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
    whole = size == prod(getattr(shape, a) for a in AXES)
    if world_backend.startswith("jaccl") and not whole:
        return "ring"
    if world_backend == "nccl" and axis == "pp":
        return "ring"
    if world_backend == "ring" and axis == "tp" and has_rdma and size > 1:
        return "jaccl"
    return world_backend


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
    if wishes:
        maker = world.splitter or SubGroups(world)
        groups.update(zip(wishes, maker.split(list(wishes.values())), strict=True))
    return {
        name: groups.get(name) or groups[made[members, backends[name]]]
        for name, members in wanted.items()
    }
