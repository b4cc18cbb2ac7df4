"""One launch per backend and number of ranks; each reference is trained once."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ranks import run_ranks, slowness

HERE = Path(__file__).parent
from mesh_launch import CHECKS, LAUNCHES, PATHS, TIMEOUT_SECONDS, Launch

from mesh_cases import to_json


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with losses, norms and gradients on one device."""
    folder = tmp_path_factory.mktemp("reference")
    cases = [case for launch in LAUNCHES.values() for case in launch.cases]
    longest = {case.reference: case for case in sorted(cases, key=lambda case: case.num_steps)}
    command = [sys.executable, str(HERE / "workers" / "reference.py"), str(folder), to_json(list(longest.values()))]
    subprocess.run(command, check=True, timeout=TIMEOUT_SECONDS * slowness(), env={**os.environ, "PYTHONPATH": PATHS})
    return folder


def run(launch: Launch, folder: Path) -> list[dict[str, Any]]:
    """Results of all ranks."""
    results = run_ranks(
        HERE / "workers" / "cases.py",
        launch.num_ranks,
        backend=launch.backend,
        args=[str(folder), to_json(launch.cases), ",".join(launch.checks) or "-"],
        timeout=TIMEOUT_SECONDS,
        env={"PYTHONPATH": PATHS},
    )
    return [result.result for result in results]


@pytest.fixture(scope="session")
def launched(reference: Path) -> Any:
    """Function from a launch's name to its ranks' results; each runs once. By default only "ring of two" is asked for."""
    done: dict[str, list[dict[str, Any]]] = {}

    def results(name: str) -> list[dict[str, Any]]:
        if name not in done:
            done[name] = run(LAUNCHES[name], reference)
        return done[name]

    return results


@pytest.fixture(scope="session")
def checks(launched: Any) -> list[dict[str, Any]]:
    """What the checks of the two-rank pipeline reported, per rank."""
    assert LAUNCHES["ring of two"].checks == CHECKS
    return [result["checks"] for result in launched("ring of two")]
