"""One fine-tuning run, from the recipe to the files that it leaves: for the command line and for research code."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

import comm
from parallel import Span
from trainer.agreement import require_same, together
from trainer.bench.baseline import baseline_facts, read_baseline
from trainer.build import Run, build
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.lock import sole_run
from trainer.checkpoint.state import differences, find_checkpoint, keep_global_batch, restore, save_checkpoint
from trainer.machine.blas import blas_hint
from trainer.machine.limits import apply_limits, clear_large_cache
from trainer.metrics.rows import Metrics, read_rows
from trainer.metrics.table import STEP_KEY
from trainer.metrics.throughput import memory_of_ranks
from trainer.metrics.tracing import Profiler
from trainer.objectives.objective import Objective
from trainer.recipe.config import Recipe
from trainer.recipe.load import load_recipe
from trainer.recipe.paths import require_writable
from trainer.recipe.rules import resolve_mesh, validation_warnings, warnings
from trainer.results.final import discard, finish, is_written, result_path
from trainer.running.sinks import open_metrics
from trainer.running.words import given_up, introduce, of_step, without_gain
from trainer.training.loop import Due, Hooks, Loop
from trainer.training.optim import learning_rate
from trainer.training.progress import Progress, StopRules
from trainer.training.requests import CheckpointTrigger, Stop


@dataclass(frozen=True)
class Callbacks:
    """What research code hears of a run; every rank calls its own.

    Attributes:
        on_step: `on_step(step, row)` after every update; `row` has the metrics where a row is due (`logging.every`),
            else it is empty.
        on_eval: `on_eval(step, metrics)` after every validation.
        on_checkpoint: `on_checkpoint(step, path)` after every checkpoint; `path` is its folder, None on ranks without a
            disk.
    """

    on_step: Callable[[int, dict[str, float]], None] = lambda step, row: None
    on_eval: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    on_checkpoint: Callable[[int, Path | None], None] = lambda step, path: None


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    Attributes:
        output_dir: The run's folder.
        path: The adapters' file, or the folder of the whole model.
        step: Updates that are done.
        signal: Number of the signal that stopped it, 0 where it ended by itself; the same call goes on from there.
        is_given_up: The loss stayed above `limits.loss_watchdog`.
        metrics: The last value of every metric, the best ones (`best/eval_loss`, ...), and peaks of memory.
    """

    output_dir: Path
    path: Path
    step: int
    signal: int = 0
    is_given_up: bool = False
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def code(self) -> int:
        """The exit code of the command line: 0 done, 128 + signal when one ended the run, 1 when it was given up."""
        return 128 + self.signal if self.signal else int(self.is_given_up)


def train(
    recipe: Recipe | dict[str, Any] | str | Path,
    overrides: Sequence[str] = (),
    *,
    on_step: Callable[[int, dict[str, float]], None] = Callbacks.on_step,
    on_eval: Callable[[int, dict[str, float]], None] = Callbacks.on_eval,
    on_checkpoint: Callable[[int, Path | None], None] = Callbacks.on_checkpoint,
    objective: Objective | None = None,
) -> RunResult:
    """Run a recipe, or go on with it where an earlier run stopped: what `python -m trainer run` does.

    Under a launcher every rank calls it alike. Ctrl-C and SIGTERM finish the step, save, and return.

    Args:
        recipe: A YAML file, its settings as a dictionary, or a `Recipe`.
        overrides: Settings such as `optimizer.lr=2e-4` that replace the recipe's.
        on_step, on_eval, on_checkpoint: See `Callbacks`.
        objective: What is minimised, one of your own. Default: the recipe's `objective`.

    Returns:
        Where the result lies, and its metrics.

    Raises:
        ValueError: The recipe, its files or its data cannot be used; the text says what is allowed. On all ranks.
        OSError: A file could not be written.

    Example:
        >>> from trainer import train
        >>> result = train("recipes/quickstart.yaml", ["max_steps=20"], on_step=lambda step, row: print(step, row))
        >>> result.path, result.metrics["eval/loss"]
    """
    world = comm.init()
    checked = together(world, partial(load_recipe, recipe, overrides))
    if isinstance(checked.parallel.backend, str):
        world = comm.init(checked.parallel.backend)
    hint = blas_hint() if mx.default_device() == mx.cpu else None
    apply_limits(checked.limits)
    notices = [*warnings(checked), *([hint] if hint else [])]
    with Stop().installed() as stop:
        return run_recipe(checked, world, stop, notices, Callbacks(on_step, on_eval, on_checkpoint), objective)


