"""W&B fed from its own process: what an offline run holds, and what a dead or hung W&B costs."""

import json
import struct
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.metrics import wandb_worker
from trainer.metrics.records import read_records
from trainer.metrics.wandb_sink import WandbSink, wandb_mode
from training import train_with_recipe

CONFIG = {"method": "lora", "optimizer": {"lr": 1e-5}}
BLOCK_BYTES = 32768


def records_of(path: Path) -> Iterator[bytes]:
    """The records of W&B's transaction log: LevelDB's log format behind a 7-byte header."""
    data, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if BLOCK_BYTES - position % BLOCK_BYTES < 7:
            position += BLOCK_BYTES - position % BLOCK_BYTES
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, last
            yield whole
            whole = b""


def sink_of(folder: Path, notices: list[str], **changes: object) -> WandbSink:
    options = {"name": "try", "mode": "offline", "config": CONFIG, "resumed": False, "notice": notices.append}
    return WandbSink(folder, "project", **(options | changes))


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """One real offline run, read back from its files."""
    from wandb.proto.wandb_internal_pb2 import Record

    folder = tmp_path_factory.mktemp("run")
    notices: list[str] = []
    start = time.monotonic()
    sink = sink_of(folder, notices)
    for step, loss in ((10, 2.0), (20, 1.0), (30, 1.5)):
        sink.log({"train/global_step": step, "train/loss": loss, "eval/loss": loss})
    sink.samples(30, [{"prompt": "p", "expected": None, "generated": "g"}])
    logged_s = time.monotonic() - start
    sink.close({"best/eval_loss": 1.0, "eval/loss": 1.5})
    found = {"notices": notices, "logged_s": logged_s, "folder": folder, "history": []}
    found |= {"config": {}, "metrics": {}, "summary": {}}
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    for data in records_of(file):
        record = Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["id"] = record.run.run_id
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            items = record.history.item
            found["history"].append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
        elif kind == "metric":
            metric = record.metric
            found["metrics"][metric.name or metric.glob_name] = (metric.step_metric, metric.summary.min)
        elif kind == "summary":
            items = record.summary.update
            found["summary"] |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


def test_offline_run_holds_every_row(offline_run: dict) -> None:
    """Rows that W&B renames, drops or puts on its own step axis."""
    rows = [row for row in offline_run["history"] if "train/loss" in row]
    assert [(row["train/global_step"], row["train/loss"]) for row in rows] == [(10, 2.0), (20, 1.0), (30, 1.5)]
    assert any(key.startswith("eval/samples") for row in offline_run["history"] for key in row)
    assert offline_run["metrics"]["*"][0] == "train/global_step"
    assert offline_run["metrics"]["eval/loss"] == ("train/global_step", True)


def test_offline_run_holds_recipe_and_summary(offline_run: dict) -> None:
    """A run in the dashboard that does not tell what was run, or how it ended."""
    assert offline_run["config"]["method"] == "lora"
    assert offline_run["config"]["optimizer"] == {"lr": 1e-5}
    assert offline_run["summary"]["best/eval_loss"] == 1.0
    assert offline_run["summary"]["eval/loss"] == {"last": 1.5, "min": 1.0}
    assert offline_run["exit"] == 0
    assert len(offline_run["notices"]) == 1
    assert "wandb sync" in offline_run["notices"][0]


def test_starting_and_logging_do_not_wait(offline_run: dict) -> None:
    """Training that stands still while W&B imports and connects."""
    assert offline_run["logged_s"] < 0.5


def test_id_is_kept_for_a_resumed_run(offline_run: dict, tmp_path: Path) -> None:
    """A restart that opens a second W&B run, or a new run that goes on in an old one's charts."""
    folder = offline_run["folder"] / "wandb"
    assert wandb_worker._run_id(folder, resumed=True) == offline_run["id"]
    assert wandb_worker._run_id(tmp_path, resumed=True) == wandb_worker._run_id(tmp_path, resumed=True)
    assert wandb_worker._run_id(tmp_path, resumed=True) != wandb_worker._run_id(tmp_path, resumed=False)


class FakeRun:
    dir, url = "out/wandb/offline-run-1/files", "https://example.org/run"

    def __init__(self, calls: list) -> None:
        self.calls = calls
        self.summary: dict = {}

    def define_metric(self, name: str, **options: object) -> None:
        self.calls.append(("define", name))

    def log(self, row: dict) -> None:
        self.calls.append(("log", row))

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))


