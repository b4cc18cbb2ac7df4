"""TensorParallel against one device: loss, every gradient, 20 optimizer steps, gradient norms."""

from typing import Any

import pytest

from tensor_cases import LORA_CASES, MAIN_CASES, SHORT_CASES

GRADIENT_TOLERANCE = 1e-5
STEP_TOLERANCE = 1e-4


def check_case(results: list[dict[str, Any]], name: str) -> None:
    """Assert that a case agrees with one device on every rank."""
    for rank, result in enumerate(results):
        case = result["cases"][name]
        assert case["names_agree"], f"rank {rank}: other parameters are trained than on one device"
        assert case["loss"] < GRADIENT_TOLERANCE, f"rank {rank}: loss off by {case['loss']}"
        worst, error = case["gradient"]
        assert error < GRADIENT_TOLERANCE, f"rank {rank}: gradient of {worst} off by {error}"
        assert case["steps"] < STEP_TOLERANCE, f"rank {rank}: losses of the steps off by {case['steps']}"
        assert case["norms"] < STEP_TOLERANCE, f"rank {rank}: gradient norms off by {case['norms']}"


@pytest.mark.parametrize("name", MAIN_CASES + LORA_CASES)
def test_two_ranks_over_ring(ring_of_two: list[dict[str, Any]], name: str) -> None:
    """Catches a wrong slice, a missing or doubled sum, and a gradient that misses the other rank's part."""
    check_case(ring_of_two, name)


@pytest.mark.parametrize("name", MAIN_CASES)
def test_two_ranks_over_mpi(mpi_of_two: list[dict[str, Any]], name: str) -> None:
    """Catches what holds on one backend only."""
    check_case(mpi_of_two, name)


@pytest.mark.parametrize("name", SHORT_CASES)
def test_four_ranks(mpi_of_four: list[dict[str, Any]], name: str) -> None:
    """Catches wrong gradients and norms of key heads that two ranks hold (four ranks, two key heads)."""
    check_case(mpi_of_four, name)


@pytest.mark.parametrize("name", sorted({*MAIN_CASES} - {*SHORT_CASES}))
def test_four_ranks_in_all_methods(exhaustive: None, mpi_of_four: list[dict[str, Any]], name: str) -> None:
    """The same for every architecture with every method."""
    check_case(mpi_of_four, name)
