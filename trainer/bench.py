"""`python -m trainer bench`: how fast a recipe trains here, and `--vs mlx-lm` how fast mlx-lm does the same.

Each side runs in a process of its own, one after the other, so that neither's memory nor caches count for the other. Both get the
recipe's weights, rows, batch size and adapters, the same BLAS and the same environment. Nothing of the recipe's output is written.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trainer.config import Recipe
from trainer.recipe import load_recipe

MARK = "BENCH "
SIDES = ("mlx-trainer", "mlx-lm")


@dataclass(frozen=True)
class Measurement:
    """One side's figures; those that a side cannot measure are None.

    Attributes:
        side: one of ``SIDES``.
        tokens_per_sec: real (non-padding) tokens a second over the timed steps, all ranks.
        step_s: seconds of a step; data_s, compute_s, optimizer_s are its parts.
        padding_pct: share of padding in the timed steps.
        peak_gib: peak memory after the model was loaded, the model included.
        mfu_pct: model FLOPs utilisation, on chips whose peak is known.
        loss: mean training loss of the timed steps.
    """

    side: str
    tokens_per_sec: float
    step_s: float
    padding_pct: float
    peak_gib: float
    loss: float
    data_s: float | None = None
    compute_s: float | None = None
    optimizer_s: float | None = None
    mfu_pct: float | None = None


def main(arguments: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.side is not None:
        measurement = _measure(arguments.side, recipe, arguments)
        if measurement is not None:
            print(MARK + json.dumps(asdict(measurement)), flush=True)
        return 0
    if arguments.vs is None:
        measurement = _measure(SIDES[0], recipe, arguments)
        found = [] if measurement is None else [measurement]
    else:
        sides = (SIDES[0], arguments.vs)
        found = [_best(side, arguments) for side in sides]
    if found:
        print(json.dumps([asdict(m) for m in found], indent=2) if arguments.json else table(found), flush=True)
    return 0


def table(found: list[Measurement]) -> str:
    """Measurements as lines of text, with the ratio of the first to the second where there are two."""
    rows: list[tuple[str, str, str]] = [
        ("tokens/s", "tokens_per_sec", ".0f"),
        ("s/step", "step_s", ".3f"),
        ("  data", "data_s", ".4f"),
        ("  forward and backward", "compute_s", ".3f"),
        ("  optimizer", "optimizer_s", ".3f"),
        ("padding %", "padding_pct", ".1f"),
        ("peak memory, GiB", "peak_gib", ".2f"),
        ("MFU %", "mfu_pct", ".1f"),
        ("loss", "loss", ".4f"),
    ]
    lines = [f"{'':24}" + "".join(f"{m.side:>14}" for m in found) + (f"{'ratio':>10}" if len(found) == 2 else "")]
    for label, name, style in rows:
        values = [getattr(m, name) for m in found]
        if all(value is None for value in values):
            continue
        cells = "".join(f"{'' if value is None else format(value, style):>14}" for value in values)
        with_ratio = len(values) == 2 and name in ("tokens_per_sec", "peak_gib") and values[1]
        lines.append(f"{label:24}{cells}" + (f"{values[0] / values[1]:>9.2f}x" if with_ratio else ""))
    return "\n".join(lines)


def _best(side: str, arguments: argparse.Namespace) -> Measurement:
    """The fastest of ``--rounds`` processes of one side."""
    words = [sys.executable, "-m", "trainer", "bench", arguments.recipe, *arguments.overrides, "--side", side]
    words += ["--steps", str(arguments.steps), "--warmup", str(arguments.warmup)] + ["--synthetic"] * arguments.synthetic
    found = []
    for _ in range(arguments.rounds):
        print(f"{side} ...", file=sys.stderr, flush=True)
        done = subprocess.run(words, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
        if done.returncode or not lines:
            raise RuntimeError(f"the {side} side failed with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
        found.append(Measurement(**json.loads(lines[-1].removeprefix(MARK))))
    return max(found, key=lambda m: m.tokens_per_sec)


def _measure(side: str, recipe: Recipe, arguments: argparse.Namespace) -> Measurement | None:
    """This process's measurement; None on ranks other than 0."""
    from trainer import bench_sides

    measure = bench_sides.measure_trainer if side == SIDES[0] else bench_sides.measure_mlx_lm
    with tempfile.TemporaryDirectory() as scratch:
        recipe = replace(recipe, output_dir=scratch)
        if arguments.synthetic:
            recipe = _with_synthetic_rows(recipe, Path(scratch), arguments.warmup + arguments.steps)
        return measure(recipe, arguments.warmup, arguments.steps)


def _with_synthetic_rows(recipe: Recipe, folder: Path, num_steps: int) -> Recipe:
    """The recipe with rows of random words, each at least ``data.max_seq_len`` tokens, enough for all steps on 8 ranks."""
    import random

    random.seed(0)
    # No tokenizer makes fewer tokens than words of such a line.
    words = [str(number) for number in range(10)]
    num_rows = 8 * num_steps * (recipe.batch_size_per_device or 1) * max(1, recipe.grad_accumulation_steps or 1)
    lines = [{"text": " ".join(random.choices(words, k=recipe.data.max_seq_len))} for _ in range(num_rows)]
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data: Any = replace(recipe.data, train=str(path), valid=None, val_fraction=0.0, format="text", loss_on="all")
    return replace(recipe, data=data)
