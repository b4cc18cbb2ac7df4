"""Runs the trainer's command inside the test process: a process per run would take seconds each to start."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import comm
from trainer.__main__ import main
from trainer.recipe.config import Recipe
from trainer.running.run import run_recipe
from trainer.training.requests import Stop


@contextmanager
def kept_signals() -> Iterator[None]:
    """A run takes over Ctrl-C; afterwards the tests' own handlers are back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(recipe: Recipe, world: comm.Group, stop: Stop, notices: list[str]) -> int:
    """Run a recipe; the exit code that the command line would have."""
    return run_recipe(recipe, world, stop, notices).code


def train_with_recipe(text: str, folder: Path) -> list[dict]:
    """Train as `python -m trainer RECIPE` does.

    Args:
        text: the recipe; its `output_dir` is `folder/output`.
        folder: gets the recipe and the output.

    Returns:
        The rows of metrics.jsonl that hold a training loss, in order.
    """
    (folder / "recipe.yaml").write_text(text)
    with kept_signals():
        code = main([str(folder / "recipe.yaml")])
    assert code == 0, f"the trainer left with exit code {code}"
    rows = map(json.loads, (folder / "output" / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "train/loss" in row]
