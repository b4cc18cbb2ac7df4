"""The numbers of a run: one row goes to every sink (metrics.jsonl, W&B, terminal), all under the same keys.

Only rank 0 has sinks; other ranks hold ``Metrics([])`` and call it alike. A key that a run cannot measure is left out
of the row, never 0. Metrics do not end a run: a sink that fails is named once and left out from then on, and rows that
the disk has no room for wait in memory.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from trainer.files.storage import atomic_file, explain
from trainer.metrics.table import METRIC_KEYS, METRICS, STEP_KEY, Metric

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
        own: Metrics of this run beside those of the table.
    """

    def __init__(self, sinks: Sequence[Sink], history: Iterable[Row] = (), own: Sequence[Metric] = ()) -> None:
        self.sinks = list(sinks)
        self.own = tuple(own)
        self.lost: RowsLost | None = None
        self.last: dict[str, float | int] = {}
        self.best: dict[str, float | int] = {}
        for row in history:
            self._remember(row)

    def log(self, row: Row) -> None:
        """Write one row. It holds ``train/global_step`` and any other of ``METRIC_KEYS``, as Python numbers."""
        unknown = sorted(set(row) - METRIC_KEYS - {metric.key for metric in self.own})
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

        Raises:
            RowsLost: ``metrics.jsonl`` lacks rows that could not be written. Every sink is closed.
        """
        whole = {**self.last, **self.best, **(summary or {})}
        self._each("close", whole)
        if self.lost is not None:
            raise self.lost
        return whole

    def abandon(self) -> None:
        """Instead of ``close`` when the run ends by an error: gives the terminal back; W&B shows the run as failed."""
        self._each("abandon")

    def _remember(self, row: Row) -> None:
        self.last |= row
        for metric in (*METRICS, *self.own):
            value = row.get(metric.key)
            # What an earlier start has left may have been edited since.
            if metric.better and isinstance(value, (int, float)) and math.isfinite(value):
                self.best[metric.best_key] = metric.better(value, self.best.get(metric.best_key, value))

    def _each(self, method: str, *arguments: object) -> None:
        for sink in list(self.sinks):
            try:
                getattr(sink, method)(*arguments)
            except RowsLost as error:
                self.lost = error
            except OSError as error:
                self.sinks.remove(sink)
                self.message(f"{type(sink).__name__} stopped: {error}. The run goes on without it.")


class RowsLost(OSError):
    """Rows that could not be written before the run ended."""


class JsonlSink:
    """Writes ``metrics.jsonl``, one JSON object a line, and held-out generations beside it in ``samples.jsonl``.

    Every row is in the file when ``log`` returns, so a killed run loses none. Where the disk is full, rows wait in
    memory and are written with a later one. A value that is not finite becomes null, because JSON has no NaN.

    Args:
        path: The ``metrics.jsonl``; its folder is made.
        resume_step: Rows after this step are cut off first, because the resumed run writes them again; so is a torn
            last line. None starts both files anew.
        notice: Gets a line when rows begin to wait.
    """

    def __init__(
        self, path: Path, resume_step: int | None = None, *, notice: Callable[[str], None] = lambda text: None
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rows, self._samples = _Lines(path, notice), _Lines(path.with_name("samples.jsonl"), notice)
        self.kept: list[Row] = self._rows.cut(resume_step)
        self._samples.cut(resume_step)

    def log(self, row: Row) -> None:
        self._rows.append({key: value if math.isfinite(value) else None for key, value in row.items()})

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._samples.append({STEP_KEY: step, "samples": list(samples)})

    def message(self, text: str) -> None:
        """Messages are for people; nothing is written."""

    def advance(self, step: int) -> None:
        """Progress is not a row; nothing is written."""

    def close(self, summary: dict[str, object]) -> None:
        """Write what waits. Raises RowsLost where that cannot be done."""
        for lines in (self._rows, self._samples):
            lines.flush()
            if lines.waiting:
                raise RowsLost(f"{lines.path} lacks its last {len(lines.waiting)} lines: {lines.failure}.")

    def abandon(self) -> None:
        """Write what waits, if that can be done: the run ends by an error of its own."""
        for lines in (self._rows, self._samples):
            lines.flush()


class _Lines:
    """A file of JSON objects, a line each. Lines that cannot be written wait for the next time."""

    def __init__(self, path: Path, notice: Callable[[str], None]) -> None:
        self.path = path
        self.waiting: list[bytes] = []
        self.failure = ""
        self._notice = notice
        self._num_bytes = 0

    def append(self, row: dict[str, object]) -> None:
        self.waiting.append(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.flush()

    def flush(self) -> None:
        data = b"".join(self.waiting)
        if not data:
            return
        try:
            with open(self.path, "ab") as file:
                if self.failure and file.tell() > self._num_bytes:
                    file.truncate(self._num_bytes)  # a part of the lines, which a full disk let through
                file.write(data)
                file.flush()
                num_bytes = file.tell()
        except OSError as error:
            if not self.failure:
                self._notice(f"{self.path} cannot be written ({error.strerror}); its rows wait in memory.")
            self.failure = explain(error, self.path.parent)
            return
        self._num_bytes = num_bytes
        self.waiting, self.failure = [], ""

    def cut(self, resume_step: int | None) -> list[Row]:
        """Drop rows after ``resume_step`` (all when None); returns those that stay, without their nulls."""
        if resume_step is None:
            self.path.unlink(missing_ok=True)
        if not self.path.is_file():
            return []
        kept = [row for row in read_rows(self.path) if row[STEP_KEY] <= resume_step]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        with atomic_file(self.path) as tmp:
            tmp.write_text(text, encoding="utf-8")
        self._num_bytes = len(text.encode())
        return [{key: value for key, value in row.items() if value is not None} for row in kept]


def read_rows(path: Path) -> list[dict]:
    """The rows of a ``metrics.jsonl`` or ``samples.jsonl`` in file order, up to a torn line. No file: no rows."""
    rows = []
    if path.is_file():
        # Cut at newlines alone: text may hold other characters at which str.splitlines() would cut.
        for line in path.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # an undecodable character included
                break
            if not isinstance(row, dict) or not isinstance(row.get(STEP_KEY), int):
                break
            rows.append(row)
    return rows
