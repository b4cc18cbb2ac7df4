"""The self-test's outcomes as a table that can be pasted into a report, and as JSON."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from trainer.selftest.outcome import Outcome


def heading(facts: Mapping[str, Any]) -> Iterator[str]:
    """The machine and the versions."""
    memory = f", {facts['memory_gib']:g} GiB" if "memory_gib" in facts else ""
    ranks = f", {facts['num_devices']} ranks on {facts['backend']}" if facts["num_devices"] > 1 else ""
    yield f"{facts['device']} ({facts['mlx_device']}){memory}, {facts['system']}{ranks}"
    yield f"mlx-trainer {facts['mlx_trainer']}, mlx {facts['mlx']}, mlx-lm {facts['mlx_lm']}, Python {facts['python']}"


def line_of(outcome: Outcome) -> str:
    """One row of the table."""
    verdict = "pass" if outcome.is_passed else "FAIL"
    if outcome.reason:
        return f"  {verdict}  {outcome.name:<44} {outcome.reason}"
    if outcome.bound is None:
        return f"  {verdict}  {outcome.name:<44} {outcome.figure}"
    return f"  {verdict}  {outcome.name:<44} {outcome.error:8.1e} of {outcome.bound:.0e}  {outcome.figure}".rstrip()


def summary(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """How many passed, in what time, and which did not."""
    failed = [outcome for outcome in outcomes if not outcome.is_passed]
    seconds = sum(outcome.seconds for outcome in outcomes)
    yield f"{len(outcomes) - len(failed)} of {len(outcomes)} passed in {seconds:.0f} s"
    yield from (f"failed: {outcome.section}: {outcome.name}" for outcome in failed)


def as_json(facts: Mapping[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything, JSON-able."""
    rows = [asdict(outcome) | {"passed": outcome.is_passed} for outcome in outcomes]
    return {"machine": dict(facts), "passed": all(outcome.is_passed for outcome in outcomes), "checks": rows}
