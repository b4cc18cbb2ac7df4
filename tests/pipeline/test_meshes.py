"""Pipelines, sharded weights and their products with the other axes against one device."""

from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mesh_cases import Case
from mesh_launch import LAUNCHES

GRADIENT_TOLERANCE = {"qwen3_5_moe": 3e-5}  # others 1e-5: its experts' gradients are small sums of large terms
STEP_TOLERANCE = 1e-4
ALL = [(name, case) for name, launch in LAUNCHES.items() for case in launch.cases]


@pytest.mark.parametrize("launch, case", ALL, ids=[f"{launch}-{case.name}" for launch, case in ALL])
def test_gradients_and_steps(launched: Any, reference: Path, launch: str, case: Case) -> None:
    """Catches a wrong or missing message, a layer that runs twice or nowhere, a sum over the wrong ranks, a lost parameter."""
    results = [result["cases"][case.name] for result in launched(launch)]
    right = mx.load(str(reference / f"{case.reference}.safetensors"))
    assert set().union(*(result["names"] for result in results)) == set(right), "some parameter is trained nowhere"
    for rank, result in enumerate(results):
        worst, error = result["gradient"]
        bound = GRADIENT_TOLERANCE.get(case.architecture, 1e-5)
        assert error < bound, f"rank {rank}: gradient of {worst} off by {error}"
        assert result["steps"] < STEP_TOLERANCE, f"rank {rank}: losses of the steps off by {result['steps']}"
        if case.num_steps <= 3:
            assert result["norms"] < STEP_TOLERANCE, f"rank {rank}: gradient norms off by {result['norms']}"


@pytest.mark.parametrize("launch, case", ALL, ids=[f"{launch}-{case.name}" for launch, case in ALL])
def test_each_layer_is_on_one_stage(launched: Any, launch: str, case: Case) -> None:
    """Catches stages that hold more than their own layers: a stage would not fit where its share does."""
    results = [result["cases"][case.name] for result in launched(launch)]
    copies = Counter(name for result in results for name in result["names"])
    expected = case.num_ranks // case.pp
    wrong = {name: n for name, n in copies.items() if n != expected and "embed_tokens" not in name}
    assert not wrong, f"parameters on more or fewer than {expected} ranks: {wrong}"


def test_sharded_weights_on_three_ranks(launched: Any) -> None:
    """Catches rows lost in padding, a reliance on what one backend has, and a recompute that reads slices or loses gradients."""
    for rank, result in enumerate(launched("ring of three")):
        found = result["checks"]
        assert sorted(found["uneven_on_other_backends"]) == ["jaccl", "nccl", "ring"]
        errors = [*found["uneven_on_other_backends"].values(), *found["recomputed_layers"].values()]
        assert max(errors) < 1e-5, f"rank {rank}: {found}"
