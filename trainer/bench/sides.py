"""The two sides of `python -m trainer bench`: this package's own loop, and mlx-lm's trainer on the same things."""

import contextlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.tuner import trainer as mlx_lm_trainer
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.utils import linear_to_lora_layers

import comm
from trainer.bench.baseline import baseline_facts
from trainer.bench.figures import SIDES, Measurement
from trainer.build import build
from trainer.data import TokenizedRows, corpus, load_splits
from trainer.machine.limits import GIB
from trainer.model.loading import materialize, open_model, open_tokenizer
from trainer.model.lora import find_targets
from trainer.recipe.config import Recipe
from trainer.training.loop import Due, Hooks
from trainer.training.progress import Progress, StopRules

NEVER = 10**9


def measure_trainer(recipe: Recipe, warmup: int, steps: int) -> Measurement | None:
    """Time `steps` steps of the training loop after `warmup` ones; the figures on rank 0, None elsewhere."""
    world = comm.init(recipe.parallel.backend if isinstance(recipe.parallel.backend, str) else "any")
    run = build(recipe, world, lambda line: print(line, file=sys.stderr))
    mx.reset_peak_memory()
    records: list[dict[str, float]] = []
    due, hooks = Due(log=1, evaluate=0, checkpoint=0), Hooks(log=records.append)
    loop = run.loop(due, hooks, lambda step: recipe.optimizer.lr, StopRules(), total_steps=warmup + steps)
    loop.run(Progress())
    timed = records[warmup:]
    if world.rank:
        return None
    mean = lambda name: float(np.mean([record[name] for record in timed]))  # noqa: E731
    seconds = sum(record["time/step_s"] for record in timed)
    return Measurement(
        side=SIDES[0],
        tokens_per_sec=sum(record["throughput/tokens_per_sec"] * record["time/step_s"] for record in timed) / seconds,
        step_s=seconds / len(timed),
        padding_pct=mean("throughput/padding_pct"),
        peak_gib=max(record["memory/peak_gib"] for record in timed),
        loss=mean("train/loss"),
        data_s=mean("time/data_s"),
        compute_s=mean("time/compute_s"),
        optimizer_s=mean("time/optimizer_s"),
        mfu_pct=mean("throughput/mfu_pct") if "throughput/mfu_pct" in timed[0] else None,
        facts=baseline_facts(run) if world.size == 1 else None,
    )


def measure_mlx_lm(recipe: Recipe, warmup: int, steps: int) -> Measurement:
    """Time mlx-lm's own training loop on the recipe's model, rows, batch size and adapters; one process."""
    tokenizer = open_tokenizer(recipe.model, partial(corpus, recipe.data, recipe.seed))
    rows = load_splits(recipe.data, tokenizer, recipe.seed, notice=lambda line: None).train
    model = open_model(recipe.model, len(tokenizer), recipe.seed).model
    _make_trainable(recipe, model)
    materialize(model)
    mx.random.seed(recipe.seed)
    batches = _CountedBatches()
    reports: list[dict[str, Any]] = []
    arguments = mlx_lm_trainer.TrainingArgs(
        batch_size=recipe.batch_size_per_device,
        iters=warmup + steps,
        steps_per_report=1,
        steps_per_eval=NEVER,
        steps_per_save=NEVER,
        max_seq_length=recipe.data.max_seq_len,
        adapter_file=str(Path(recipe.output_dir) / "adapters.safetensors"),
        grad_checkpoint=bool(recipe.gradient_checkpointing),
        grad_accumulation_steps=recipe.grad_accumulation_steps or 1,
    )
    mx.reset_peak_memory()
    with contextlib.redirect_stdout(sys.stderr):
        mlx_lm_trainer.train(
            model,
            optim.AdamW(recipe.optimizer.lr),
            [_as_mlx_lm_row(rows, index) for index in range(len(rows))],
            args=arguments,
            iterate_batches=batches,
            training_callback=_Reports(reports),
        )
    timed, counts = reports[warmup:], batches.counts[warmup : warmup + steps]
    seconds = sum(1 / report["iterations_per_second"] for report in timed)
    tokens, slots = (sum(column) for column in zip(*counts))
    return Measurement(
        side=SIDES[1],
        tokens_per_sec=tokens / seconds,
        step_s=seconds / len(timed),
        padding_pct=100 * (1 - tokens / slots),
        peak_gib=max(report["peak_memory"] for report in timed) * 1e9 / GIB,
        loss=float(np.mean([report["train_loss"] for report in timed])),
    )


def _make_trainable(recipe: Recipe, model: nn.Module) -> None:
    """Adapters on the modules that the recipe means, put there by mlx-lm."""
    if recipe.method == "full":
        model.unfreeze()
        return
    model.freeze()
    paths = find_targets(model, recipe.lora.targets, recipe.lora.num_layers, recipe.method)
    keys = sorted({path.partition("layers.")[2].partition(".")[2] for path in paths} - {""})
    num_layers = len(model.layers) if recipe.lora.num_layers == "all" else int(recipe.lora.num_layers)
    scale = recipe.lora.alpha / recipe.lora.rank
    config = {"rank": recipe.lora.rank, "scale": scale, "dropout": recipe.lora.dropout, "keys": keys}
    linear_to_lora_layers(model, num_layers, config, use_dora=recipe.method == "dora")


def _as_mlx_lm_row(rows: TokenizedRows, index: int) -> tuple[list[int], int]:
    """(tokens, position of the first target; 0 when all tokens are targets)."""
    targets = np.flatnonzero(rows.mask(index))
    return rows.tokens(index).tolist(), int(targets[0]) if len(targets) and targets[0] > 1 else 0


class _CountedBatches:
    """mlx-lm's own batches; notes (real tokens, slots) of each that is handed out."""

    def __init__(self) -> None:
        self.counts: list[tuple[int, int]] = []
        self._original = mlx_lm_trainer.iterate_batches

    def __call__(self, **options: Any) -> Iterator[tuple[mx.array, mx.array]]:
        for batch, lengths in self._original(**options):
            self.counts.append((int(lengths[:, 1].sum().item()), batch.size))
            yield batch, lengths


class _Reports(TrainingCallback):
    def __init__(self, reports: list[dict[str, Any]]) -> None:
        self.reports = reports

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """One optimizer step's figures."""
        self.reports.append(train_info)
