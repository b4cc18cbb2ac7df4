"""Rows on their way to metrics.jsonl, the terminal and the summary."""

import errno
import io
import json
from pathlib import Path

import mlx.core as mx
import pytest
from rich.console import Console

from trainer.metrics.records import JsonlSink, Metrics, Record, _Lines, read_records
from trainer.metrics.table import METRIC_KEYS
from trainer.metrics.terminal import TerminalSink
from trainer.metrics.throughput import Throughput, memory_row


def row(step: int, **values: float) -> Record:
    return {"train/global_step": step, **{key.replace("__", "/"): value for key, value in values.items()}}


def steps_in(path: Path) -> list[int]:
    return [found["train/global_step"] for found in read_records(path)]


def test_text_that_looks_like_the_end_of_a_line(tmp_path: Path) -> None:
    """Rows that vanish on resume, as their text holds what Unicode takes for a new line; a torn character at the end."""
    path = tmp_path / "samples.jsonl"
    rows = [{"train/global_step": step, "text": f"a{mark}b"} for step, mark in enumerate("\u2028\u2029\x85")]
    written = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(written + '{"train/global_step": 9, "text": "é'.encode()[:-1])
    assert read_records(path) == rows
    assert _Lines(path, print).cut(2) == rows
    assert path.read_bytes() == written


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_every_row_is_on_the_disk_at_once(tmp_path: Path) -> None:
    """Rows that wait in a buffer and are lost when the run is killed."""
    sink = JsonlSink(tmp_path / "run" / "metrics.jsonl")
    metrics = Metrics([sink])
    metrics.log(row(10, train__loss=2.5))
    metrics.log(row(20, train__loss=float("nan"), train__grad_norm=float("inf")))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"train/global_step": 10, "train/loss": 2.5}
    assert json.loads(lines[1], parse_constant=pytest.fail)["train/loss"] is None
    metrics.close()


def test_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    """Steps after the checkpoint that stand twice, a torn line that spoils the file, rows that are lost."""
    path = tmp_path / "metrics.jsonl"
    first = Metrics([JsonlSink(path)])
    for step in (10, 20, 30, 40):
        first.log(row(step, train__loss=1.0, eval__loss=step / 10))
        first.samples(step, [{"prompt": "p", "expected": None, "generated": str(step)}])
    first.close()
    with open(path, "a") as file:
        file.write('{"train/global_step": 50, "train/lo')
    sink = JsonlSink(path, resume_step=20)
    second = Metrics([sink], history=sink.kept)
    second.log(row(30, train__loss=0.5))
    second.samples(30, [])
    assert steps_in(path) == [10, 20, 30]
    assert steps_in(tmp_path / "samples.jsonl") == [10, 20, 30]
    assert second.close()["best/eval_loss"] == 1.0, "best values span the restart"
    JsonlSink(path)
    assert steps_in(path) == steps_in(tmp_path / "samples.jsonl") == []


def test_resume_at_step_0_keeps_the_first_evaluation(tmp_path: Path) -> None:
    """Step 0 taken for 'no step'."""
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log(row(0, eval__loss=5.0))
    sink.log(row(10, eval__loss=4.0))
    sink.close({})
    assert JsonlSink(path, resume_step=0).kept == [row(0, eval__loss=5.0)]


def test_keys_are_the_documented_ones() -> None:
    """A key that dashboards and reports do not know."""
    metrics = Metrics([])
    with pytest.raises(AssertionError, match="train/los"):
        metrics.log(row(1, train__los=1.0))
    with pytest.raises(AssertionError, match="train/global_step"):
        metrics.log({"train/loss": 1.0})
    assert all(key in METRIC_KEYS for key in memory_row())
    assert len(METRIC_KEYS) == 30


def test_summary_has_last_and_best_values() -> None:
    """Best values that are last values, or that a NaN wins."""
    metrics = Metrics([])
    for step, loss in ((10, 2.0), (20, 1.0), (30, float("nan")), (40, 3.0)):
        metrics.log(row(step, eval__loss=loss, eval__exact_match=loss / 10))
    summary = metrics.close({"trained": True})
    assert summary == {
        "train/global_step": 40,
        "eval/loss": 3.0,
        "eval/exact_match": 0.3,
        "best/eval_loss": 1.0,
        "best/eval_exact_match": 0.3,
        "trained": True,
    }


class FullDisk:
    """Lets `room` more bytes of each write through; None: all."""

    room: int | None = None

    def open(self, path: Path, mode: str) -> io.BufferedWriter:
        disk = self

        class File(io.FileIO):
            def write(self, data: bytes) -> int:
                if disk.room is None:
                    return super().write(data)
                super().write(bytes(data)[: disk.room])
                raise OSError(errno.ENOSPC, "No space left on device", str(path))

        return io.BufferedWriter(File(path, mode))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    """Under what JsonlSink appends to."""
    disk = FullDisk()
    monkeypatch.setattr("trainer.metrics.records.open", disk.open, raising=False)
    return disk


def test_rows_wait_for_room_on_the_disk(tmp_path: Path, disk: FullDisk) -> None:
    """A full disk that ends hours of training, loses rows for ever, tears a line, or that nobody is told of."""
    console = Console(file=io.StringIO(), width=200)
    terminal = TerminalSink(40, console=console)
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics([JsonlSink(path, notice=terminal.message), terminal])
    metrics.log(row(10, train__loss=1.0))
    disk.room = 7
    for step in (20, 30):
        metrics.log(row(step, train__loss=1.0))
    assert steps_in(path) == [10]
    disk.room = None
    metrics.log(row(40, train__loss=1.0))
    metrics.close()
    assert steps_in(path) == [10, 20, 30, 40]
    shown = console.file.getvalue()
    assert shown.count("cannot be written (No space left on device); its rows wait in memory") == 1
    assert "step 30/40" in shown


