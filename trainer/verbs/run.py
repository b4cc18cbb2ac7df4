"""`python -m trainer run`: one fine-tuning run, from the recipe to the files that it leaves."""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

import comm
from parallel import Span, model_layout, parallel_state
from trainer.agreement import require_same, together
from trainer.bench.baseline import BaselineSink, baseline_facts, read_baseline
from trainer.build import Parts, build
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.lock import sole_run
from trainer.checkpoint.state import differences, find_checkpoint, keep_global_batch, restore, save_checkpoint
from trainer.files.storage import atomic_file, write_json
from trainer.machine.blas import blas_hint
from trainer.machine.facts import MACHINE_FILE, machine_facts
from trainer.machine.limits import apply_limits, clear_large_cache
from trainer.metrics.rows import JsonlSink, Metrics
from trainer.metrics.terminal import TerminalSink
from trainer.metrics.throughput import Throughput, memory_of_ranks
from trainer.metrics.tracing import Profiler
from trainer.metrics.wandb_sink import WandbSink, wandb_mode
from trainer.model.flops import peak_tflops
from trainer.recipe.config import Recipe
from trainer.recipe.load import load_recipe, to_yaml
from trainer.recipe.paths import found_from_anywhere, require_writable
from trainer.recipe.rules import resolve_mesh, validation_warnings, warnings
from trainer.results.final import discard, finish, is_written, result_path
from trainer.training.loop import Due, Hooks, Loop
from trainer.training.optim import learning_rate
from trainer.training.progress import WATCHDOG_ROWS, Progress, StopRules
from trainer.training.requests import CheckpointTrigger, Stop


def main(arguments: argparse.Namespace) -> int:
    """Run a recipe; returns the exit code: 0 done, 128 + signal when a signal ended it."""
    world = comm.init()
    recipe = together(world, partial(load_recipe, arguments.recipe, arguments.overrides))
    if isinstance(recipe.parallel.backend, str):
        world = comm.init(recipe.parallel.backend)
    hint = blas_hint() if mx.default_device() == mx.cpu else None
    apply_limits(recipe.limits)
    return train(recipe, world, Stop().install(), [*warnings(recipe), *([hint] if hint else [])])


def train(recipe: Recipe, world: comm.Group, stop: Stop, notices: list[str]) -> int:
    """Build, resume, train, write the result.

    Args:
        recipe: a checked recipe.
        world: all ranks.
        stop: remembers signals.
        notices: lines to show when the run is introduced.

    Returns:
        The exit code.
    """
    output_dir = Path(recipe.output_dir) if world.rank == 0 else None
    together(world, lambda: output_dir and require_writable(recipe.output_dir))
    with sole_run(world, output_dir):
        return _train(recipe, world, output_dir, stop, notices)


def _train(recipe: Recipe, world: comm.Group, output_dir: Path | None, stop: Stop, notices: list[str]) -> int:
    folder = CheckpointFolder(output_dir and output_dir / "checkpoints", recipe.checkpoint.keep_last)
    found = find_checkpoint(recipe, folder, world, notices.append)
    recipe, batch_dp = keep_global_batch(recipe, found, resolve_mesh(recipe.parallel, world.size).dp)
    # A rank may take long over these; none is given up as hanging meanwhile.
    with world.progress.long_phase("loading"):
        parts = build(recipe, world, notices.append, batch_dp)
        require_same(world, parts.digests())
        progress = restore(parts, folder, found, notices.append)
    rules = StopRules(recipe.eval.patience, recipe.limits.loss_watchdog)
    if progress.step >= parts.total_steps or rules.is_patience_used_up(progress):
        return _already_finished(parts, folder, progress, differences(found, recipe))
    together(world, lambda: discard(output_dir))
    metrics = together(world, lambda: _open_metrics(parts, output_dir, progress.step, stop))
    unread = validation_warnings(recipe) if parts.splits.valid is None else []
    introduce(parts, progress, [*notices, *unread], metrics)
    trigger = CheckpointTrigger(output_dir, metrics.message)
    profiler = Profiler(recipe.profile, output_dir, world, metrics.message)
    loop = make_loop(parts, make_hooks(parts, folder, metrics, stop, trigger, profiler), rules)
    try:
        if progress.step == 0:
            loop.hooks.evaluate(0)
        number = loop.run(progress)
        profiler.finish()
        return _end(parts, folder, metrics, progress, number, rules)
    except BaseException:
        metrics.abandon()
        raise


