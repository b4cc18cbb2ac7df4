"""Tokens per second of a recipe on one device: what `throughput/scaling_efficiency_pct` of several is compared with.

    OUTPUT_DIR/baseline.json      {digest: {"tokens_per_sec": ..., "measured_by": "bench" | "run", "recipe": facts}}

`python -m trainer bench RECIPE` on one device writes it, and so does a run on one device, which does not replace what
bench has measured. An entry counts only for the same model, method, rows, batch per device and device.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.build import Run
from trainer.files.storage import atomic_file, digest_of, read_json, write_json
from trainer.machine.facts import machine_facts
from trainer.metrics.records import Record, Sample

BASELINE_FILE = "baseline.json"


def baseline_facts(run: Run) -> dict[str, Any]:
    """What decides the tokens per second of one device, JSON-able."""
    recipe, machine = run.recipe, machine_facts(1, "", {})
    return {
        "model": run.identity["model"],
        "dtype": recipe.model.dtype,
        "quantize": asdict(recipe.model.quantize) if recipe.model.quantize else None,
        "method": recipe.method,
        "lora": run.identity["lora"],
        "data": run.identity["data"],
        "batch_size_per_device": run.opened.batch.per_device,
        "max_seq_len": recipe.data.max_seq_len,
        "packed": run.opened.packed,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "device": machine["device"],
        "mlx_device": machine["mlx_device"],
    }


def read_baseline(output_dir: Path, facts: dict[str, Any]) -> float | None:
    """Tokens per second of one device, or None where nothing was measured for these facts."""
    entry = _entries(output_dir).get(digest_of(facts))
    return entry["tokens_per_sec"] if entry else None


def write_baseline(output_dir: Path, facts: dict[str, Any], tokens_per_sec: float, measured_by: str) -> Path:
    """Record a measurement beside those of other settings; returns the file.

    Args:
        output_dir: The recipe's output folder; it is made.
        facts: What `baseline_facts` gave.
        tokens_per_sec: Measured on one device.
        measured_by: "bench", or "run", which replaces only another run's.

    Raises:
        OSError: It cannot be written.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    entries, key = _entries(output_dir), digest_of(facts)
    if measured_by == "bench" or entries.get(key, {}).get("measured_by") != "bench":
        entries[key] = {"tokens_per_sec": tokens_per_sec, "measured_by": measured_by, "recipe": facts}
        with atomic_file(output_dir / BASELINE_FILE) as file:
            write_json(file, entries)
    return output_dir / BASELINE_FILE


class BaselineSink:
    """Records the median tokens per second of a run on one device; the first record, which warms up, is left out.

    Args:
        output_dir: The run's output folder.
        facts: What `baseline_facts` gave.
    """

    def __init__(self, output_dir: Path, facts: dict[str, Any]) -> None:
        self.output_dir, self.facts = output_dir, facts
        self.speeds: list[float] = []

    def log(self, record: Record) -> None:
        if "throughput/tokens_per_sec" in record:
            self.speeds.append(record["throughput/tokens_per_sec"])

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Answers are no speed."""

    def message(self, text: str) -> None:
        """Messages are for people."""

    def advance(self, step: int) -> None:
        """Progress is no speed."""

    def close(self, summary: dict[str, object]) -> None:
        if len(self.speeds) > 1:
            write_baseline(self.output_dir, self.facts, statistics.median(self.speeds[1:]), "run")

    def abandon(self) -> None:
        """A run that failed is no measure."""


def _entries(output_dir: Path) -> dict[str, Any]:
    try:
        entries = read_json(output_dir / BASELINE_FILE)
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}
