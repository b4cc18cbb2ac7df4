"""The HTML report of finished and broken-off runs."""

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.reports.charts import Series, line_chart, number, smooth, thin
from trainer.verbs.report import report

VOID = {"meta", "br", "line", "circle", "path", "rect"}


class Checker(HTMLParser):
    """Collects tags and text; fails on tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def parse(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    return checker


def make_run(folder: Path, lr: float, **extra: float) -> Path:
    folder.mkdir(parents=True)
    rows = []
    for step in range(0, 101, 10):
        row = {"train/global_step": step, "train/loss": None if step == 50 else 3.0 - step / 50, "train/grad_norm": 1.0}
        rows.append({**row, "throughput/tokens_per_sec": 100.0, **{key.replace("__", "/"): v for key, v in extra.items()}})
    rows.append({"train/global_step": 100, "eval/loss": 0.5, "eval/exact_match": 0.75})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {"prompt": "<script>alert(1)</script> & Q", "expected": "A", "generated": "B"}
    (folder / "samples.jsonl").write_text(json.dumps({"train/global_step": 100, "samples": [sample]}) + "\n")
    (folder / "recipe.yaml").write_text(f"method: lora\noptimizer: {{lr: {lr}, name: adamw}}\n")
    (folder / "machine.json").write_text(json.dumps({"device": "Apple M4", "mesh": {"tp": 1}}))
    return folder


def titles(text: str) -> list[str]:
    return re.findall(r"<h3>(.*?)</h3>", text)


def test_one_file_without_network(tmp_path: Path) -> None:
    """A report that is empty on a machine without network, or that runs what stands in a prompt."""
    out = tmp_path / "out" / "report.html"
    assert main(["report", str(make_run(tmp_path / "a", 1e-4)), "--out", str(out)]) == 0
    text = out.read_text()
    page = parse(text)
    assert not [tag for tag, attrs in page.tags if "src" in attrs or "href" in attrs or tag in ("link", "iframe")]
    assert "url(" not in text and "import" not in text and "http" not in text
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert "<script>alert(1)</script> & Q" in page.words


def test_each_run_has_its_own_expected_answer(tmp_path: Path) -> None:
    """The first run's expected answer beside all runs, where two runs were asked the same on different rows."""
    runs = [make_run(tmp_path / "a", 1e-4), make_run(tmp_path / "b", 1e-4)]
    samples = runs[1] / "samples.jsonl"
    samples.write_text(samples.read_text().replace('"expected": "A"', '"expected": "another"'))
    text = report(runs)
    assert "<pre>A</pre>" in text and "<pre>another</pre>" in text
    assert "a, expected" in text and "b, expected" in text


def test_shows_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    """A chart of a key that no run has, or a missing one."""
    text = report([make_run(tmp_path / "a", 1e-4, comm__exposed_pct=6.0, memory__peak_gib=2.0, train__skipped_steps=0)])
    shown = titles(text)
    assert "Loss" in shown
    assert "Tokens per second" in shown
    assert "Peak memory, GiB" in shown
    assert any(title.startswith("Communication not hidden") for title in shown)
    assert "Pipeline bubble, %" not in shown
    assert "Skipped steps" not in shown, "no step was skipped"
    assert "Differences" not in text
    assert "Apple M4" in text


def test_several_runs_share_charts_and_differences_are_listed(tmp_path: Path) -> None:
    """Runs of the same folder name that cannot be told apart, a difference that is not shown, an equal setting that is."""
    runs = [make_run(tmp_path / "x" / "run", 1e-4), make_run(tmp_path / "y" / "run", 3e-4, pp__bubble_pct=9.0)]
    late = runs[1] / "metrics.jsonl"
    late.write_text("".join(line for line in late.read_text().splitlines(True)[3:]))  # begins at step 30
    text = report(runs)
    assert "x/run" in text and "y/run" in text
    assert titles(text).count("Loss") == 1
    assert "Pipeline bubble, %" in titles(text)
    assert "<code>optimizer.lr</code>" in text
    assert "<code>optimizer.name</code>" not in text
    ends = {tuple(json.loads(unescape(chart))["frame"][:2]) for chart in re.findall(r'data-chart="([^"]*)"', text)}
    assert ends == {(0, 100)}, "a chart of one run must have the steps of all"
    assert "The recipes and machines are the same." in report([runs[0], runs[0]])


def test_broken_off_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A traceback for a run that was killed early, or for a folder that is no run."""
    folder = tmp_path / "early"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"train/global_step": 1, "train/loss": 2.0}\n{"train/glo')
    parse(report([folder]))
    (folder / "metrics.jsonl").write_text('{"train/global_step": 1, "train/loss": null}\n')
    parse(report([folder]))
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no metrics.jsonl with rows" in capsys.readouterr().err


def test_lines_break_where_values_are_missing() -> None:
    """A straight line drawn over a stretch that was not measured."""
    chart = line_chart([Series("a", "red", [(1, 2.0), (2, 3.0), (3, None), (4, 2.5), (5, 2.0)])])
    path = re.search(r'<path d="([^"]*)"', chart)
    assert path is not None
    assert [piece.count("L") for piece in path.group(1).split("M")[1:]] == [1, 1]


def test_thinning_keeps_spikes() -> None:
    """A spike of the loss that is lost because a long run is drawn with fewer points."""
    points = [(step, 1.0) for step in range(10_000)]
    points[5003] = (5003, 50.0)
    thinned = thin(points)
    assert len(thinned) <= 900
    assert (5003, 50.0) in thinned
    assert [x for x, _ in thinned] == sorted(x for x, _ in thinned)


def test_numbers_and_smoothing() -> None:
    """Numbers too long for a tick, a mean that counts missing values."""
    assert [number(value) for value in (0, 0.25, 1234.5, 4_915_200, 2.5e9, 1.25e-05)] == [
        *("0", "0.25", "1,234", "4.915 M", "2.5 G", "1.25e-05")
    ]
    assert smooth([(1, 1.0), (2, None), (3, 3.0), (4, 5.0)], 1) == [(1, 1.0), (2, None), (3, 4.0), (4, 4.0)]
