"""`python -m trainer eval`: loss and perplexity of a run's result or of a checkpoint."""

import argparse
import sys

import comm
from trainer.build import build
from trainer.result import load_result, recipe_of


def main(arguments: argparse.Namespace) -> int:
    """Measure `arguments.target` on the rows of `arguments.split`; returns the exit code."""
    recipe = recipe_of(arguments.target, arguments.overrides)
    world = comm.init()
    parts = build(recipe, world, lambda line: print(line, file=sys.stderr))
    rows = parts.splits.train if arguments.split == "train" else parts.splits.valid
    if rows is None:
        raise ValueError(f"{arguments.target!r} was trained without validation rows; set data.valid=PATH.")
    load_result(parts, arguments.target, lambda line: print(line, file=sys.stderr))
    measured, _ = parts.evaluator(rows).run()
    if world.rank == 0:
        print(f"{arguments.target}, {arguments.split} split, {len(rows)} rows")
        for name, value in measured.items():
            print(f"  {name:<18} {value:.6f}")
    return 0
