"""One launch per backend and number of ranks, shared by all tests of this folder; the reference is trained once."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ranks import run_ranks, slowness
from tensor_cases import LORA_CASES, MAIN_CASES, NUM_STEPS, PATHS, SHORT_CASES, TIMEOUT_SECONDS
from tensor_models import save_large_model

HERE = Path(__file__).parent
CHECKS = [
    "message_counts",
    "generation",
    "adapters_after",
    "adapters_by_name",
    "dropout",
    "checkpointed_layers",
    "wrapper_behaviour",
    "wrong_plan",
    "round_trip",
    "standalone_linears",
    "prepared_layers",
    "loading_memory",
]
WIDE_CHECKS = ["round_trip", "generation", "deep_meshes"]


def launch(
    num_ranks: int,
    backend: str,
    folder: Path,
    num_steps: int,
    cases: list[str],
    checks: list[str],
    large_model: Path | None = None,
) -> list[dict[str, Any]]:
    """Results of all ranks of one launch."""
    arguments = [str(folder), str(num_steps), ",".join(cases) or "-", ",".join(checks) or "-"]
    worker = HERE / "workers" / "parity.py"
    env = {"PYTHONPATH": PATHS, "LARGE_MODEL": str(large_model)}
    results = run_ranks(worker, num_ranks, backend=backend, args=arguments, timeout=TIMEOUT_SECONDS, env=env)
    return [result.result for result in results]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with losses, norms and gradients of every case on one device."""
    folder = tmp_path_factory.mktemp("reference")
    command = [sys.executable, str(HERE / "workers" / "reference.py"), str(folder), *MAIN_CASES, *LORA_CASES]
    subprocess.run(command, check=True, timeout=TIMEOUT_SECONDS * slowness(), env={**os.environ, "PYTHONPATH": PATHS})
    return folder


@pytest.fixture(scope="session")
def ring_of_two(request: pytest.FixtureRequest, reference: Path, saved_model: Path) -> list[dict[str, Any]]:
    """All cases and checks on two ranks over TCP; waiting ranks spin, so all 20 steps run with `--exhaustive` only."""
    num_steps = NUM_STEPS if request.config.getoption("--exhaustive") else 4
    return launch(2, "ring", reference, num_steps, MAIN_CASES + LORA_CASES, CHECKS, saved_model)


@pytest.fixture(scope="session")
def mpi_of_two(reference: Path) -> list[dict[str, Any]]:
    """All 20 steps of the main cases on two ranks over MPI, whose waiting ranks yield their core."""
    return launch(2, "mpi", reference, NUM_STEPS, MAIN_CASES, [])


@pytest.fixture(scope="session")
def mpi_of_four(request: pytest.FixtureRequest, reference: Path) -> list[dict[str, Any]]:
    """More ranks than key-value heads: with `--exhaustive` all main cases and 2 x 2 meshes, else one case a method."""
    everything = request.config.getoption("--exhaustive")
    cases = [*MAIN_CASES, "phi3:lora"] if everything else SHORT_CASES
    return launch(4, "mpi", reference, 4, cases, WIDE_CHECKS if everything else WIDE_CHECKS[:2])


@pytest.fixture(scope="session")
def ring_of_four(exhaustive: None, reference: Path) -> list[dict[str, Any]]:
    """A 2 x 2 mesh over TCP, where MLX cannot split a group."""
    return launch(4, "ring", reference, 4, [], ["data_mesh"])


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model folder of more than 500 MB, removed at the end."""
    folder = tmp_path_factory.mktemp("large")
    save_large_model(folder)
    yield folder
    (folder / "model.safetensors").unlink()
