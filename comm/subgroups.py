"""Sub-groups where MLX cannot split: further ring or JACCL groups in the same process.

MLX starts one group per backend name and remembers it. `SubGroups` agrees on addresses and ports
over the world, clears that memory, starts the new groups, and then puts the world back as MLX's
default group. The environment is the same afterwards.
"""

import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from comm.addresses import address_towards, own_addresses, reserve_ports
from comm.environment import environment
from comm.group import Group
from comm.objects import all_gather_object


@dataclass(frozen=True)
class Wish:
    """One split: the ranks of `parent` with equal `color`, ordered by `key`, on `backend`."""

    parent: Group
    color: int
    key: int = -1
    backend: str = "ring"


class SubGroups:
    """Makes sub-groups of one world; the splitter of every group that MLX cannot split.

    Args:
        world: All ranks. Every one of them must take part in every split, also in that of a
            sub-group.
        default: Backend that MLX's default group is started on again afterwards: "mpi", or
            "ring" for a ring of the whole world. Default: "mpi" for MPI, else "ring".
    """

    def __init__(self, world: Group, default: str | None = None):
        self.world = world
        self._default = default or ("mpi" if world.backend == "mpi" else "ring")

    def __call__(self, group: Group, color: int, key: int) -> Group:
        return self.split([Wish(group, color, key)])[0]

    def split(self, wishes: Sequence[Wish]) -> list[Group]:
        """One group per wish; all ranks must pass the same number of wishes in the same order."""
        self.world.connections.close_dropped()
        asked = [[wish.parent.members, wish.color, _order(wish)] for wish in wishes]
        table = all_gather_object([own_addresses(os.environ), asked], self.world)
        lineups = [_lineup(table, i, wish) for i, wish in enumerate(wishes)]
        everyone = list(range(self.world.size))
        with reserve_ports(
            [_own(table, line, self.world.rank) for line in [*lineups, everyone]]
        ) as ports:
            ports = all_gather_object(ports, self.world)
            groups = [
                self._start(wish, line, _equally_many([ports[rank][i] for rank in line]))
                for i, (wish, line) in enumerate(zip(wishes, lineups, strict=True))
            ]
            self._restore_default([row[-1] for row in ports])
        return groups

    def _start(self, wish: Wish, line: list[int], hosts: list[list[str]]) -> Group:
        native = None
        if len(line) > 1:
            _clear_backends()
            start = _start_ring if wish.backend == "ring" else _start_jaccl
            rank = line.index(self.world.rank)
            native = start(hosts, line, rank, wish.backend)
            if (native.rank(), native.size()) != (rank, len(line)):
                raise RuntimeError(
                    f"A {wish.backend} group of the ranks {line} was asked for, in which this is rank {rank}; MLX gave "
                    f"rank {native.rank()} of {native.size()}. Is a variable of another job set?"
                )
        return Group(
            native,
            wish.backend,
            members=tuple(line),
            splitter=self,
            progress=self.world.progress,
            connections=self.world.connections,
        )

    def _restore_default(self, hosts: list[list[str]]) -> None:
        _clear_backends()
        if self._default == "mpi":
            # Two groups over MPI's world would each finalise MPI at exit, so one never ends.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(mx.distributed.init(True, "mpi")))
        else:
            native = _start_ring(hosts, [], self.world.rank, "ring")
            if self.world.backend == "ring":
                self.world.adopt(native)
        size = mx.distributed.init().size()
        assert size == self.world.size, f"the default group has {size} of {self.world.size} ranks"


def _order(wish: Wish) -> int:
    return wish.key if wish.key >= 0 else wish.parent.rank


def _lineup(table: list[Any], i: int, wish: Wish) -> list[int]:
    """World ranks of the wished group, in its order."""
    chosen = []
    for rank in wish.parent.members:
        members, color, order = table[rank][1][i]
        if list(members) == list(wish.parent.members) and color == wish.color:
            chosen.append((order, wish.parent.members.index(rank), rank))
    return [rank for _, _, rank in sorted(chosen)]


def _own(table: list[Any], line: list[int], rank: int) -> list[str]:
    """Where this rank listens in a ring of `line`: the addresses its predecessor can reach.

    A cable of the world's ring leads to one neighbour only. Where the predecessor is the one before in the world's ring
    too, the addresses are the hostfile's; where it is the one after, they are this host's own ends of the cables to the
    addresses of that one. Any other rank needs the address that all hosts reach.
    """
    addresses = table[rank][0]
    before, size = line[line.index(rank) - 1], len(table)
    if before == (rank - 1) % size or not addresses["control"]:
        return addresses["ring"]
    if before == (rank + 1) % size:
        ends = [address_towards(address) for address in table[before][0]["ring"]]
        return [end for end in ends if end] or [addresses["control"]]
    return [addresses["control"]]


def _equally_many(hosts: list[list[str]]) -> list[list[str]]:
    """As many addresses of every rank as of the one that has the fewest; MLX connects them pairwise."""
    fewest = min(map(len, hosts))
    return [addresses[:fewest] for addresses in hosts]


def _start_ring(
    hosts: list[list[str]], line: list[int], rank: int, backend: str
) -> mx.distributed.Group:
    with _file(hosts) as hostfile, environment(MLX_RANK=str(rank), MLX_HOSTFILE=hostfile):
        return mx.distributed.init(strict=True, backend="ring")


def _start_jaccl(
    hosts: list[list[str]], line: list[int], rank: int, backend: str
) -> mx.distributed.Group:
    path = os.environ.get("JACCL_IBV_DEVICES") or os.environ["MLX_IBV_DEVICES"]
    world = json.loads(Path(path).read_text())
    devices = [[world[i][j] for j in line] for i in line]
    missing = [
        f"{line[i]} to {line[j]}"
        for i, row in enumerate(devices)
        for j, device in enumerate(row)
        if i != j and device is None
    ]
    if missing:
        raise ValueError(f"{path} names no RDMA device for the ranks {missing}.")
    with _file(devices) as group_path:
        ring = "1" if backend == "jaccl-ring" else None
        variables = {
            "RANK": str(rank),
            "IBV_DEVICES": group_path,
            "COORDINATOR": hosts[0][0],
            "RING": ring,
        }
        # JACCL takes the first name of each pair where both are set, so neither may keep the world's.
        theirs = {f"JACCL_{name}": value for name, value in variables.items()}
        ours = {f"MLX_JACCL_{name}": variables[name] for name in ("COORDINATOR", "RING")}
        ours |= {f"MLX_{name}": variables[name] for name in ("RANK", "IBV_DEVICES")}
        with environment(**theirs, **ours):
            native = mx.distributed.init(strict=True, backend="jaccl")
    spend_first_message(native)
    return native


def spend_first_message(native: mx.distributed.Group) -> None:
    """Send a message that counts for nothing: the first one after JACCL has connected can arrive damaged."""
    mx.eval(mx.distributed.all_sum(mx.zeros((1,)), group=native, stream=mx.cpu))


@contextmanager
def _file(content: Any) -> Iterator[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(content, file)
        file.flush()
        yield file.name


def _clear_backends() -> None:
    suffix = "dylib" if sys.platform == "darwin" else "so"
    path = Path(mx.__file__).parent / "lib" / f"libmlx.{suffix}"
    clear = getattr(ctypes.CDLL(str(path)), "_ZN3mlx4core11distributed14clear_backendsEv", None)
    if clear is None:
        raise ValueError("This build of MLX cannot start a second group of a backend.")
    clear.restype = None
    clear()