def test_rows_that_never_found_room_are_an_error(tmp_path: Path, disk: FullDisk) -> None:
    """A run that seems to have ended well, without the last rows of its metrics."""
    metrics = Metrics([JsonlSink(tmp_path / "metrics.jsonl")])
    disk.room = 0
    metrics.log(row(10, train__loss=1.0))
    with pytest.raises(OSError, match=r"metrics.jsonl lacks its last 1 lines: No space left on device"):
        metrics.close()


def test_plain_lines_without_a_terminal() -> None:
    """Control characters in a log file, a missing number, a wrong time left, markup that swallows [brackets]."""
    clock = Clock()
    console = Console(file=io.StringIO(), width=120)
    sink = TerminalSink(100, start_step=20, console=console, clock=clock)
    clock.now += 1000
    sink.advance(21)
    clock.now += 27
    sink.log(
        {
            **row(30, train__loss=1.23456, train__grad_norm=0.5, train__learning_rate=1e-5, train__skipped_steps=0),
            **row(30, throughput__tokens_per_sec=12345.6, memory__peak_gib=1.5),
        }
    )
    sink.log(row(30, eval__loss=2.0, eval__ppl=7.389, eval__exact_match=0.855))
    sink.samples(30, [{"prompt": "a\n[b]\x07", "expected": "SELECT", "generated": "x" * 500}])
    sink.samples(30, [{"prompt": "x" * 500 + "the question", "expected": None, "generated": ""}])
    sink.message("W&B: [link]")
    sink.advance(40)
    sink.close({})
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "step 30/100  loss 1.2346  grad 0.5  lr 1e-05  12,346 tokens/s  peak 1.5 GiB  ETA 3:30"
    assert lines[1] == "step 30/100  eval loss 2.0000  ppl 7.389  exact match 85.5%"
    assert lines[2] == "  prompt     a [b]·"
    assert lines[6].startswith("  prompt     …xx") and lines[6].endswith("the question")
    assert lines[4].endswith("xx…") and len(lines[4]) == len(lines[6]) == 120
    assert lines[-1] == "W&B: [link]"
    assert "\x1b" not in console.file.getvalue()


def test_bar_on_a_terminal() -> None:
    """A bar that is not drawn, does not move, or swallows evaluation lines."""
    console = Console(file=io.StringIO(), width=160, force_terminal=True, color_system=None)
    sink = TerminalSink(100, console=console)
    sink.log(row(50, train__loss=1.5, train__skipped_steps=2))
    sink.log(row(50, eval__loss=2.0))
    sink.advance(51)
    sink.close({})
    text = console.file.getvalue()
    assert "step 50/100  eval loss 2.0000" in text
    assert " 51/100" in text
    assert "loss 1.5000  skipped 2" in text


def test_throughput_leaves_out_pauses() -> None:
    """Evaluation counted as training time, padding counted as tokens, a window that keeps the one before."""
    clock = Clock()
    meter = Throughput(2, flops_per_token=1e9, peak_tflops=1e-3, baseline_tokens_per_sec=100.0, clock=clock)
    assert meter.row() == {}
    for _ in range(4):
        clock.now += 2.0
        meter.add(num_tokens=300, num_samples=8, num_slots=400)
    with meter.paused():
        clock.now += 50.0
    found = meter.row()
    assert found == pytest.approx(
        {
            "throughput/tokens_per_sec": 150.0,
            "throughput/tokens_per_sec_per_device": 75.0,
            "throughput/samples_per_sec": 4.0,
            "time/step_s": 2.0,
            "throughput/padding_pct": 25.0,
            "throughput/tflops_per_device": 0.075,
            "throughput/mfu_pct": 7500.0,
            "throughput/scaling_efficiency_pct": 75.0,
        }
    )
    assert all(key in METRIC_KEYS for key in found)
    clock.now += 1.0
    meter.add(num_tokens=50, num_samples=1, num_slots=50)
    assert meter.row()["throughput/tokens_per_sec"] == 50.0
    plain = Throughput(1, clock=clock)
    clock.now += 1.0
    plain.add(10, 1, 10)
    assert not {"throughput/mfu_pct", "throughput/tflops_per_device"} & set(plain.row()), "absent, never 0"


def test_memory_is_in_gib() -> None:
    """Bytes or MB under a name that says GiB."""
    held = mx.zeros(2**26) + 1
    mx.eval(held)
    found = memory_row()
    assert 0.25 <= found["memory/active_gib"] < 4
    assert found["memory/peak_gib"] >= found["memory/active_gib"]


def test_error_gives_the_terminal_back() -> None:
    """A shell without a cursor after a run that failed."""
    console = Console(file=io.StringIO(), width=160, force_terminal=True, color_system=None)
    metrics = Metrics([TerminalSink(100, console=console)])
    metrics.abandon()
    assert console.file.getvalue().rstrip().endswith("\x1b[?25h")


def test_best_values_of_a_file_that_was_edited() -> None:
    """Catches a run that cannot be continued, as a number of an earlier start is a word now."""
    history = [row(1, eval__loss=2.0), {"train/global_step": 2, "eval/loss": "x", "eval/exact_match": [1]}]
    assert Metrics([], history).best == {"best/eval_loss": 2.0}
