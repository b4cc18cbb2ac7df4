"""One contract, run on every backend: ring and MPI for real, JACCL and NCCL behind a fake."""

from pathlib import Path

import pytest

from ranks import RankResult, run_ranks

WORKER = Path(__file__).parent / "workers" / "contract.py"
CHECKS = (
    "sums extremes gathers reduce_scatters broadcasts messages objects copy_and_sum "
    "gather_and_scatter shards partial_sums largest pipeline fusion mismatch rounds splits"
).split()
CASES = {  # carrier, fake, ranks, rounds of all collectives
    "ring-2": ("ring", "", 2, 20),
    "ring-3": ("ring", "", 3, 300),
    "mpi-3": ("mpi", "", 3, 300),
    "fake-jaccl-3": ("mpi", "jaccl", 3, 20),
    "fake-jaccl-ring-3": ("mpi", "jaccl-ring", 3, 20),
    "fake-nccl-3": ("mpi", "nccl", 3, 20),
}


@pytest.fixture(scope="module", params=CASES)
def ranks(request: pytest.FixtureRequest) -> list[RankResult]:
    carrier, fake, num_ranks, num_rounds = CASES[request.param]
    args = (fake, str(num_rounds))
    return run_ranks(WORKER, num_ranks, backend=carrier, args=args, timeout=120)


class TestContract:
    @pytest.mark.parametrize("check", CHECKS)
    def test_check(self, ranks: list[RankResult], check: str) -> None:
        """Catches a backend on which this part of `Group` gives other values or other errors."""
        for rank, one in enumerate(ranks):
            assert one.result[check] == "", f"rank {rank}: {one.result[check]}"

    def test_every_check_ran(self, ranks: list[RankResult]) -> None:
        """Catches a check that was added to the worker but not to the list here."""
        for one in ranks:
            assert set(one.result) == {*CHECKS, "default", "backend"}, f"{sorted(one.result)}"

    def test_default_group_is_the_world(self, ranks: list[RankResult]) -> None:
        """Catches MLX's default group being left at a sub-group after splits."""
        assert [one.result["default"] for one in ranks] == [[r, len(ranks)] for r in range(len(ranks))]
