"""What a person sees while a run goes: a progress bar on a terminal, plain lines in a file or a pipe.

Training records move the bar; evaluations, held-out generations and messages stay on the screen above it.
"""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from trainer.metrics.records import Record, Sample
from trainer.metrics.streams import harmless, turn_off_stdout
from trainer.metrics.table import METRICS, STEP_KEY

NUM_SAMPLES_SHOWN = 3


class Output(Console):
    """Standard output as a console; where nobody reads it any more, that is an error like any other."""

    def on_broken_pipe(self) -> None:
        """Called by rich within the handling of a `BrokenPipeError`."""
        raise


class TerminalSink:
    """Shows a run.

    Args:
        total_steps: Optimizer updates of the whole run.
        start_step: Updates done before this start of it (resumed runs).
        console: Where to; by default standard output.
        clock: Seconds; a test may give its own.
        on_closed: Called once, when nobody reads the output any more.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_closed: Callable[[], None] = lambda: None,
    ) -> None:
        self.total_steps = total_steps
        self.start_step = start_step
        self.console = console or Output()
        self._clock = clock
        self._on_closed = on_closed
        self._is_writable = True
        self._first: tuple[float, int] | None = None
        self._words = ""
        self._train_words = {m.key: m.words for m in METRICS if m.words and not m.key.startswith("eval/")}
        self._eval_words = {m.key: m.words for m in METRICS if m.words and m.key.startswith("eval/")}
        width = self.console.width
        self._bar_words = {m.key: m.words for m in METRICS if m.key in self._train_words and m.columns <= width}
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if self.console.is_terminal:
            self._progress = self._make_progress()
            self._progress.start()

    def log(self, record: Record) -> None:
        step = int(record[STEP_KEY])
        words = _words(record, self._train_words)
        if words:
            self._words = _words(record, self._bar_words)
            self.advance(step)
            if self._progress is None:
                self._print(f"step {step}/{self.total_steps}  {words}  {self._eta(step)}".rstrip())
        if evaluated := _words(record, self._eval_words):
            self._print(f"step {step}/{self.total_steps}  {evaluated}", style="bold")

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        room = max(40, self.console.width - 13)
        for sample in samples[:NUM_SAMPLES_SHOWN]:
            prompt = _one_line(sample["prompt"])
            # The question stands at a prompt's end, so a long one loses its beginning.
            self._print("  prompt     " + (prompt if len(prompt) <= room else "…" + prompt[1 - room :]))
            for label in ("expected", "generated"):
                if sample[label] is not None:
                    text = _one_line(sample[label])
                    self._print(f"  {label:<11}" + (text if len(text) <= room else text[: room - 1] + "…"))
            self._print("")

    def message(self, text: str) -> None:
        self._print(text)

    def advance(self, step: int) -> None:
        eta = self._eta(step)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, words=self._words, eta=eta)

    def close(self, summary: dict[str, object]) -> None:
        self.abandon()

    def abandon(self) -> None:
        """Stop the bar, which has hidden the terminal's cursor."""
        if self._progress is not None:
            with suppress(OSError):  # the terminal may be gone
                self._progress.stop()

    def _make_progress(self) -> Progress:
        columns = (
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[words]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            TextColumn("{task.fields[eta]}", table_column=Column(no_wrap=True)),
        )
        progress = Progress(*columns, console=self.console, refresh_per_second=2, expand=True)
        self._task = progress.add_task(
            "train", total=self.total_steps, completed=self.start_step, words="starting", eta=""
        )
        return progress

    def _eta(self, step: int) -> str:
        """Time left at the mean pace since the first step of this start, evaluations included."""
        if self._first is None:
            self._first = self._clock(), step
        first_time, first_step = self._first
        if step <= first_step:
            return ""
        pace = (self._clock() - first_time) / (step - first_step)
        minutes, seconds = divmod(round(pace * max(0, self.total_steps - step)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"ETA {hours}:{minutes:02d}:{seconds:02d}" if hours else f"ETA {minutes}:{seconds:02d}"

    def _print(self, text: str, style: str | None = None) -> None:
        if not self._is_writable:
            return
        try:
            # A Text object, so that brackets in prompts and paths are not taken for rich's markup.
            self.console.print(Text(text, style=style or ""), soft_wrap=True)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Write no more: nobody reads, or the disk of the file is full."""
        self._is_writable = False
        turn_off_stdout()
        is_closed = isinstance(error, BrokenPipeError)
        then = "the run saves and ends; the same command goes on from there" if is_closed else "the run goes on without"
        with suppress(OSError):
            print(f"Nothing can be written to the output any more ({error.strerror}): {then}.", file=sys.stderr)
        if is_closed:
            self._on_closed()


def _one_line(text: str | None) -> str:
    """Whitespace runs as one blank; characters that would steer the terminal as dots."""
    return harmless(" ".join((text or "").split()))


def _words(record: Record, words: dict[str, str]) -> str:
    hidden = {"train/skipped_steps"} if not record.get("train/skipped_steps") else set()
    return "  ".join(form.format(record[key]) for key, form in words.items() if key in record and key not in hidden)
