"""The self-test passes here, and fails where something is wrong: on this device, or with `--device gpu` on that one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ranks import ROOT, slowness
from trainer.layers import elementwise
from trainer.selftest import models
from trainer.selftest.operations import has_reduced_products, operation_checks
from trainer.selftest.outcome import Check, Outcome, outcomes
from trainer.selftest.report import as_json, line_of, summary

OPERATIONS = {check.name: check for check in operation_checks()}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name: str) -> None:
    """Catches a value or a gradient of an operation that is not its formula's on this device."""
    (outcome,) = outcomes([OPERATIONS[name]])
    assert outcome.is_passed, line_of(outcome)


def test_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a step on this device, checkpointed or packed, that is not the CPU's plain one."""
    monkeypatch.setattr(models, "METHODS", {"LoRA": models.METHODS["LoRA"]})
    checks = models.model_checks(tmp_path, has_reduced_products())
    assert len(checks) >= 6
    failed = [line_of(outcome) for outcome in outcomes(checks) if not outcome.is_passed]
    assert not failed, "\n".join(failed)


def test_what_is_wrong_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a self-test that passes whatever the operations compute."""
    right = elementwise.swiglu
    monkeypatch.setattr(elementwise, "swiglu", lambda gate, x: right(gate, x) * 1.001)
    found = list(outcomes([check for check in operation_checks() if check.name == "swiglu, float32"]))
    assert not found[0].is_passed and "FAIL" in line_of(found[0])
    assert list(summary(found)) == ["0 of 1 passed in 0 s", "failed: operations against float64: swiglu, float32"]


def test_a_check_that_raises_has_failed_and_the_others_go_on() -> None:
    """Catches a report that ends at the first operation that a device lacks, and NaN that counts as near."""

    def broken() -> tuple[float, str]:
        raise ValueError("no such kernel\nmore")

    checks = [Check("s", "raises", 1.0, broken), Check("s", "nan", 1.0, lambda: (float("nan"), "")),
              Check("s", "measured", None, lambda: (None, "3 us")), Check("s", "far", 1.0, lambda: (2.0, "x"))]  # fmt: skip
    found = list(outcomes(checks))
    assert [outcome.is_passed for outcome in found] == [False, False, True, False]
    assert found[0].reason == "ValueError: no such kernel" and "no such kernel" in line_of(found[0])
    whole = as_json({"device": "x"}, found)
    assert not whole["passed"] and [row["passed"] for row in whole["checks"]] == [False, False, True, False]
    assert as_json({}, [Outcome("s", "n", 0.0, 0.0)])["passed"], "exactly equal is within a bound of 0"


@pytest.mark.usefixtures("exhaustive")
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_command(num_ranks: int) -> None:
    """Catches a part of the report that is missing, or output of other packages in its JSON."""
    launch = ["-m", "comm", "launch", "-n", str(num_ranks), "--", sys.executable] if num_ranks > 1 else []
    command = [sys.executable, *launch, "-m", "trainer", "selftest", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240 * slowness())
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.removeprefix("[0] ") for line in done.stdout.splitlines()]
    report = json.loads("\n".join(lines))
    assert report["passed"] and {row["section"] for row in report["checks"]} >= {
        "operations against float64", "models against the CPU", *(["ranks"] if num_ranks > 1 else []),
    }  # fmt: skip
    assert report["machine"]["num_devices"] == num_ranks
