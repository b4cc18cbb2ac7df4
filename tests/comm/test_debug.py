"""COMM_DEBUG=1 with real processes: ranks that take their collectives in different orders."""

import re

import pytest

from ranks import run_ranks

SCRIPT = """
import mlx.core as mx
import comm

group = comm.init()
x = mx.ones((3,))
first, second = group.all_sum, group.all_max
if group.rank == 1:
    first, second = second, first
y, z = first(x), second(x)
mx.eval(y, z)
print("finished", flush=True)
"""


@pytest.mark.parametrize("backend", ["ring", "mpi"])
def test_a_different_order_is_named(backend: str) -> None:
    """Catches wrong values where ranks disagree on what comes next; MLX itself says nothing."""
    env = {"COMM_DEBUG": "1"}
    ranks = run_ranks(SCRIPT, 2, backend=backend, timeout=40, env=env, check=False)
    said = "".join(one.stderr for one in ranks)
    assert all(one.returncode == 1 and "finished" not in one.stdout for one in ranks), said
    # The number counts what starting took as well, which differs between backends.
    assert re.search(r"rank 1 is at (#\d+) all_max \(3,\) float32; rank 0 is at \1 all_sum \(3,\) float32", said), said
