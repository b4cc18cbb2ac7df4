"""The numbers of a run: one row goes to every sink (metrics.jsonl, W&B, terminal), all under the same keys.

Only rank 0 has sinks; other ranks hold ``Metrics([])`` and call it alike. A key that a run cannot measure is left out
of the row, never 0. A sink that fails (disk full) is named once and left out from then on: metrics do not end a run.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from trainer.storage import atomic_file

STEP_KEY = "train/global_step"
TRAIN_KEYS = (
    "train/loss",
    "train/grad_norm",
    "train/learning_rate",
    "train/epoch",
    STEP_KEY,
    "train/num_tokens",
    "train/skipped_steps",
)
EVAL_KEYS = ("eval/loss", "eval/ppl", "eval/exact_match")
THROUGHPUT_KEYS = (
    "throughput/tokens_per_sec",
    "throughput/tokens_per_sec_per_device",
    "throughput/samples_per_sec",
    "throughput/padding_pct",
    "throughput/tflops_per_device",
    "throughput/mfu_pct",
    "throughput/scaling_efficiency_pct",
)
TIME_KEYS = ("time/step_s", "time/data_s", "time/compute_s", "time/optimizer_s")
COMM_KEYS = (
    "comm/allreduce_s",
    "comm/exposed_pct",
    "comm/bytes_per_step",
    "comm/bus_gb_per_s",
    "comm/rank_skew_s",
    "pp/bubble_pct",
)
MEMORY_KEYS = ("memory/peak_gib", "memory/active_gib", "memory/cache_gib")
METRIC_KEYS = frozenset(TRAIN_KEYS + EVAL_KEYS + THROUGHPUT_KEYS + TIME_KEYS + COMM_KEYS + MEMORY_KEYS)

# Summary key -> (row key, the better of two values).
BEST_VALUES = {
    "best/eval_loss": ("eval/loss", min),
    "best/eval_exact_match": ("eval/exact_match", max),
    "best/tokens_per_sec": ("throughput/tokens_per_sec", max),
}

Row = dict[str, float | int]
# A held-out generation: "prompt", "expected" (None where no answer is the right one), "generated".
Sample = dict[str, str | None]


class Sink(Protocol):
    """Where rows go. ``samples`` are held-out generations; ``message`` is a line for a person."""

    def log(self, row: Row) -> None: ...

    def samples(self, step: int, samples: Sequence[Sample]) -> None: ...

    def message(self, text: str) -> None: ...

    def advance(self, step: int) -> None: ...

    def close(self, summary: dict[str, object]) -> None: ...

    def abandon(self) -> None: ...


class Metrics:
    """Sends each row to every sink, and keeps the last and best values for the summary.

    Args:
        sinks: Empty on every rank but 0.
        history: Rows of the same run from before a restart (``JsonlSink.kept``), so that best values span it.
    """

    def __init__(self, sinks: Sequence[Sink], history: Iterable[Row] = ()) -> None:
        self.sinks = list(sinks)
        self.last: dict[str, float | int] = {}
        self.best: dict[str, float | int] = {}
        for row in history:
            self._remember(row)

    def log(self, row: Row) -> None:
        """Write one row. It holds ``train/global_step`` and any other of ``METRIC_KEYS``, as Python numbers."""
        unknown = sorted(set(row) - METRIC_KEYS)
        assert not unknown and STEP_KEY in row, f"row needs {STEP_KEY}; not metric keys: {unknown}"
        self._remember(row)
        self._each("log", row)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Show held-out generations: dicts of ``prompt``, ``expected`` (or None) and ``generated``."""
        self._each("samples", step, samples)

    def message(self, text: str) -> None:
        """Show a line to the person at the terminal."""
        self._each("message", text)

    def advance(self, step: int) -> None:
        """Move the progress display to ``step`` between rows."""
        self._each("advance", step)

    def close(self, summary: dict[str, object] | None = None) -> dict[str, object]:
        """Close every sink; call it once.

        Args:
            summary: Further values for the summary; they win over those kept here.

        Returns:
            The last value of every key, best values (``best/eval_loss`` …), and ``summary``.
        """
        whole = {**self.last, **self.best, **(summary or {})}
        self._each("close", whole)
        return whole

    def abandon(self) -> None:
        """Instead of ``close`` when the run ends by an error: gives the terminal back; W&B shows the run as failed."""
        self._each("abandon")

    def _remember(self, row: Row) -> None:
        self.last |= row
        for name, (key, better) in BEST_VALUES.items():
            if key in row and math.isfinite(row[key]):
                self.best[name] = better(row[key], self.best.get(name, row[key]))

    def _each(self, method: str, *arguments: object) -> None:
        for sink in list(self.sinks):
            try:
                getattr(sink, method)(*arguments)
            except OSError as error:
                self.sinks.remove(sink)
                self.message(f"{type(sink).__name__} stopped: {error}. The run goes on without it.")


class JsonlSink:
    """Writes ``metrics.jsonl``, one JSON object a line, and held-out generations beside it in ``samples.jsonl``.

    Every row is in the file when ``log`` returns, so a killed run loses none. A value that is not finite becomes null,
    because JSON has no NaN.

    Args:
        path: The ``metrics.jsonl``; its folder is made.
        resume_step: Rows after this step are cut off first, because the resumed run writes them again; so is a torn
            last line. None starts both files anew.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.samples_path = path.with_name("samples.jsonl")
        self.kept: list[Row] = _cut(self.path, resume_step)
        _cut(self.samples_path, resume_step)

    def log(self, row: Row) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        _append(self.path, finite)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        _append(self.samples_path, {STEP_KEY: step, "samples": list(samples)})

    def message(self, text: str) -> None:
        """Messages are for people; nothing is written."""

    def advance(self, step: int) -> None:
        """Progress is not a row; nothing is written."""

    def close(self, summary: dict[str, object]) -> None:
        """Every row is in the file already."""

    def abandon(self) -> None:
        """Every row is in the file already."""


def read_rows(path: Path) -> list[dict]:
    """The rows of a ``metrics.jsonl`` or ``samples.jsonl`` in file order, up to a torn line. No file: no rows."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not isinstance(row, dict) or STEP_KEY not in row:
                break
            rows.append(row)
    return rows


def _append(path: Path, row: dict[str, object]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _cut(path: Path, resume_step: int | None) -> list[Row]:
    """Drop rows after ``resume_step`` (all when None); returns those that stay, without their nulls."""
    if resume_step is None:
        path.unlink(missing_ok=True)
        return []
    kept = [row for row in read_rows(path) if row[STEP_KEY] <= resume_step]
    with atomic_file(path) as tmp:
        tmp.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    return [{key: value for key, value in row.items() if value is not None} for row in kept]
