"""`python -m trainer eval`: loss and perplexity of a run's result or of a checkpoint."""

import argparse

import comm
from trainer.agreement import end_on_interrupt
from trainer.build import build
from trainer.recipe.problems import AgreedUserError
from trainer.results.opened import load_result, notice_on_stderr, shared_recipe


def main(arguments: argparse.Namespace) -> int:
    """Measure `arguments.target` on the rows of `arguments.split`; returns the exit code."""
    world = comm.init()
    end_on_interrupt(world)
    recipe = shared_recipe(world, arguments.target, arguments.overrides)
    run = build(recipe, world, notice_on_stderr(world))
    rows = run.opened.splits.train if arguments.split == "train" else run.opened.splits.valid
    if rows is None:
        raise AgreedUserError(f"{arguments.target!r} was trained without validation rows; set data.valid=PATH.")
    load_result(run, arguments.target, notice_on_stderr(run.world))
    measured, _ = run.evaluator(rows).run()
    if world.rank == 0:
        print(f"{arguments.target}, {arguments.split} split, {len(rows)} rows")
        for name, value in measured.items():
            print(f"  {name:<18} {value:.6f}")
    return 0
