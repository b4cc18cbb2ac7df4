"""Runs the trainer's command inside the test process: a process per run would take seconds each to start."""

import json
import signal
from pathlib import Path

from trainer.__main__ import main


def train_with_recipe(text: str, folder: Path) -> list[dict]:
    """Train as `python -m trainer RECIPE` does.

    Args:
        text: the recipe; its `output_dir` is `folder/output`.
        folder: gets the recipe and the output.

    Returns:
        The rows of metrics.jsonl that hold a training loss, in order.
    """
    (folder / "recipe.yaml").write_text(text)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = main([str(folder / "recipe.yaml")])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert code == 0, f"the trainer left with exit code {code}"
    rows = map(json.loads, (folder / "output" / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "train/loss" in row]
