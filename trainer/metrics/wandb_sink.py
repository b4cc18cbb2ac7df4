"""Records to Weights & Biases without ever waiting for it.

W&B runs in a process of its own (`wandb_worker.py`) that is fed through a bounded queue and a pipe. A slow network, a
hung or dead W&B cost the run nothing but records that W&B does not get: `metrics.jsonl` has them all. The worker's own
session keeps Ctrl-C away from it, and when the trainer is killed the worker sees the pipe end and finishes the upload.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.metrics.records import Record, Sample
from trainer.metrics.table import METRIC_KEYS, METRICS, STEP_KEY

MODES = ("online", "offline", "disabled")
QUEUE_ROWS = 10_000
CLOSE_SECONDS = 30.0
WORKER = Path(__file__).with_name("wandb_worker.py")


def wandb_mode(mode: str) -> str:
    """The mode that counts: the environment's `WANDB_MODE` where set, else the recipe's.

    Raises:
        ValueError: Neither online, offline nor disabled.
    """
    chosen = os.environ.get("WANDB_MODE") or mode
    if chosen not in MODES:
        raise ValueError(f"W&B mode {chosen!r} is not known; it must be one of {', '.join(MODES)}.")
    return chosen


def summaries() -> dict[str, str]:
    """What W&B's summary keeps beside the last value, by key."""
    return {metric.key: f"{metric.better.__name__},last" for metric in METRICS if metric.better}


class WandbSink:
    """Sends records to one W&B run, which is continued under the same id after a restart.

    Args:
        output_dir: The run's folder; W&B keeps its files and the run's id in `wandb/` there.
        project: W&B project.
        name: Shown name of the run; None lets W&B choose.
        mode: "online" or "offline" (`wandb_mode` applied; "disabled" means no sink at all). Online without login or
            network becomes offline, with a notice that names the command for a later upload.
        config: The resolved recipe, JSON-able.
        resumed: Continue the run whose id is stored; otherwise begin a new one.
        notice: Shows a line to a person; called from another thread.
        close_seconds: How long `close` waits for the upload to end before the worker is killed.
        worker: The command of the worker; a test may give its own.
    """

    def __init__(
        self,
        output_dir: Path,
        project: str,
        *,
        name: str | None,
        mode: str,
        config: dict[str, object],
        resumed: bool,
        notice: Callable[[str], None],
        close_seconds: float = CLOSE_SECONDS,
        worker: Sequence[str] = (sys.executable, "-P", str(WORKER)),
    ) -> None:
        self._notice = notice
        self._close_seconds = close_seconds
        self._hint = f"`wandb sync {output_dir}/wandb/*run-*` uploads what it kept."
        self._num_dropped = 0
        self._lines: queue.Queue[str | None] = queue.Queue(QUEUE_ROWS)
        folder = output_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "worker.log", "w") as log:
            self._worker = subprocess.Popen(
                worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._feed, self._relay)]
        for thread in self._threads:
            thread.start()
        begin = {"project": project, "name": name, "mode": mode, "config": config, "resumed": resumed}
        self._send({"begin": {**begin, "output_dir": str(output_dir), "step_key": STEP_KEY, "summaries": summaries()}})

    def log(self, record: Record) -> None:
        self._send({"row": record})

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._send({"samples": {"step": step, "rows": list(samples)}})

    def message(self, text: str) -> None:
        """Messages are for the person at the terminal; W&B gets none."""

    def advance(self, step: int) -> None:
        """Progress is not a record; W&B gets none."""

    def close(self, summary: dict[str, object]) -> None:
        """Hand over the summary and wait, at most `close_seconds`, for the upload to end."""
        # W&B keeps the last and best value of every record key by itself; a plain value would replace both.
        self._send({"end": {key: value for key, value in summary.items() if key not in METRIC_KEYS}})
        self._put(None)
        try:
            code = self._worker.wait(self._close_seconds)
        except subprocess.TimeoutExpired:
            self._kill_worker()
            self._notice(f"W&B did not finish within {self._close_seconds:g} s and was stopped. {self._hint}")
            return
        for thread in self._threads:
            thread.join(timeout=1.0)
        if code != 0:
            self._notice(f"W&B ended with exit code {code}; metrics.jsonl has every row. {self._hint}")
        elif self._num_dropped:
            self._notice(f"W&B was too slow for {self._num_dropped} rows; metrics.jsonl has them.")

    def abandon(self) -> None:
        """Nothing to do: the worker sees the pipe end with this process, and marks the run as failed."""

    def _send(self, message: dict[str, object]) -> None:
        self._put(json.dumps(message))

    def _put(self, line: str | None) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._num_dropped += 1

    def _feed(self) -> None:
        """Thread: queue to pipe. A worker that is gone swallows the rest; `close` tells."""
        assert self._worker.stdin is not None, "the worker was started with a pipe"
        try:
            with self._worker.stdin as pipe:
                while (line := self._lines.get()) is not None:
                    pipe.write(line + "\n")
                    pipe.flush()
        except OSError:
            return

    def _relay(self) -> None:
        """Thread: what the worker says, to the person."""
        assert self._worker.stdout is not None, "the worker was started with a pipe"
        with self._worker.stdout as lines:
            for line in lines:
                self._notice(line.rstrip())

    def _kill_worker(self) -> None:
        """The worker leads its session, so W&B's own service goes with it."""
        try:
            os.killpg(self._worker.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self._worker.wait()
