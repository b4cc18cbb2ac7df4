"""Pipelines, sharded weights and their products with the other axes against one device."""

from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mesh_launch import LAUNCHES

from mesh_cases import Case

GRADIENT_TOLERANCE = 1e-5
# Where half a unit in the last place of the weights moves float64 gradients by 1e-5 to 2e-5 (four Qwen3.5 layers: the
# norm after linear attention scales tiny outputs up). Distances from float64, as multiples of one process's own:
# seen at most 2.9, over 18 models and methods and two OpenBLAS kernels.
ROUNDING_TOLERANCE = 4.0
STEP_TOLERANCE = 1e-4
ALL = [
    pytest.param(name, case, id=f"{name}-{case.name}", marks=[] if name == "ring of two" else pytest.mark.exhaustive)
    for name, launch in LAUNCHES.items()
    for case in launch.cases
]


@pytest.mark.parametrize("launch, case", ALL)
def test_gradients_and_steps(launched: Any, reference: Path, launch: str, case: Case) -> None:
    """Catches a wrong or missing message, a layer that runs twice or nowhere, a sum over the wrong ranks, a lost parameter."""
    results = [result["cases"][case.name] for result in launched(launch)]
    right = mx.load(str(reference / f"{case.reference}.safetensors"))
    assert set().union(*(result["names"] for result in results)) == set(right), "some parameter is trained nowhere"
    for rank, result in enumerate(results):
        worst, error = result["gradient"]
        if case.wide:
            worst, ratio = result["rounding"]
            assert ratio < ROUNDING_TOLERANCE, f"rank {rank}: {worst} is {ratio:.1f} times further from float64 than one process"
        else:
            assert error < GRADIENT_TOLERANCE, f"rank {rank}: gradient of {worst} off by {error}"
        assert result["steps"] < STEP_TOLERANCE, f"rank {rank}: losses of the steps off by {result['steps']}"
        if case.num_steps <= 3:
            assert result["norms"] < STEP_TOLERANCE, f"rank {rank}: gradient norms off by {result['norms']}"


@pytest.mark.parametrize("launch, case", ALL)
def test_each_layer_is_on_one_stage(launched: Any, launch: str, case: Case) -> None:
    """Catches stages that hold more than their own layers: a stage would not fit where its share does."""
    results = [result["cases"][case.name] for result in launched(launch)]
    copies = Counter(name for result in results for name in result["names"])
    expected = case.num_ranks // case.pp
    wrong = {name: n for name, n in copies.items() if n != expected and "embed_tokens" not in name}
    assert not wrong, f"parameters on more or fewer than {expected} ranks: {wrong}"


def test_sharded_weights_on_three_ranks(exhaustive: None, launched: Any) -> None:
    """Catches rows lost in padding, a reliance on what one backend has, and a recompute that reads slices or loses gradients."""
    for rank, result in enumerate(launched("ring of three")):
        found = result["checks"]
        assert sorted(found["uneven_on_other_backends"]) == ["jaccl", "nccl", "ring"]
        errors = [*found["uneven_on_other_backends"].values(), *found["recomputed_layers"].values()]
        assert max(errors) < 1e-5, f"rank {rank}: {found}"
