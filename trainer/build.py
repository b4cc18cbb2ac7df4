"""From a recipe to a run. The only file that sees all the parts; the loop sees none of this.

LoRA, DoRA and full fine-tuning, checkpointed layers and the mesh differ here and nowhere else.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

import comm
from parallel import (
    DataParallel,
    FullyShardedDataParallel,
    PipelineParallel,
    RowThreads,
    TensorParallel,
    value_and_grad,
)
from parallel.tensor import check_plan, plan_for
from trainer.agreement import Notice, together
from trainer.data import TokenizedRows
from trainer.files.storage import digest_of
from trainer.layers.checkpointing import checkpoint_layers
from trainer.machine.facts import row_threads
from trainer.metrics.throughput import Throughput
from trainer.model.flops import peak_tflops, token_flops
from trainer.model.loading import materialize, pad_token
from trainer.model.lora import DropoutKeys, LoRASpec, limits_on_experts
from trainer.model.method import prepare_model
from trainer.objectives.objective import Objective
from trainer.opening import Opened, open_recipe
from trainer.recipe.config import ParallelConfig, Recipe
from trainer.recipe.rules import resolve_mesh
from trainer.training.batches import Share, TrainingBatches
from trainer.training.evaluation import Evaluator
from trainer.training.loop import Due, Hooks, Loop
from trainer.training.loss import StepLoss
from trainer.training.optim import Optimizer
from trainer.training.progress import StopRules


@dataclass(frozen=True)
class Run:
    """A run on one rank: what its recipe opened, divided over the mesh and ready to train.

    Attributes:
        opened: Tokenizer, rows and model; the model's adapters and wrappers are in place.
        world: All ranks.
        mesh: A group per axis, and the data-parallel ranks together.
        adapter: Modules and shape of the adapters, or None for full fine-tuning.
        loss: The loss function for `parallel.value_and_grad`.
        flops_per_token: Operations of one token, forward and backward, of the whole model.
        batch_dp: Data-parallel ranks for which the recipe as written gives this global batch.
        compile_step: Whether the local part of a step is compiled.
        row_threads: Threads for the local part of a step where it is not compiled; None on GPUs.
    """

    opened: Opened
    world: comm.Group
    mesh: comm.Mesh
    adapter: LoRASpec | None
    loss: StepLoss
    flops_per_token: float
    batch_dp: int
    compile_step: bool
    row_threads: RowThreads | None

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return self.opened.recipe

    @property
    def model(self) -> nn.Module:
        """The wrapped model."""
        return self.opened.base.model

    @property
    def total_steps(self) -> int:
        """Optimizer updates of the whole run."""
        return self.recipe.max_steps or self.recipe.epochs * self.batches.steps_per_epoch

    @cached_property
    def step_fn(self) -> Callable:
        """From micro-batches to loss and gradients, of all ranks."""
        options = {"compile_local": True} if self.compile_step else {"row_threads": self.row_threads}
        return value_and_grad(self.model, self.loss, **options)

    @cached_property
    def optimizer(self) -> Optimizer:
        """Holds moments and master weights."""
        return Optimizer(self.model.trainable_parameters(), self.recipe.optimizer)

    @cached_property
    def batches(self) -> TrainingBatches:
        """The steps' inputs on this rank."""
        opened, seed = self.opened, self.recipe.seed
        plan = partial(opened.plan, opened.splits.train, opened.batch.global_size, seed)
        return TrainingBatches(opened.splits.train, plan, self.share, seed, pad_token(opened.tokenizer))

    @property
    def share(self) -> Share:
        """This rank's part of a global batch."""
        batch = self.opened.batch
        return Share(self.data_group.rank, batch.dp, batch.per_device, batch.accumulation)

    @property
    def data_group(self) -> comm.Group:
        """The ranks that see different rows."""
        return self.mesh.dp

    @property
    def answer_group(self) -> comm.Group:
        """The ranks that answer different rows. Those that share weights gather them in step: they answer the same."""
        return self.mesh.dp_replicate

    def evaluator(self, rows: TokenizedRows) -> Evaluator:
        """Measures the model on `rows`."""
        share = replace(self.share, accumulation=1)
        return Evaluator(
            self.model,
            self.opened.tokenizer,
            self.loss,
            rows,
            self.recipe.eval,
            self.opened.plan(rows, share.global_batch_size, seed=0, epoch=0, shuffle=False),
            share,
            self.answer_group,
            pad_token(self.opened.tokenizer),
        )

    def loop(
        self,
        due: Due,
        hooks: Hooks,
        rate: Callable[[int], float],
        rules: StopRules,
        *,
        total_steps: int | None = None,
        baseline_tokens_per_sec: float | None = None,
    ) -> Loop:
        """The training loop of this run; for the arguments see `Loop` and `Throughput`."""
        throughput = Throughput(
            self.world.size,
            flops_per_token=self.flops_per_token,
            peak_tflops=peak_tflops(),
            baseline_tokens_per_sec=baseline_tokens_per_sec,
        )
        return Loop(
            model=self.model,
            step_fn=self.step_fn,
            optimizer=self.optimizer,
            batches=self.batches,
            total_steps=self.total_steps if total_steps is None else total_steps,
            rate=rate,
            max_grad_norm=self.recipe.max_grad_norm,
            world=self.world,
            due=due,
            hooks=hooks,
            throughput=throughput,
            rules=rules,
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued, by the recipe key that a user would change."""
        opened, data = self.opened, self.recipe.data
        return {
            "model": digest_of(opened.base.config),
            "method": self.recipe.method,
            "lora": digest_of(asdict(self.adapter)) if self.adapter else None,
            "data": opened.splits.train.digest,
            "data.order": [data.shuffle, data.group_by_length, data.max_seq_len, opened.packed],
            "seed": self.recipe.seed,
            "global_batch_size": opened.batch.global_size,
            "optimizer.name": self.recipe.optimizer.name,
            "objective.name": opened.objective.name,
        }

    def digests(self) -> dict[str, str]:
        """What must be equal on all ranks, for `agreement.require_same`."""
        opened = self.opened
        return {
            "recipe": digest_of(asdict(replace(self.recipe, output_dir=""))),
            "model config": digest_of(opened.base.config),
            "tokenizer": digest_of(sorted(opened.tokenizer.get_vocab().items())),
            "training data": opened.splits.train.digest,
            "validation data": opened.splits.valid.digest if opened.splits.valid else "none",
        }


def build(
    recipe: Recipe,
    world: comm.Group,
    notice: Notice,
    batch_dp: int | None = None,
    compile_step: bool | None = None,
    objective: Objective | None = None,
) -> Run:
    """Open a recipe and build its run. Every rank calls it alike.

    Args:
        recipe: A checked recipe.
        world: All ranks.
        notice: Gets one line for each thing that the user should know.
        batch_dp: See `Run`. Default: the data-parallel ranks there are.
        compile_step: See `Run`. Default: on a GPU, where `MLX_DISABLE_COMPILE=1` turns it off; on a CPU MLX would run
            a C++ compiler for every kernel.
        objective: What is minimised. Default: the recipe's.

    Raises:
        ValueError: Something in the recipe cannot be done; the text says what and what is allowed.
    """
    sizes = resolve_mesh(recipe.parallel, world.size)
    keys = DropoutKeys()
    opened, adapter, flops_per_token = together(world, partial(_open_and_prepare, recipe, sizes, keys, notice, objective))
    model = opened.base.model
    mesh = comm.Mesh.build(sizes, world, _backends(recipe.parallel))
    wrap(model, recipe.parallel, mesh)
    checkpoint_layers(model.layers, recipe.gradient_checkpointing)
    model.train()
    return Run(
        opened,
        world,
        mesh,
        adapter,
        StepLoss(opened.objective, keys, opened.packed),
        flops_per_token,
        batch_dp=batch_dp or sizes.dp,
        compile_step=mx.default_device() == mx.gpu if compile_step is None else compile_step,
        row_threads=row_threads(world),
    )


def _open_and_prepare(
    recipe: Recipe, sizes: comm.MeshShape, keys: DropoutKeys, notice: Notice, objective: Objective | None
) -> tuple[Opened, LoRASpec | None, float]:
    """All that a rank builds without the others: a model with its adapters, these, and operations per token."""
    opened = open_recipe(recipe, sizes, notice, objective=objective)
    model = opened.base.model
    adapter = prepare_model(recipe, opened.base, keys)
    for line in limits_on_experts(model, adapter) if adapter else ():
        notice(line)
    if sizes.tp > 1:
        check_plan(model, plan_for(model), sizes.tp)
    return opened, adapter, token_flops(model, recipe.data.max_seq_len).total


def wrap(model: nn.Module, parallel: ParallelConfig, mesh: comm.Mesh) -> None:
    """Put the wrappers of every axis that is on around `model`, and load what is this rank's of it.

    A pipeline cuts first, so that no rank reads another stage's layers; then each layer is divided.
    """
    if mesh.pp.size > 1:
        peers = (mesh.tp, mesh.dp)
        PipelineParallel(model, mesh.pp, schedule=parallel.schedule, split=parallel.split, peers=peers)
    if mesh.tp.size > 1:
        TensorParallel(model, mesh.tp)
    if mesh.dp_shard.size > 1:
        FullyShardedDataParallel(model, mesh.dp_shard, wire_dtype=_wire_dtype(parallel))
    together(mesh.world, partial(materialize, model))
    DataParallel(
        model, mesh.dp_replicate, wire_dtype=_wire_dtype(parallel), bucket_bytes=_bucket_bytes(parallel)
    )


def _backends(parallel: ParallelConfig) -> str | dict[str, str]:
    chosen = parallel.backend
    return chosen if isinstance(chosen, str) else {str(axis): backend for axis, backend in chosen.items()}


def _wire_dtype(parallel: ParallelConfig) -> mx.Dtype | None:
    return {"float32": mx.float32, "bfloat16": mx.bfloat16, None: None}[parallel.wire_dtype]


def _bucket_bytes(parallel: ParallelConfig) -> int | None:
    size = parallel.bucket_mib
    return None if size == "auto" else int(size * 2**20)
