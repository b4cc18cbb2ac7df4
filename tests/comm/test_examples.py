"""The examples in the docstrings of the collectives."""

from pathlib import Path

import pytest

from ranks import run_ranks


@pytest.mark.parametrize("backend", ["ring", "mpi"])
def test_they_are_true(backend: str) -> None:
    """Catches an example that shows another shape or value than the collective gives."""
    ranks = run_ranks(Path(__file__).parent / "workers" / "examples.py", 2, backend=backend, timeout=60)
    assert ranks[0].result == 0, ranks[0].stderr