def run_worker(monkeypatch: pytest.MonkeyPatch, folder: Path, lines: list[dict], fails: tuple[str, ...]) -> tuple:
    """The worker's exit code and calls with a wandb whose ``init`` fails in some modes."""
    calls: list = []

    def init(**options: object) -> FakeRun:
        calls.append(("init", options["mode"]))
        if options["mode"] in fails:
            raise RuntimeError("no network\nmore")
        return FakeRun(calls)

    fake = types.SimpleNamespace(init=init, Settings=dict, teardown=lambda exit_code: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    begin = {"project": "p", "name": None, "mode": "online", "config": {}, "resumed": False, "step_key": "step"}
    begin |= {"output_dir": str(folder), "summaries": {"eval/loss": "min,last"}}
    code = wandb_worker.main(json.dumps(line) for line in [{"begin": begin}, *lines])
    return code, calls


def test_no_network_becomes_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Rows lost because the machine had no network or login at the start."""
    code, calls = run_worker(monkeypatch, tmp_path, [{"row": {"a": 1}}, {"end": {}}], fails=("online",))
    assert code == 0
    assert [mode for name, mode in calls if name == "init"] == ["online", "offline"]
    assert ("log", {"a": 1}) in calls
    assert ("finish", 0) in calls
    text = capsys.readouterr().out
    assert "could not start online (RuntimeError: no network)" in text
    assert "wandb sync" in text


def test_wandb_that_cannot_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """An endless loop or a traceback when W&B works in no mode."""
    assert run_worker(monkeypatch, tmp_path, [{"end": {}}], fails=("online", "offline"))[0] == 1


def test_killed_trainer_is_a_failed_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A run that shows as finished, or runs for ever, in the dashboard after the trainer was killed."""
    assert run_worker(monkeypatch, tmp_path, [{"row": {"a": 1}}], fails=())[1][-1] == ("finish", 1)


def test_dead_wandb_is_one_notice(tmp_path: Path) -> None:
    """A broken pipe that ends the run, or a notice for each row."""
    notices: list[str] = []
    sink = sink_of(tmp_path, notices, worker=(sys.executable, "-c", "raise SystemExit(3)"))
    for step in range(2000):
        sink.log({"train/global_step": step})
    sink.close({})
    assert len(notices) == 1
    assert "exit code 3" in notices[0]


def test_hung_wandb_costs_a_bounded_time(tmp_path: Path) -> None:
    """A W&B that never reads: logging that blocks when the pipe is full, a close that waits for ever."""
    notices: list[str] = []
    sleeper = (sys.executable, "-c", "import time; time.sleep(600)")
    sink = sink_of(tmp_path, notices, worker=sleeper, close_seconds=0.5)
    start = time.monotonic()
    for step in range(20_000):
        sink.log({"train/global_step": step, "train/loss": 1.0})
    assert time.monotonic() - start < 5
    sink.close({})
    assert time.monotonic() - start < 8
    assert len(notices) == 1
    assert "did not finish within 0.5 s" in notices[0]
    assert sink._worker.poll() is not None


def test_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """WANDB_MODE that is ignored, or a typing error in it that switches W&B on."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert wandb_mode("online") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode("online") == "offline"
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(ValueError, match="'ofline'"):
        wandb_mode("online")


RECIPE = """
model: {{path: {model}}}
data: {{train: {rows}, max_seq_len: 32, val_fraction: 0.2}}
batch_size_per_device: 2
max_steps: {steps}
eval: {{every: 1}}
logging: {{every: 1, wandb: {{project: project, mode: offline}}}}
output_dir: {output}
"""


def test_resumed_run_goes_on_under_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exhaustive: None
) -> None:
    """A restart that opens a second W&B run; a run without its recipe, its last or its best values."""
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.delenv("WANDB_MODE", raising=False)
    rows, output = tmp_path / "rows.jsonl", tmp_path / "output"
    rows.write_text("".join(json.dumps({"text": f"row {n} of ten"}) + "\n" for n in range(10)))
    model = Path(__file__).parents[2] / "reference" / "data" / "qwen3"
    for steps in (2, 3):
        train_with_recipe(RECIPE.format(model=model, rows=rows, output=output, steps=steps), tmp_path)
    ids, history, config, summary = set(), [], {}, {}
    for file in sorted(output.glob("wandb/offline-run-*/*.wandb")):
        for record in map(Record.FromString, records_of(file)):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            for item in record.history.item:
                if item.nested_key == ["train/global_step"] or item.key == "train/global_step":
                    history.append(json.loads(item.value_json))
            items = record.summary.update
            summary |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
    assert len(ids) == 1
    assert sorted(set(history)) == [0, 1, 2, 3]
    assert config["optimizer"]["lr"] == 1e-5 and config["max_steps"] == 3
    losses = [row["eval/loss"] for row in read_records(output / "metrics.jsonl") if "eval/loss" in row]
    assert summary["best/eval_loss"] == min(losses)
    assert summary["eval/loss"]["last"] == losses[-1]
