"""What is told of the machine, on the kinds of devices that MLX knows."""

from types import SimpleNamespace

import mlx.core as mx
import pytest

from parallel.pipeline import machine_bytes
from trainer.machine.facts import machine_facts
from trainer.machine.limits import apply_limits
from trainer.recipe.config import LimitsConfig

METAL = {"device_name": "Apple M3 Ultra", "memory_size": 512 * 2**30, "max_recommended_working_set_size": 400 * 2**30}
CUDA = {"device_name": "NVIDIA H200", "total_memory": 139 * 2**30, "free_memory": 138 * 2**30}


@pytest.mark.parametrize(("info", "gib"), [(METAL, 512), (CUDA, 139)])
def test_memory_of_either_kind_of_gpu(info: dict, gib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a name of memory that only Metal has: a run on CUDA ended at its first checkpoint or validation."""
    monkeypatch.setattr(mx, "device_info", lambda *args: info)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert machine_bytes() == gib * 2**30
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=SimpleNamespace(name="gpu")))
    assert machine_facts(1, "none", {})["memory_gib"] == gib


@pytest.mark.parametrize(("wired_gib", "expected"), [(None, 400 * 2**30), (100.0, 100 * 2**30)])
def test_wired_memory_on_metal(wired_gib: float | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights that macOS pages out, which costs most of the speed, unless the recipe says otherwise."""
    given = []
    monkeypatch.setattr(mx, "device_info", lambda *args: METAL)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "set_wired_limit", given.append)
    apply_limits(LimitsConfig(wired_gib=wired_gib))
    assert given == [expected]