def run_recipe(
    recipe: Recipe,
    world: comm.Group,
    stop: Stop,
    notices: list[str],
    callbacks: Callbacks = Callbacks(),
    objective: Objective | None = None,
) -> RunResult:
    """Build, resume, train, write the result.

    Args:
        recipe: a checked recipe.
        world: all ranks.
        stop: remembers signals.
        notices: lines to show when the run is introduced.
        callbacks: what hears of it.
        objective: What is minimised. Default: the recipe's.
    """
    output_dir = Path(recipe.output_dir) if world.rank == 0 else None
    together(world, lambda: output_dir and require_writable(recipe.output_dir))
    with sole_run(world, output_dir):
        return _run(recipe, world, output_dir, stop, notices, callbacks, objective)


def _run(
    recipe: Recipe,
    world: comm.Group,
    output_dir: Path | None,
    stop: Stop,
    notices: list[str],
    callbacks: Callbacks,
    objective: Objective | None,
) -> RunResult:
    folder = CheckpointFolder(output_dir and output_dir / "checkpoints", recipe.checkpoint.keep_last)
    # A rank may take long over these; none is given up as hanging meanwhile.
    with world.progress.long_phase("loading"):
        found = find_checkpoint(recipe, folder, world, notices.append)
        recipe, batch_dp = keep_global_batch(recipe, found, resolve_mesh(recipe.parallel, world.size).dp)
        run = build(recipe, world, notices.append, batch_dp, objective=objective)
        require_same(world, run.digests())
        progress = restore(run, folder, found, notices.append)
    rules = StopRules(recipe.eval.patience, recipe.limits.loss_watchdog)
    if progress.step >= run.total_steps or rules.is_patience_used_up(progress):
        return _already_finished(run, folder, progress, differences(found, recipe))
    together(world, lambda: discard(output_dir))
    metrics = together(world, lambda: open_metrics(run, output_dir, progress.step, stop))
    unread = validation_warnings(recipe) if run.opened.splits.valid is None else []
    introduce(run, progress, [*notices, *unread], metrics)
    trigger = CheckpointTrigger(output_dir, metrics.message)
    profiler = Profiler(recipe.profile, output_dir, world, metrics.message)
    loop = make_loop(run, make_hooks(run, folder, metrics, stop, trigger, profiler, callbacks), rules)
    try:
        if progress.step == 0:
            loop.hooks.evaluate(0)
        number = loop.run(progress)
        profiler.finish()
        return _end(run, folder, metrics, progress, number, rules)
    except BaseException:
        metrics.abandon()
        raise


def make_hooks(
    run: Run,
    folder: CheckpointFolder,
    metrics: Metrics,
    stop: Stop,
    trigger: CheckpointTrigger,
    profiler: Profiler,
    callbacks: Callbacks,
) -> Hooks:
    """What the loop of a run calls."""
    limits, every = run.recipe.limits, run.recipe.logging.every

    def after_step(step: int, spans: list[Span]) -> None:
        metrics.advance(step)
        profiler.after_step(step, spans)
        if step % every and step != run.total_steps:
            callbacks.on_step(step, {})

    def log(row: dict[str, float]) -> None:
        metrics.log(row)
        callbacks.on_step(int(row[STEP_KEY]), row)

    def save(progress: Progress) -> None:
        with run.world.progress.long_phase("saving"):
            path = save_checkpoint(run, folder, progress)
        trigger.done()
        callbacks.on_checkpoint(progress.step, path)
        clear_large_cache(limits)

    return Hooks(
        log=log,
        evaluate=_evaluation(run, metrics, callbacks),
        save=save,
        before_step=profiler.before_step,
        after_step=after_step,
        stop_signal=stop.requested,
        checkpoint_wanted=trigger.is_there,
    )


