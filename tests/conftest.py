"""Settings of every test: a fast BLAS where the system has one, and no just-in-time compiling.

Tests of several ranks start real processes through `ranks.run_ranks`. The widest launches (more ranks, the same
cases on a second backend) take many minutes on two cores and run with `--exhaustive` only.
"""

import os
import platform
import signal
import sys
from pathlib import Path

import pytest

from trainer.machine.blas import load_fast_blas

# What a shell puts into the background ignores SIGINT, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
sys.path.insert(0, str(Path(__file__).parent))

# One rounding on every x86 machine: AVX-512 kernels of OpenBLAS 0.3.21 take a few parity tests past 1e-5 (4e-5 at most);
# such distances are what float32 itself has from float64 there (pipeline/test_meshes.py).
if platform.machine() == "x86_64":
    os.environ.setdefault("OPENBLAS_CORETYPE", "Prescott")
load_fast_blas()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option for everything."""
    parser.addoption("--exhaustive", action="store_true", help="also run the widest launches of real processes")


@pytest.fixture(scope="session")
def exhaustive(request: pytest.FixtureRequest) -> None:
    """Asked for by what runs with `--exhaustive` only."""
    if not request.config.getoption("--exhaustive"):
        pytest.skip("runs with --exhaustive")
