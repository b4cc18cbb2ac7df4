"""A fake JACCL or NCCL: a real ring or MPI group that refuses what the real backend refuses.

It also hangs where JACCL hangs: when a peer is gone, the collective never returns. Nothing here
stands in for the values; they come from the carrying group.
"""

import time
from dataclasses import replace
from typing import Any

import mlx.core as mx

import comm
from comm.capabilities import Capabilities
from comm.subgroups import SubGroups

NCCL_TYPES = {"int8", "uint8", "int32", "uint32", "int64", "uint64", "float16", "bfloat16", "float32"}


class FakeNative:
    """Stands for MLX's group: rank and size, and split where the backend has it."""

    def __init__(self, native: mx.distributed.Group, capabilities: Capabilities):
        self.native, self.capabilities = native, capabilities

    def rank(self) -> int:
        return self.native.rank()

    def size(self) -> int:
        return self.native.size()

    def split(self, color: int, key: int = -1) -> "FakeNative":
        if not self.capabilities.split:
            raise RuntimeError("[fake] Group split not supported.")
        return FakeNative(self.native.split(color, key), self.capabilities)


class FakeEngine:
    """The collectives of `mx.distributed` under one backend's table."""

    def __init__(self, capabilities: Capabilities, hangs: bool):
        self.capabilities, self.hangs = capabilities, hangs
        self.streams: dict[int, mx.Stream] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda x, *peer, group, stream: self._call(name, x, *peer, group=group, stream=stream)

    def sum_scatter(self, x: mx.array, *, group: FakeNative, stream: mx.Stream) -> mx.array:
        if not self.capabilities.reduce_scatter:
            raise RuntimeError("[fake] sum_scatter not supported.")
        return mx.split(self.all_sum(x, group=group, stream=stream), group.size())[group.rank()]

    def recv(self, shape, dtype, src, *, group: FakeNative, stream: mx.Stream) -> mx.array:
        self._admit_peer(src, group)
        return mx.distributed.recv(shape, dtype, src, group=group.native, stream=stream)

    def send(self, x: mx.array, dst: int, *, group: FakeNative, stream: mx.Stream) -> mx.array:
        self._admit_peer(dst, group)
        return self._call("send", x, dst, group=group, stream=stream)

    def _call(self, name: str, x: mx.array, *peer: int, group: FakeNative, stream: mx.Stream):
        known = self.streams.setdefault(id(group), stream)
        assert known == stream, f"{name}: one group was used on two streams"
        dtype = str(x.dtype).split(".")[-1]
        if self.capabilities.name == "nccl" and dtype not in NCCL_TYPES:
            raise RuntimeError(f"[fake nccl] {name} of {dtype} not supported.")
        result = getattr(mx.distributed, name)(x, *peer, group=group.native, stream=stream)
        if self.hangs:
            try:
                mx.eval(result)
            except RuntimeError:
                time.sleep(10_000)
        return result

    def _admit_peer(self, peer: int, group: FakeNative) -> None:
        reach, near = self.capabilities.point_to_point, {1, group.size() - 1}
        far = (peer - group.rank()) % group.size() not in near
        if reach == "none" or (reach == "neighbours" and far):
            raise RuntimeError("[fake] this pair cannot send.")


def fake_group(world: comm.Group, backend: str, hangs: bool = False) -> comm.Group:
    """`world` as it would be under `backend`."""
    capabilities = replace(comm.CAPABILITIES[backend], device="cpu", shared_stream=True)
    fake = comm.Group(
        FakeNative(world._native, capabilities),
        backend,
        capabilities=capabilities,
        engine=FakeEngine(capabilities, hangs),
        stream=world.stream,
        progress=world.progress,
    )
    if not capabilities.split:
        fake.splitter = SubGroups(fake, default="mpi" if world.backend == "mpi" else "ring")
    return fake
