"""`python -m trainer run`: one fine-tuning run, from the recipe to the files that it leaves."""

import argparse
import math
import signal
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

import comm
from parallel.layout import gather_tensors, model_layout
from parallel.wrapper import parallel_state
from trainer import resume
from trainer.agreement import require_same, together
from trainer.blas import blas_hint
from trainer.build import Parts, build
from trainer.checkpoint import CheckpointFolder
from trainer.config import LimitsConfig, Recipe
from trainer.loading import source_folder
from trainer.flops import peak_tflops
from trainer.loop import Due, Hooks, Loop, Progress
from trainer.machine import MACHINE_FILE, machine_facts
from trainer.metrics import JsonlSink, Metrics
from trainer.optim import learning_rate
from trainer.output import adapter_config, write_adapters, write_model
from trainer.recipe import load_recipe, to_yaml
from trainer.rules import resolve_mesh, warnings
from trainer.storage import write_json
from trainer.terminal import TerminalSink
from trainer.throughput import Throughput
from trainer.wandb_sink import WandbSink, wandb_mode

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main(arguments: argparse.Namespace) -> int:
    """Run a recipe; returns the exit code: 0 done, 128 + signal when a signal ended it."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    world = comm.init(recipe.parallel.backend if isinstance(recipe.parallel.backend, str) else "any")
    hint = blas_hint() if mx.default_device() == mx.cpu else None
    apply_limits(recipe.limits)
    return train(recipe, world, Stop().install(), [*warnings(recipe), *([hint] if hint else [])])


def apply_limits(limits: LimitsConfig) -> None:
    """Set MLX's memory limits (GiB) where the recipe gives them; wired memory exists on Metal only."""
    if limits.memory_gib is not None:
        mx.set_memory_limit(int(limits.memory_gib * 2**30))
    if limits.cache_gib is not None:
        mx.set_cache_limit(int(limits.cache_gib * 2**30))
    if limits.wired_gib is not None and mx.metal.is_available():
        mx.set_wired_limit(int(limits.wired_gib * 2**30))


class Stop:
    """Remembers the signal that asked this process to stop; a second one ends it at once."""

    def __init__(self):
        self.number = 0

    def install(self) -> "Stop":
        """Take over Ctrl-C and SIGTERM."""
        for number in SIGNALS:
            signal.signal(number, self._receive)
        return self

    def requested(self) -> int:
        """The signal received so far, or 0."""
        return self.number

    def _receive(self, number: int, frame: Any) -> None:
        if self.number:
            comm.leave(128 + number)
        self.number = number


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
    folder = CheckpointFolder(output_dir and output_dir / "checkpoints", recipe.checkpoint.keep_last)
    found = resume.find(recipe, folder, world, notices.append)
    recipe, batch_dp = resume.keep_global_batch(recipe, found, resolve_mesh(recipe.parallel, world.size).dp)
    # A rank may take long over these; none is given up as hanging meanwhile.
    with world.progress.long_phase("loading"):
        parts = build(recipe, world, notices.append, batch_dp)
        require_same(world, parts.digests())
        progress = resume.restore(parts, found, notices.append)
    if progress.step >= parts.total_steps:
        # Killed between the last checkpoint and the result: the result is still owed.
        if not comm.broadcast_object(output_dir is not None and Path(_result_path(parts)).exists(), world):
            write_result(parts, output_dir)
        _say_finished(recipe, world, progress)
        return 0
    metrics = together(world, lambda: _open_metrics(parts, output_dir, progress.step))
    introduce(parts, progress, notices, metrics)
    loop = make_loop(parts, folder, metrics, stop)
    try:
        if progress.step == 0:
            loop.hooks.evaluate(0)
        number = loop.run(progress)
        if not number:
            with world.progress.long_phase("saving"):
                write_result(parts, output_dir)
    except BaseException:
        metrics.abandon()
        raise
    if number:
        metrics.message(f"Stopped by signal {number} after step {progress.step}; the same command goes on from there.")
    else:
        metrics.message(f"Done: {_result_path(parts)}")
    metrics.close()
    return 128 + number if number else 0


