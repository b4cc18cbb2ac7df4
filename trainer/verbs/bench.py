"""`python -m trainer bench`: how fast a recipe trains here, and `--vs mlx-lm` how fast mlx-lm does the same.

Each side runs in a process of its own, one after the other, so that neither's memory nor caches count for the
other. Both get the recipe's weights, rows, batch size and adapters, the same BLAS and the same environment. Of the
recipe's output only `baseline.json` is written, with which a run on several devices shows its scaling efficiency.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trainer.bench.figures import SIDES, Measurement, table
from trainer.recipe.config import Recipe
from trainer.recipe.load import load_recipe

MARK = "BENCH "
WRONG_INPUT = 2


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
        _require_one_process()
        found = [_best(side, arguments) for side in (SIDES[0], arguments.vs)]
    if found and found[0].facts is not None and not arguments.synthetic:
        _record(Path(recipe.output_dir), found[0])
    if found:
        print(json.dumps([asdict(m) for m in found], indent=2) if arguments.json else table(found), flush=True)
    return 0


def _require_one_process() -> None:
    import comm

    size = comm.init().size
    if size > 1:
        raise ValueError(f"--vs compares single processes, but {size} ranks were started; run it without a launcher.")


def _record(output_dir: Path, measured: Measurement) -> None:
    from trainer.bench.baseline import write_baseline

    try:
        path = write_baseline(output_dir, measured.facts or {}, measured.tokens_per_sec, "bench")
        print(f"{path}: one device's tokens/s, for the scaling efficiency of several", file=sys.stderr)
    except OSError as error:
        print(f"{output_dir}: the baseline could not be written: {error.strerror}", file=sys.stderr)


def _best(side: str, arguments: argparse.Namespace) -> Measurement:
    """The fastest of `--rounds` processes of one side."""
    words = [sys.executable, "-m", "trainer", "bench", arguments.recipe, *arguments.overrides, "--side", side]
    words += ["--steps", str(arguments.steps), "--warmup", str(arguments.warmup)]
    words += ["--synthetic"] * arguments.synthetic
    found = []
    for _ in range(arguments.rounds):
        print(f"{side} ...", file=sys.stderr, flush=True)
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode == WRONG_INPUT:
            raise ValueError(done.stderr.partition("error: ")[2].strip())
        lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
        if done.returncode or not lines:
            raise RuntimeError(f"the {side} side failed with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
        found.append(Measurement(**json.loads(lines[-1].removeprefix(MARK))))
    return max(found, key=lambda m: m.tokens_per_sec)


def _measure(side: str, recipe: Recipe, arguments: argparse.Namespace) -> Measurement | None:
    """This process's measurement; None on ranks other than 0."""
    from trainer.bench import sides as bench_sides

    measure = bench_sides.measure_trainer if side == SIDES[0] else bench_sides.measure_mlx_lm
    with tempfile.TemporaryDirectory() as scratch:
        recipe = replace(recipe, output_dir=scratch)
        if arguments.synthetic:
            recipe = _with_synthetic_rows(recipe, Path(scratch), arguments.warmup + arguments.steps)
        return measure(recipe, arguments.warmup, arguments.steps)


def _with_synthetic_rows(recipe: Recipe, folder: Path, num_steps: int) -> Recipe:
    """The recipe with rows of random words, each at least `data.max_seq_len` tokens, enough for all steps on 8
    ranks.
    """
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
