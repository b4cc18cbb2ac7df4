"""What a sub-group over JACCL reads from the environment, behind a stand-in for MLX's `init`."""

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from comm import backend, subgroups
from comm.group import Group

NAMES = ("RANK", "IBV_DEVICES", "COORDINATOR", "RING")


@pytest.mark.parametrize("prefix", ["JACCL_", "MLX_JACCL_"])
@pytest.mark.parametrize("kind", ["jaccl", "jaccl-ring"])
def test_a_group_starts_on_its_own_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str, kind: str
) -> None:
    """Catches the world's variables under JACCL's own names, which win: a group of two became the world of four."""
    devices = [[None if i == j else f"rdma_{i}{j}" for j in range(4)] for i in range(4)]
    path = tmp_path / "devices.json"
    path.write_text(json.dumps(devices))
    own_name = "JACCL_" if prefix == "JACCL_" else "MLX_"
    monkeypatch.setenv(f"{own_name}RANK", "3")
    monkeypatch.setenv(f"{own_name}IBV_DEVICES", str(path))
    monkeypatch.setenv(f"{prefix}COORDINATOR", "10.0.0.1:1")
    monkeypatch.setenv(f"{prefix}RING", "1")
    before = dict(os.environ)
    seen: dict[str, Any] = {}

    def init(strict: bool, backend: str) -> None:
        for name in NAMES:
            longer = "MLX_JACCL_" if name in ("COORDINATOR", "RING") else "MLX_"
            seen[name] = os.environ.get(f"JACCL_{name}") or os.environ.get(f"{longer}{name}")
        seen["IBV_DEVICES"] = json.loads(Path(seen["IBV_DEVICES"]).read_text())

    monkeypatch.setattr(mx.distributed, "init", init)
    monkeypatch.setattr(mx.distributed, "all_sum", lambda x, **_: x)
    subgroups._start_jaccl([["10.0.0.3:7"], ["10.0.0.4:8"]], [2, 3], 1, kind)
    ring = "1" if kind == "jaccl-ring" else None
    expected = [[None, "rdma_23"], ["rdma_32", None]]
    assert seen == {"RANK": "1", "IBV_DEVICES": expected, "COORDINATOR": "10.0.0.3:7", "RING": ring}
    assert dict(os.environ) == before


def test_a_group_of_another_size_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches sums over ranks that nobody asked for."""

    class World:
        rank, size, backend = 1, 4, "jaccl"

    class Native:
        def rank(self) -> int:
            return 1

        def size(self) -> int:
            return 4

    monkeypatch.setattr(subgroups, "_clear_backends", lambda: None)
    monkeypatch.setattr(subgroups, "_start_jaccl", lambda *_: Native())
    wish = subgroups.Wish(Group(None, "none"), 0, 0, backend="jaccl")
    with pytest.raises(RuntimeError, match="rank 1 of 4"):
        subgroups.SubGroups(World())._start(wish, [0, 1], [["a:1"], ["b:2"]])


@pytest.mark.parametrize(("name", "count"), [("jaccl", 1), ("jaccl-ring", 1), ("ring", 0)])
def test_a_world_spends_the_first_message(monkeypatch: pytest.MonkeyPatch, name: str, count: int) -> None:
    """Catches a first message that counts: it can arrive damaged, and then is a wrong sum."""
    sums: list[mx.array] = []
    monkeypatch.setenv("COMM_TIMEOUT", "0")
    monkeypatch.setattr(mx.distributed, "is_available", lambda backend: True)
    monkeypatch.setattr(mx.distributed, "init", lambda strict, backend: "native")
    monkeypatch.setattr(mx.distributed, "all_sum", lambda x, **_: sums.append(x) or x)
    assert backend._connect_all_ranks(name) == "native" and len(sums) == count