def make_loop(parts: Parts, folder: CheckpointFolder, metrics: Metrics, stop: Stop) -> Loop:
    """The training loop of a built run."""
    recipe = parts.recipe
    hooks = Hooks(
        log=metrics.log,
        advance=metrics.advance,
        evaluate=_evaluation(parts, metrics),
        save=partial(_save, parts, folder),
        stop_signal=stop.requested,
    )
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
            parts.world.size, flops_per_token=parts.flops_per_token, peak_tflops=peak_tflops()
        ),
        patience=recipe.eval.patience,
    )


def write_result(parts: Parts, output_dir: Path | None) -> None:
    """Write the final adapters, or the final model folder. Every rank calls it."""
    layout = model_layout(parts.model)
    if parts.adapter is not None:
        tensors = tree_flatten(parts.model.trainable_parameters())
        spec = parts.adapter
        config = adapter_config(
            [f"{path}.lora_a" for path in spec.paths],
            fine_tune_type=spec.method,
            rank=spec.rank,
            scale=spec.scale,
            dropout=spec.dropout,
        )
        write_adapters(output_dir, gather_tensors(layout, tensors, parts.mesh.pp), config)
    else:
        tensors = gather_tensors(layout, tree_flatten(parts.model.parameters()), parts.mesh.pp)
        folder = output_dir and output_dir / "model"
        write_model(folder, tensors, parts.base.config, parts.tokenizer, source=source_folder(parts.recipe.model))


def _save(parts: Parts, folder: CheckpointFolder, progress: Progress) -> None:
    with parts.world.progress.long_phase("saving"):
        resume.save(parts, folder, progress)


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
        return measured

    return evaluate


def _open_metrics(parts: Parts, output_dir: Path | None, step: int) -> Metrics:
    """Rank 0's sinks; none on other ranks. Also keeps the resolved recipe and the machine's facts beside them."""
    if output_dir is None:
        return Metrics([])
    recipe, world = parts.recipe, parts.world
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "recipe.yaml").write_text(to_yaml(recipe))
    write_json(output_dir / MACHINE_FILE, machine_facts(world.size, world.backend, asdict(parts.sizes)))
    rows = JsonlSink(output_dir / "metrics.jsonl", step or None)
    terminal = TerminalSink(parts.total_steps, step)
    sinks = [rows, terminal]
    wandb = recipe.logging.wandb
    if wandb.project is not None and wandb_mode(wandb.mode) != "disabled":
        sinks.append(
            WandbSink(
                output_dir,
                wandb.project,
                name=wandb.name,
                mode=wandb_mode(wandb.mode),
                config=asdict(recipe),
                resumed=step > 0,
                notice=terminal.message,
            )
        )
    return Metrics(sinks, rows.kept)


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
    """Elements of the whole model's tensors, whatever this rank holds of them. Every rank calls it."""
    layout, repeated = model_layout(parts.model), parallel_state(parts.model).repeated
    shapes = {n: layout[n].full_shape(p.shape) if n in layout else p.shape for n, p in tree_flatten(tree)}
    own = sum(math.prod(shape) for name, shape in shapes.items() if name not in repeated)
    return int(parts.mesh.pp.all_sum(mx.array(own, dtype=mx.int64)).item())


def _say_finished(recipe: Recipe, world: comm.Group, progress: Progress) -> None:
    if world.rank == 0:
        print(f"{recipe.output_dir} is finished ({progress.step} steps). Use another output_dir, or more epochs.")


def _result_path(parts: Parts) -> str:
    folder = parts.recipe.output_dir
    return f"{folder}/adapters.safetensors" if parts.adapter is not None else f"{folder}/model"
