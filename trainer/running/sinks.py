"""Where the rows of a run go: metrics.jsonl, the terminal, W&B, and the baseline of one device."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from trainer.bench.baseline import BaselineSink, baseline_facts
from trainer.build import Run
from trainer.files.storage import atomic_file, write_json
from trainer.machine.facts import MACHINE_FILE, machine_facts
from trainer.metrics.rows import JsonlSink, Metrics
from trainer.metrics.terminal import TerminalSink
from trainer.metrics.wandb_sink import WandbSink, wandb_mode
from trainer.recipe.config import Recipe
from trainer.recipe.load import to_yaml
from trainer.recipe.paths import found_from_anywhere
from trainer.training.requests import Stop


def open_metrics(run: Run, output_dir: Path | None, step: int, stop: Stop) -> Metrics:
    """Rank 0's sinks; none on other ranks. Also keeps the resolved recipe and the machine's facts beside them."""
    if output_dir is None:
        return Metrics([])
    recipe, world = run.recipe, run.world
    output_dir.mkdir(parents=True, exist_ok=True)
    with atomic_file(output_dir / "recipe.yaml") as file:
        file.write_text(to_yaml(found_from_anywhere(recipe)))
    with atomic_file(output_dir / MACHINE_FILE) as file:
        write_json(file, machine_facts(world.size, world.backend, asdict(run.opened.sizes)))
    terminal = TerminalSink(run.total_steps, step, on_closed=stop.reader_gone)
    rows = JsonlSink(output_dir / "metrics.jsonl", step or None, notice=terminal.message)
    wandb = _open_wandb(recipe, output_dir, step, terminal.message)
    baseline = BaselineSink(output_dir, baseline_facts(run)) if world.size == 1 else None
    return Metrics([rows, terminal, *filter(None, (wandb, baseline))], rows.kept, run.opened.objective.metrics)


def _open_wandb(recipe: Recipe, output_dir: Path, step: int, notice: Callable[[str], None]) -> WandbSink | None:
    """The W&B sink where the recipe asks for one. One that cannot start does not keep the run from starting."""
    wandb = recipe.logging.wandb
    mode = wandb_mode(wandb.mode)
    if wandb.project is None or mode == "disabled":
        return None
    try:
        return WandbSink(
            output_dir,
            wandb.project,
            name=wandb.name or output_dir.name,
            mode=mode,
            config=asdict(recipe),
            resumed=step > 0,
            notice=notice,
        )
    except OSError as error:
        notice(f"W&B is off: {error.strerror}: {error.filename}. metrics.jsonl has every row.")
        return None
