"""What a run says of itself: its sizes at the start, and how it ended."""

import math
from typing import Any

import mlx.core as mx

import comm
from parallel import model_layout, parallel_state
from trainer.build import Run
from trainer.metrics.records import Metrics
from trainer.training.progress import WATCHDOG_ROWS, Progress


def introduce(run: Run, progress: Progress, notices: list[str], metrics: Metrics) -> None:
    """Say what the run will do: sizes, counts, and every notice of the build."""
    recipe, batch = run.recipe, run.opened.batch
    trainable = num_elements(run, run.model.trainable_parameters())
    total = num_elements(run, run.model.parameters())
    for notice in notices:
        metrics.message(notice)
    metrics.message(
        f"global batch {batch.global_size} = {batch.per_device} rows x {batch.dp} data-parallel ranks"
        f" x {batch.accumulation} micro-batches; {run.total_steps} steps,"
        f" {run.batches.steps_per_epoch} per epoch of {len(run.opened.splits.train)} rows"
    )
    metrics.message(f"{recipe.method}: {trainable:,} of {total:,} parameters are trainable")
    if progress.step:
        metrics.message(f"resumed after step {progress.step}")


def given_up(run: Run, progress: Progress) -> str:
    name = f"{run.recipe.output_dir}/checkpoints/step-{progress.step:07d}"
    return (
        f"the training loss stayed above limits.loss_watchdog = {run.recipe.limits.loss_watchdog:g}, or was not "
        f"finite, for {WATCHDOG_ROWS} rows of metrics: given up after step {progress.step}. {name} and all earlier "
        "checkpoints are kept; checkpoint.resume=PATH goes on from one of them, such as with a lower optimizer.lr."
    )


def without_gain(run: Run) -> str:
    return f"no better validation loss in eval.patience = {run.recipe.eval.patience} validations"


def of_step(run: Run, progress: Progress, weights_step: int) -> str:
    """Which step's weights the result has, where that is a question."""
    if run.recipe.eval.patience is None or progress.best_loss is None:
        return ""
    which = f"best validation loss, {progress.best_loss:.4f}" if weights_step == progress.best_step else "the last"
    return f", the weights of step {weights_step} ({which})"


def num_elements(run: Run, tree: Any) -> int:
    """Elements of the whole model's tensors, whatever this rank holds of them. Every rank calls it.

    A quantized weight counts its elements, not the words that they are packed in, nor their scales.
    """
    layout, repeated = model_layout(run.model), parallel_state(run.model).repeated
    per_word = {
        f"{path}.{name}": 32 / module.bits if name == "weight" else 0
        for path, module in run.model.named_modules()
        if "scales" in module
        for name in ("weight", "scales", "biases")
    }
    shapes = {n: layout[n].full_shape(p.shape) if n in layout else p.shape for n, p in comm.named_arrays(tree)}
    own = sum(round(math.prod(shape) * per_word.get(n, 1)) for n, shape in shapes.items() if n not in repeated)
    return int(comm.number(run.mesh.pp.all_sum(mx.array(own, dtype=mx.int64))))
