"""Settings of every test: a fast BLAS where the system has one, and no just-in-time compiling.

Tests of several ranks start real processes through `ranks.run_ranks`. The widest launches (more ranks, the same
cases on a second backend) take many minutes on two cores and run with `--exhaustive` only: those are the tests that ask
for the fixture of that name, and parameters with the mark of that name.
"""

import os
import platform
import re
import signal

import pytest

from trainer.machine.blas import load_fast_blas

# What a shell puts into the background ignores SIGINT, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

from sharding import parts_of, shard_of

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

# One rounding on every x86 machine: AVX-512 kernels of OpenBLAS 0.3.21 take a few parity tests past 1e-5 (4e-5 at most);
# such distances are what float32 itself has from float64 there (pipeline/test_meshes.py).
if platform.machine() == "x86_64":
    os.environ.setdefault("OPENBLAS_CORETYPE", "Prescott")
load_fast_blas()


# What starts processes: names in a test's module, and fixtures.
STARTERS = {
    "run_ranks", "run_apart", "slowness", "subprocess", "Desk",
    "launched", "checks", "ring_of_two", "mpi_of_two", "mpi_of_four", "ring_of_four",
}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option for everything, or for a part of what is not run by default."""
    words = "also run the widest launches of real processes; with a value such as 2/5 only these, the second part of five"
    parser.addoption("--exhaustive", nargs="?", type=shard_of, const=True, metavar="PART/PARTS", help=words)
    parser.addoption("--device", choices=("cpu", "gpu"), help="where MLX computes, in tests of operations and models")


def pytest_configure(config: pytest.Config) -> None:
    """Makes the mark known, and the device MLX's default."""
    if device := config.getoption("--device"):
        import mlx.core as mx

        mx.set_default_device(getattr(mx, device))
    config.addinivalue_line("markers", "exhaustive: a parameter that runs with --exhaustive only")
    config.addinivalue_line("markers", "ranks: starts processes; -m 'not ranks' leaves the fast ones")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the tests that start processes; keeps one part of the exhaustive tests where one is wanted."""
    for item in items:
        if STARTERS & {*vars(item.module), *item.fixturenames, *re.split(r"\W", item.name)}:
            item.add_marker("ranks")
    shard = config.getoption("--exhaustive")
    wide = [item for item in items if "exhaustive" in item.fixturenames or item.get_closest_marker("exhaustive")]
    if not shard:
        for item in wide:
            item.add_marker(pytest.mark.skip(reason="runs with --exhaustive"))
    elif shard is not True:
        part, count = shard
        chosen = [item for item, its in zip(wide, parts_of([str(i.path) for i in wide], count)) if its == part]
        config.hook.pytest_deselected(items=list(set(items) - set(chosen)))
        items[:] = chosen


@pytest.fixture(scope="session")
def exhaustive() -> None:
    """Asked for by what runs with `--exhaustive` only."""
