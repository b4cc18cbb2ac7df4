"""A metric that is added in the one table shows up wherever metrics are shown."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from trainer.__main__ import main
from trainer.metrics import records, table, terminal, wandb_sink
from trainer.results import card
from trainer.verbs import dashboard, report

NEW = table.Metric(
    "train/new_number", "Loss", "New panel", "New chart", better=max, words="new {:.1f}",
    figure=table.Figure("new figure", max, max), in_card=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table with one more row."""
    for module in (records, terminal, wandb_sink, card, dashboard, report):
        monkeypatch.setattr(module, "METRICS", (*table.METRICS, NEW))
    monkeypatch.setattr(records, "METRIC_KEYS", table.METRIC_KEYS | {NEW.key})


def test_a_new_metric_is_shown_everywhere(tmp_path: Path) -> None:
    """Catches a second list of metrics somewhere."""
    console = Console(file=io.StringIO(), width=200)
    metrics = records.Metrics([records.JsonlSink(tmp_path / "metrics.jsonl"), terminal.TerminalSink(3, console=console)])
    for step in (1, 2):
        metrics.log({table.STEP_KEY: step, "train/loss": 1.0, NEW.key: 7.5 - step})
    assert metrics.close()["best/new_number"] == 6.5
    assert "new 6.5" in console.file.getvalue()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])[NEW.key] == 6.5
    assert card.last_values(tmp_path / "metrics.jsonl")[NEW.key] == 5.5
    assert dashboard.panels_of("Loss")["New panel"] == ([NEW.key], False)
    assert wandb_sink.summaries()[NEW.key] == "max,last"
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "New chart" in page and "new figure" in page