def make_hooks(
    parts: Parts,
    folder: CheckpointFolder,
    metrics: Metrics,
    stop: Stop,
    trigger: CheckpointTrigger,
    profiler: Profiler,
) -> Hooks:
    """What the loop of a run calls."""
    limits = parts.recipe.limits

    def after_step(step: int, spans: list[Span]) -> None:
        metrics.advance(step)
        profiler.after_step(step, spans)

    def save(progress: Progress) -> None:
        with parts.world.progress.long_phase("saving"):
            save_checkpoint(parts, folder, progress)
        trigger.done()
        clear_large_cache(limits)

    return Hooks(
        log=metrics.log,
        evaluate=_evaluation(parts, metrics),
        save=save,
        before_step=profiler.before_step,
        after_step=after_step,
        stop_signal=stop.requested,
        checkpoint_wanted=trigger.is_there,
    )


def make_loop(parts: Parts, hooks: Hooks, rules: StopRules) -> Loop:
    """The training loop of a built run."""
    recipe = parts.recipe
    return Loop(
        model=parts.model,
        step_fn=parts.step_fn,
        optimizer=parts.optimizer,
        batches=parts.batches,
        total_steps=parts.total_steps,
        rate=lambda step: learning_rate(step, parts.total_steps, recipe.optimizer.lr, recipe.schedule),
        max_grad_norm=recipe.max_grad_norm,
        world=parts.world,
        due=Due(recipe.logging.every, recipe.eval.every, recipe.checkpoint.every),
        hooks=hooks,
        throughput=Throughput(
            parts.world.size,
            flops_per_token=parts.flops_per_token,
            peak_tflops=peak_tflops(),
            baseline_tokens_per_sec=_baseline(parts),
        ),
        rules=rules,
    )


def _baseline(parts: Parts) -> float | None:
    """Tokens per second of one device, for rank 0's rows of a run on several."""
    if parts.world.rank != 0 or parts.world.size == 1:
        return None
    return read_baseline(Path(parts.recipe.output_dir), baseline_facts(parts))


def _end(
    parts: Parts, folder: CheckpointFolder, metrics: Metrics, progress: Progress, number: int, rules: StopRules
) -> int:
    """Write the result of a run that has come to its end, say how it ended, and return the exit code."""
    again = "the same command goes on from there"
    if rules.is_given_up(progress):
        metrics.abandon()
        if parts.world.rank == 0:
            print(f"error: {_given_up(parts, progress)}", file=sys.stderr)
        return 1
    if number:
        metrics.message(f"Stopped by signal {number} after step {progress.step}; {again}.")
        metrics.close()
        return 128 + number
    with parts.world.progress.long_phase("saving"):
        weights_step = finish(parts, folder, progress, metrics.message)
    if progress.step < parts.total_steps:
        metrics.message(f"Stopped early after step {progress.step}: {_without_gain(parts)}.")
    metrics.message(f"Done: {result_path(parts)}{_of_step(parts, progress, weights_step)}")
    peaks = memory_of_ranks(parts.world)
    if peaks:
        metrics.message(f"Peak memory of the ranks: {', '.join(f'{peak:.3g}' for peak in peaks.values())} GiB")
    metrics.close(peaks | ({"best/step": progress.best_step} if parts.recipe.eval.patience else {}))
    return 0


def _already_finished(parts: Parts, folder: CheckpointFolder, progress: Progress, differences: list[str]) -> int:
    """Nothing is left to train. A run killed between its last checkpoint and its result still owes the result."""
    if not is_written(parts, progress):
        finish(parts, folder, progress, print)
    if parts.world.rank == 0:
        how = f"{progress.step} steps"
        if progress.step < parts.total_steps:
            how += f", {_without_gain(parts)}"
        if differences:
            how += f"; {'; '.join(differences)}"
        print(
            f"{parts.recipe.output_dir} is finished ({how}). Use another output_dir or more epochs, or begin anew with "
            "checkpoint.resume=none."
        )
    return 0


