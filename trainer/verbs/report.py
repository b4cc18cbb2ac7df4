"""`python -m trainer report RUN [RUN ...]`: what runs did, in one HTML file that opens without network.

Reads only what a run leaves in its output folder: metrics.jsonl, samples.jsonl, recipe.yaml, machine.json. Several runs
share every chart, and what differs between them is listed.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from omegaconf import OmegaConf

from trainer.files.storage import read_json
from trainer.metrics.records import read_records
from trainer.metrics.table import METRICS, STEP_KEY, Metric
from trainer.recipe.load import flattened
from trainer.reports.charts import (
    PALETTE,
    Point,
    Series,
    line_chart,
    number,
    smooth,
    stacked_bars,
)
from trainer.reports.page import chart_card, folded, page, section, table

PER_DEVICE = "throughput/tokens_per_sec_per_device"
STEP_PARTS = (
    ("data", "time/data_s"),
    ("compute", "time/compute_s"),
    ("communication", "comm/allreduce_s"),
    ("optimizer", "time/optimizer_s"),
)
MAX_SAMPLES = 12
# Training loss is shown smoothed over a sixtieth of the run to each side.
POINTS_PER_RADIUS = 60


@dataclass
class RunFiles:
    """What is known of one run: records in order of step, held-out generations, recipe text, machine facts."""

    name: str
    color: str
    records: list[dict]
    samples: list[dict]
    recipe: str
    machine: dict[str, object]

    def points(self, key: str) -> list[Point]:
        """(step, value) of every record that has the key."""
        return [(record[STEP_KEY], record[key]) for record in self.records if key in record]

    def values(self, key: str) -> list[float]:
        """The measured values of a key."""
        return [value for _, value in self.points(key) if value is not None]


def main(arguments: argparse.Namespace) -> int:
    """Write the report; returns 0."""
    target = Path(arguments.out)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(report([Path(run) for run in arguments.runs]), encoding="utf-8")
    print(f"Wrote {target} ({target.stat().st_size / 1024:.0f} KiB); open it in a browser.")
    return 0


def report(folders: Sequence[Path]) -> str:
    """The HTML document for some runs' output folders.

    Raises:
        ValueError: A folder holds no metrics.
    """
    names = _short_names(folders)
    runs = [read_run(folder, name, PALETTE[i % len(PALETTE)]) for i, (folder, name) in enumerate(zip(folders, names))]
    charts = [_loss_chart(runs), *(_chart(runs, metric) for metric in _charted()), _step_split(runs)]
    sections = [
        section("Figures", _figures(runs)),
        section("Differences", _differences(runs)),
        section("Curves", f'<div class="grid-of-charts">{"".join(charts)}</div>'),
        section("Held-out generations", _generations(runs)),
        section("Recipe", "".join(folded(run.name, run.recipe) for run in runs if run.recipe)),
        section("Machine", _machines(runs)),
    ]
    title = names[0] if len(runs) == 1 else f"{len(runs)} runs"
    subtitle = "Training report of mlx-trainer" + ("" if len(runs) == 1 else ": " + ", ".join(names))
    return page(title, subtitle, sections)


def read_run(folder: Path, name: str, color: str) -> RunFiles:
    """Read one output folder.

    Raises:
        ValueError: It holds no metrics.
    """
    records = [
        {key: value for key, value in record.items() if value is None or isinstance(value, (int, float))}
        for record in read_records(folder / "metrics.jsonl")
    ]
    if not records:
        raise ValueError(f"{str(folder)!r} holds no metrics.jsonl with rows; give the output_dir of a run.")
    recipe, machine = folder / "recipe.yaml", folder / "machine.json"
    return RunFiles(
        name=name,
        color=color,
        records=records,
        samples=[record for record in read_records(folder / "samples.jsonl") if _has_answers(record)],
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        machine=read_json(machine) if machine.is_file() else {},
    )


def _has_answers(record: dict) -> bool:
    """Whether a record of samples.jsonl is as it was written: a file may have been edited."""
    samples = record.get("samples")
    return isinstance(samples, list) and all(
        isinstance(sample, dict)
        and all(isinstance(sample.get(key), str) for key in ("prompt", "generated"))
        and isinstance(sample.get("expected", 0), (str, type(None)))
        for sample in samples
    )


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Last parts of the paths, as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(len(part) for part in parts) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return names


def _loss_chart(runs: Sequence[RunFiles]) -> str:
    series, legend = [], []
    for run in runs:
        points = run.points("train/loss")
        if run.values("train/loss"):
            radius = len(points) // POINTS_PER_RADIUS
            name = f"{run.name} train" + (f" (mean of {2 * radius + 1} rows)" if radius else "")
            series += [Series(run.name, run.color, points, faint=True)] if radius else []
            series += [Series(name, run.color, smooth(points, radius))]
            legend.append((name, run.color, "line"))
        if run.values("eval/loss"):
            series.append(Series(f"{run.name} eval", run.color, run.points("eval/loss"), dashed=True, dots=True))
            legend.append((f"{run.name} eval", run.color, "dashed"))
    return chart_card("Loss", legend, line_chart(series, steps=_steps(runs))) if series else ""


def _charted() -> list[Metric]:
    """Metrics with a chart; those of the optimizer come last."""
    return sorted((metric for metric in METRICS if metric.chart), key=lambda metric: metric.key.startswith("train/"))


def _chart(runs: Sequence[RunFiles], metric: Metric) -> str:
    key = metric.key
    having = [run for run in runs if run.values(key)]
    if key == PER_DEVICE and all(run.values(key) == run.values("throughput/tokens_per_sec") for run in having):
        return ""
    if not having or (key == "train/skipped_steps" and not any(max(run.values(key)) for run in having)):
        return ""
    series = [Series(run.name, run.color, run.points(key), dots=key.startswith("eval/")) for run in having]
    values = [value for run in having for value in run.values(key)]
    log = metric.log_scale and min(values) > 0 and max(values) / min(values) > 30
    legend = [(run.name, run.color, "line") for run in having]
    chart = line_chart(series, from_zero=not metric.log_scale, log=log, steps=_steps(runs))
    return chart_card(metric.chart, legend, chart)


def _steps(runs: Sequence[RunFiles]) -> tuple[float, float]:
    """First and last step of all runs."""
    steps = [record[STEP_KEY] for run in runs for record in run.records]
    return min(steps), max(steps)


def _step_split(runs: Sequence[RunFiles]) -> str:
    bars = []
    for run in runs:
        pieces = [
            (part, sum(values) / len(values), PALETTE[index])
            for index, (part, key) in enumerate(STEP_PARTS)
            if (values := run.values(key))
        ]
        if pieces:
            bars.append((run.name, pieces))
    if not bars:
        return ""
    legend = {part: (part, color, "block") for _, pieces in bars for part, _, color in pieces}
    return chart_card("Where a sampled step's time goes (mean)", list(legend.values()), stacked_bars(bars, "s"))


def _figures(runs: Sequence[RunFiles]) -> str:
    rows = []
    for figure, key in [(metric.figure, metric.key) for metric in METRICS if metric.figure]:
        picked = [figure.of(run.values(key)) if run.values(key) else None for run in runs]
        known = [value for value in picked if value is not None]
        if not known:
            continue
        best = figure.better(known) if figure.better and len(runs) > 1 else None
        cells = [
            f'<td class="n{" best" if value is not None and value == best else ""}">'
            f"{'–' if value is None else number(value)}</td>"
            for value in picked
        ]
        rows.append([escape(figure.title), *cells])
    return table(["", *(run.name for run in runs)], rows)


def _differences(runs: Sequence[RunFiles]) -> str:
    """Settings and machine facts that are not the same in all runs."""
    if len(runs) < 2:
        return ""
    known = [flattened(OmegaConf.to_container(OmegaConf.create(run.recipe))) for run in runs]
    known = [settings | flattened(run.machine, "machine.") for settings, run in zip(known, runs)]
    keys = sorted({key for settings in known for key in settings})
    rows = []
    for key in keys:
        values = [settings.get(key, "–") for settings in known]
        if len({json.dumps(value, default=str) for value in values}) > 1:
            rows.append([f"<code>{escape(key)}</code>", *(f'<td class="n">{escape(str(value))}</td>' for value in values)])
    if not rows:
        return '<p class="sub">The recipes and machines are the same.</p>'
    return table(["setting", *(run.name for run in runs)], rows)


def _generations(runs: Sequence[RunFiles]) -> str:
    """The last generations of every run, joined by prompt."""
    having = [run for run in runs if run.samples]
    if not having:
        return ""
    last = {run.name: {sample["prompt"]: sample for sample in run.samples[-1]["samples"]} for run in having}
    prompts = list(dict.fromkeys(prompt for samples in last.values() for prompt in samples))[:MAX_SAMPLES]
    # Runs may have been asked the same for different answers, so each shows its own.
    expecting = {name for name, samples in last.items() if any(s["expected"] is not None for s in samples.values())}
    rows = []
    for prompt in prompts:
        cells = [f"<pre>{escape(prompt)}</pre>"]
        for run in having:
            sample = last[run.name].get(prompt)
            if run.name in expecting:
                cells.append(f"<pre>{escape((sample and sample['expected']) or '')}</pre>")
            cells.append(_answer(sample))
        rows.append(cells)
    head = ["prompt"]
    for run in having:
        head += [f"{run.name}, expected"] * (run.name in expecting) + [f"{run.name}, step {run.samples[-1][STEP_KEY]}"]
    return table(head, rows)


def _answer(sample: dict | None) -> str:
    if sample is None:
        return "<td>–</td>"
    look = ""
    if sample["expected"] is not None:
        look = "right" if sample["generated"].strip() == sample["expected"].strip() else "wrong"
    return f'<td class="{look}"><pre>{escape(sample["generated"].strip())}</pre></td>'


def _machines(runs: Sequence[RunFiles]) -> str:
    known = [flattened(run.machine) for run in runs]
    keys = list(dict.fromkeys(key for facts in known for key in facts))
    rows = [[escape(key), *(escape(str(facts.get(key, "–"))) for facts in known)] for key in keys]
    return table(["", *(run.name for run in runs)], rows) if rows else ""
