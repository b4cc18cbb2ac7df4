"""`profile: {start, steps}`: where the time of some steps goes, on every rank.

Written by rank 0: `profile/trace.json` in Chrome's trace-event format, a process row per rank, which
https://ui.perfetto.dev and chrome://tracing open. On a Mac also `profile/rank0.gputrace`, a Metal capture for Xcode,
when the run was started with MTL_CAPTURE_ENABLED=1. Traced steps are measured in phases, as the sampled ones are, so
they show no overlap of computing and communication.

Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

import comm
from parallel import Span
from trainer.files.storage import atomic_file
from trainer.recipe.config import ProfileConfig

# The phases of a step as the loop and `parallel.value_and_grad` name them; the middle ones lie within "compute".
WORDS = {
    "data": "data",
    "compute": "gradients",
    "local": "forward and backward",
    "skew": "wait for other ranks",
    "reduce": "communication",
    "optimizer": "optimizer",
}


class Profiler:
    """Collects the phases of the steps that a recipe wants traced. Every rank calls it alike.

    Args:
        config: The recipe's `profile:`, or None for no trace.
        output_dir: The run's folder on rank 0; None elsewhere.
        world: All ranks.
        notice: Gets one line about what was or could not be written.
    """

    def __init__(
        self, config: ProfileConfig | None, output_dir: Path | None, world: comm.Group, notice: Callable[[str], None]
    ):
        self.steps = range(config.start, config.start + config.steps) if config else range(0)
        self.folder = output_dir and output_dir / "profile"
        self.world, self.notice = world, notice
        self.spans: list[tuple[int, Span]] = []
        self.zero: float | None = None
        self.is_capturing = False

    def before_step(self, step: int) -> bool:
        """Whether the coming step is traced; the first such step starts the clocks of all ranks together."""
        is_traced = step in self.steps
        if is_traced and self.zero is None:
            self._start_capture()
            self.world.barrier()
            self.zero = time.perf_counter()
        return is_traced

    def after_step(self, step: int, spans: Sequence[Span]) -> None:
        """Take in a step's phases; after the last traced step the trace is written."""
        if step in self.steps:
            self.spans += [(step, span) for span in spans]
            if step == self.steps[-1]:
                self.finish()

    def finish(self) -> None:
        """Write what was traced, if anything was: also called at the end of a run that stopped before."""
        if self.zero is None or not self.spans:
            return
        if self.is_capturing:
            mx.metal.stop_capture()
        events = _events(self.world.rank, self.spans, self.zero)
        self.spans = []
        everyone = comm.all_gather_object(events, self.world)
        if self.folder is not None:
            self._write([event for events in everyone for event in events])

    def _start_capture(self) -> None:
        if self.folder is None or not mx.metal.is_available():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            mx.metal.start_capture(str(self.folder / "rank0.gputrace"))
            self.is_capturing = True
        except (RuntimeError, OSError) as error:
            self.notice(f"no Metal capture ({error}); it needs MTL_CAPTURE_ENABLED=1, and an older one removed.")

    def _write(self, events: list[dict[str, Any]]) -> None:
        assert self.folder is not None, "only a rank with a disk writes"
        target = self.folder / "trace.json"
        # The first step's data came before the clocks were set.
        first = min(event["ts"] for event in events if "ts" in event)
        events = [event | {"ts": event["ts"] - first} if "ts" in event else event for event in events]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(target) as file:
                file.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")
        except OSError as error:
            self.notice(f"{target} could not be written: {error.strerror}.")
            return
        self.notice(f"Traced steps: {target}; https://ui.perfetto.dev shows them.")


def _events(rank: int, spans: Sequence[tuple[int, Span]], zero: float) -> list[dict[str, Any]]:
    """One rank's complete events (times in microseconds since `zero`), behind the name of its row."""
    events: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}},
    ]
    for step, (phase, beginning, end) in spans:
        at = {"ts": 1e6 * (beginning - zero), "dur": 1e6 * (end - beginning), "pid": rank, "tid": 0}
        events.append({"name": WORDS[phase], "cat": "step", "ph": "X", **at, "args": {"step": step}})
    return events