def _given_up(parts: Parts, progress: Progress) -> str:
    name = f"{parts.recipe.output_dir}/checkpoints/step-{progress.step:07d}"
    return (
        f"the training loss stayed above limits.loss_watchdog = {parts.recipe.limits.loss_watchdog:g}, or was not "
        f"finite, for {WATCHDOG_ROWS} rows of metrics: given up after step {progress.step}. {name} and all earlier "
        "checkpoints are kept; checkpoint.resume=PATH goes on from one of them, such as with a lower optimizer.lr."
    )


def _without_gain(parts: Parts) -> str:
    return f"no better validation loss in eval.patience = {parts.recipe.eval.patience} validations"


def _of_step(parts: Parts, progress: Progress, weights_step: int) -> str:
    """Which step's weights the result has, where that is a question."""
    if parts.recipe.eval.patience is None or progress.best_loss is None:
        return ""
    which = f"best validation loss, {progress.best_loss:.4f}" if weights_step == progress.best_step else "the last"
    return f", the weights of step {weights_step} ({which})"


def _evaluation(parts: Parts, metrics: Metrics) -> Callable[[int], dict[str, float]]:
    if parts.splits.valid is None:
        return lambda step: {}
    evaluator = parts.evaluator(parts.splits.valid)

    def evaluate(step: int) -> dict[str, float]:
        with parts.world.progress.long_phase("evaluation"):
            measured, answers = evaluator.run()
        metrics.log({"train/global_step": step} | measured)
        if answers:
            metrics.samples(step, [answer.as_sample() for answer in answers])
        clear_large_cache(parts.recipe.limits)
        return measured

    return evaluate


def _open_metrics(parts: Parts, output_dir: Path | None, step: int, stop: Stop) -> Metrics:
    """Rank 0's sinks; none on other ranks. Also keeps the resolved recipe and the machine's facts beside them."""
    if output_dir is None:
        return Metrics([])
    recipe, world = parts.recipe, parts.world
    output_dir.mkdir(parents=True, exist_ok=True)
    with atomic_file(output_dir / "recipe.yaml") as file:
        file.write_text(to_yaml(found_from_anywhere(recipe)))
    with atomic_file(output_dir / MACHINE_FILE) as file:
        write_json(file, machine_facts(world.size, world.backend, asdict(parts.sizes)))
    terminal = TerminalSink(parts.total_steps, step, on_closed=stop.reader_gone)
    rows = JsonlSink(output_dir / "metrics.jsonl", step or None, notice=terminal.message)
    wandb = _open_wandb(recipe, output_dir, step, terminal.message)
    baseline = BaselineSink(output_dir, baseline_facts(parts)) if world.size == 1 else None
    return Metrics([rows, terminal, *filter(None, (wandb, baseline))], rows.kept)


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


def introduce(parts: Parts, progress: Progress, notices: list[str], metrics: Metrics) -> None:
    """Say what the run will do: sizes, counts, and every notice of the build."""
    recipe, batch = parts.recipe, parts.batch
    trainable = _num_elements(parts, parts.model.trainable_parameters())
    total = _num_elements(parts, parts.model.parameters())
    for notice in notices:
        metrics.message(notice)
    metrics.message(
        f"global batch {batch.global_size} = {batch.per_device} rows x {batch.dp} data-parallel ranks"
        f" x {batch.accumulation} micro-batches; {parts.total_steps} steps,"
        f" {parts.batches.steps_per_epoch} per epoch of {len(parts.splits.train)} rows"
    )
    metrics.message(f"{recipe.method}: {trainable:,} of {total:,} parameters are trainable")
    if progress.step:
        metrics.message(f"resumed after step {progress.step}")


def _num_elements(parts: Parts, tree: Any) -> int:
    """Elements of the whole model's tensors, whatever this rank holds of them. Every rank calls it.

    A quantized weight counts its elements, not the words that they are packed in, nor their scales.
    """
    layout, repeated = model_layout(parts.model), parallel_state(parts.model).repeated
    per_word = {
        f"{path}.{name}": 32 / module.bits if name == "weight" else 0
        for path, module in parts.model.named_modules()
        if "scales" in module
        for name in ("weight", "scales", "biases")
    }
    shapes = {n: layout[n].full_shape(p.shape) if n in layout else p.shape for n, p in tree_flatten(tree)}
    own = sum(round(math.prod(shape) * per_word.get(n, 1)) for n, shape in shapes.items() if n not in repeated)
    return int(parts.mesh.pp.all_sum(mx.array(own, dtype=mx.int64)).item())