def make_loop(run: Run, hooks: Hooks, rules: StopRules) -> Loop:
    """The training loop of a built run."""
    recipe = run.recipe
    due = Due(recipe.logging.every, recipe.eval.every, recipe.checkpoint.every)
    rate = partial(learning_rate, total_steps=run.total_steps, lr=recipe.optimizer.lr, schedule=recipe.schedule)
    return run.loop(due, hooks, rate, rules, baseline_tokens_per_sec=_baseline(run))


def _baseline(run: Run) -> float | None:
    """Tokens per second of one device, for rank 0's rows of a run on several."""
    if run.world.rank != 0 or run.world.size == 1:
        return None
    return read_baseline(Path(run.recipe.output_dir), baseline_facts(run))


def _end(
    run: Run, folder: CheckpointFolder, metrics: Metrics, progress: Progress, number: int, rules: StopRules
) -> RunResult:
    """Write the result of a run that has come to its end, and say how it ended."""
    again = "the same command goes on from there"
    left = RunResult(Path(run.recipe.output_dir), result_path(run), progress.step, number)
    if rules.is_given_up(progress):
        metrics.abandon()
        if run.world.rank == 0:
            print(f"error: {given_up(run, progress)}", file=sys.stderr)
        return replace(left, signal=0, is_given_up=True)
    if number:
        metrics.message(f"Stopped by signal {number} after step {progress.step}; {again}.")
        return replace(left, metrics=metrics.close())
    with run.world.progress.long_phase("saving"):
        weights_step = finish(run, folder, progress, metrics.message)
    if progress.step < run.total_steps:
        metrics.message(f"Stopped early after step {progress.step}: {without_gain(run)}.")
    metrics.message(f"Done: {result_path(run)}{of_step(run, progress, weights_step)}")
    peaks = memory_of_ranks(run.world)
    if peaks:
        metrics.message(f"Peak memory of the ranks: {', '.join(f'{peak:.3g}' for peak in peaks.values())} GiB")
    best = {"best/step": progress.best_step} if run.recipe.eval.patience else {}
    return replace(left, metrics=metrics.close(peaks | best))


def _already_finished(
    run: Run, folder: CheckpointFolder, progress: Progress, differences: list[str]
) -> RunResult:
    """Nothing is left to train. A run killed between its last checkpoint and its result still owes the result."""
    if not is_written(run, progress):
        finish(run, folder, progress, print)
    output_dir = Path(run.recipe.output_dir)
    if run.world.rank == 0:
        how = f"{progress.step} steps"
        if progress.step < run.total_steps:
            how += f", {without_gain(run)}"
        if differences:
            how += f"; {'; '.join(differences)}"
        print(
            f"{output_dir} is finished ({how}). Use another output_dir or more epochs, or begin anew with "
            "checkpoint.resume=none."
        )
    metrics = {key: value for row in read_rows(output_dir / "metrics.jsonl") for key, value in row.items()}
    return RunResult(output_dir, result_path(run), progress.step, metrics=metrics)


def _evaluation(run: Run, metrics: Metrics, callbacks: Callbacks) -> Callable[[int], dict[str, float]]:
    if run.opened.splits.valid is None:
        return lambda step: {}
    evaluator = run.evaluator(run.opened.splits.valid)

    def evaluate(step: int) -> dict[str, float]:
        with run.world.progress.long_phase("evaluation"):
            measured, answers = evaluator.run()
        metrics.log({STEP_KEY: step} | measured)
        if answers:
            metrics.samples(step, [answer.as_sample() for answer in answers])
        clear_large_cache(run.recipe.limits)
        callbacks.on_eval(step, measured)
        return measured

    return evaluate
