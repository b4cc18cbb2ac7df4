"""The shape of a mesh of ranks, and which rank sits where: pure arithmetic.

The axes are, from the outermost to the innermost, dp_replicate, dp_shard, pp and tp: neighbouring ranks share a tp
group, as that axis talks most.
"""

from dataclasses import asdict, dataclass, replace
from math import prod

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
        sizes = asdict(self)
        wrong = [f"{axis} is {size}" for axis, size in sizes.items() if size < 1 and size != -1]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}; an axis has 1 or more ranks, or -1.")
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise ValueError(f"{' and '.join(free)} are -1; only one axis may take what is left.")
        fixed = prod(size for size in sizes.values() if size > 0)
        if not free and fixed != world_size:
            raise ValueError(f"{self} = {fixed}, but the world has {world_size} ranks.")
        if free and world_size % fixed:
            raise ValueError(
                f"{self}: {world_size} ranks do not divide by {fixed}, so nothing fits {free[0]}."
            )
        return replace(self, **{axis: world_size // fixed for axis in free})

    @property
    def dp(self) -> int:
        """Ranks that see different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        """All ranks."""
        return self.dp * self.pp * self.tp

    def __str__(self) -> str:
        return " * ".join(f"{axis}({getattr(self, axis)})" for axis in AXES)

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
        everyone = range(self.world)
        places = ((other, self.coordinates(other)) for other in everyone)
        return tuple(
            other for other, place in places if all(place[a] == here[a] for a in fixed)
        )
