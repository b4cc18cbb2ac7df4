"""Computing goes on while a collective waits for a peer."""

from pathlib import Path

import pytest

from ranks import run_ranks


@pytest.mark.parametrize("backend", ["ring", "mpi"])
def test_no_compute_stream_waits_for_a_peer(backend: str) -> None:
    """Catches what follows a collective on the default stream: a GPU whose stream waits for seconds is ended."""
    ranks = run_ranks(Path(__file__).parent / "workers" / "busy_peer.py", 2, backend=backend, timeout=90)
    waited = ranks[0].result
    assert len(waited) == 6 and max(waited.values()) < 1.5, waited
