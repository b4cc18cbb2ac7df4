"""From a recipe to everything a run needs. The only file that sees all the parts; the loop sees none of this.

LoRA, DoRA and full fine-tuning, packing, checkpointed layers and the mesh differ here and nowhere else.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

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
from trainer.data import (
    PlannedBatch,
    Splits,
    TokenizedRows,
    bucket_lengths,
    corpus,
    load_splits,
    plan_epoch,
    plan_packed,
)
from trainer.files.storage import digest_of
from trainer.layers.checkpointing import checkpoint_layers
from trainer.layers.segments import packing_supported
from trainer.machine.facts import row_threads
from trainer.model.flops import token_flops
from trainer.model.loading import (
    BaseModel,
    materialize,
    num_embeddings,
    open_model,
    open_tokenizer,
    pad_token,
)
from trainer.model.lora import DropoutKeys, LoRASpec, limits_on_experts
from trainer.model.method import prepare_model
from trainer.recipe.config import ModelConfig, ParallelConfig, Recipe
from trainer.recipe.paths import require_paths
from trainer.recipe.rules import BatchSizes, MeshSizes, resolve_batch, resolve_mesh
from trainer.training.batches import Share, TrainingBatches
from trainer.training.evaluation import Evaluator
from trainer.training.loss import TokenLoss
from trainer.training.optim import Optimizer


@dataclass
class Parts:
    """A run's parts, built on every rank alike.

    Attributes:
        recipe: the resolved recipe.
        world: all ranks.
        sizes, batch: sizes of the mesh's axes and of a global batch.
        tokenizer: mlx-lm's wrapper of the tokenizer.
        splits: tokenised training and validation rows.
        base: the model and its config; adapters and wrappers are in place.
        adapter: modules and shape of the adapters, or None for full fine-tuning.
        loss: the loss function for `parallel.value_and_grad`.
        flops_per_token: operations of one token, forward and backward, of the whole model.
        mesh: a group per axis, and the data-parallel ranks together.
        batch_dp: data-parallel ranks for which the recipe as written gives this global batch.
        compile_step: compile the local part of a step. Default: on a GPU, where `MLX_DISABLE_COMPILE=1` turns it off;
            on a CPU MLX would run a C++ compiler for every kernel.
        row_threads: for the local part of a step where it is not compiled; None on GPUs.
    """

    recipe: Recipe
    world: comm.Group
    sizes: MeshSizes
    batch: BatchSizes
    tokenizer: TokenizerWrapper
    splits: Splits
    base: BaseModel
    loss: TokenLoss
    adapter: LoRASpec | None = None
    flops_per_token: float = 0.0
    mesh: comm.Mesh | None = None
    batch_dp: int = 1
    compile_step: bool = field(default_factory=lambda: mx.default_device() == mx.gpu)
    row_threads: RowThreads | None = None

    @property
    def model(self) -> nn.Module:
        """The wrapped model."""
        return self.base.model

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
        plan = partial(self.plan, self.splits.train, self.batch.global_size, self.recipe.seed)
        return TrainingBatches(self.splits.train, plan, self.share, self.recipe.seed, pad_token(self.tokenizer))

    def plan(self, rows: TokenizedRows, size: int, seed: int, epoch: int, shuffle: bool | None = None) -> list[PlannedBatch]:
        """The global batches of `size` lines of one pass over `rows`, packed or in groups of like length."""
        data = self.recipe.data
        settings = {
            "seed": seed,
            "epoch": epoch,
            "global_batch_size": size,
            "max_seq_len": data.max_seq_len,
            "shuffle": data.shuffle if shuffle is None else shuffle,
        }
        if self.loss.packed:
            return plan_packed(rows.lengths, **settings)
        return plan_epoch(rows.lengths, group_by_length=data.group_by_length, buckets=self.buckets, **settings)

    @cached_property
    def buckets(self) -> np.ndarray:
        """Padded lengths of the run; validation uses the same, so that it adds no shapes."""
        return bucket_lengths(self.splits.train.lengths, self.recipe.data.max_seq_len)

    @property
    def share(self) -> Share:
        """This rank's part of a global batch."""
        return Share(self.data_group.rank, self.batch.dp, self.batch.per_device, self.batch.accumulation)

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
            self.tokenizer,
            self.loss,
            rows,
            self.recipe.eval,
            self.plan(rows, share.global_batch_size, seed=0, epoch=0, shuffle=False),
            share,
            self.answer_group,
            pad_token(self.tokenizer),
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued, by the recipe key that a user would change."""
        data = self.recipe.data
        return {
            "model": digest_of(self.base.config),
            "method": self.recipe.method,
            "lora": digest_of(asdict(self.adapter)) if self.adapter else None,
            "data": self.splits.train.digest,
            "data.order": [data.shuffle, data.group_by_length, data.max_seq_len, self.loss.packed],
            "seed": self.recipe.seed,
            "global_batch_size": self.batch.global_size,
            "optimizer.name": self.recipe.optimizer.name,
        }

    def digests(self) -> dict[str, str]:
        """What must be equal on all ranks, for `agreement.require_same`."""
        return {
            "recipe": digest_of(asdict(replace(self.recipe, output_dir=""))),
            "model config": digest_of(self.base.config),
            "tokenizer": digest_of(sorted(self.tokenizer.get_vocab().items())),
            "training data": self.splits.train.digest,
            "validation data": self.splits.valid.digest if self.splits.valid else "none",
        }


def build(recipe: Recipe, world: comm.Group, notice: Notice, batch_dp: int | None = None) -> Parts:
    """Build all parts of a run.

    Args:
        recipe: a checked recipe.
        world: all ranks.
        notice: gets one line for each thing that the user should know.
        batch_dp: see `Parts`. Default: the data-parallel ranks there are.

    Raises:
        ValueError: something in the recipe cannot be done; the text says what and what is allowed.
    """
    sizes = resolve_mesh(recipe.parallel, world.size)
    parts = together(world, partial(_build_alone, recipe, world, sizes, notice))
    parts.batch_dp = batch_dp or sizes.dp
    parts.mesh = comm.Mesh.build(comm.MeshShape(**asdict(sizes)), world, recipe.parallel.backend)
    wrap(parts.model, recipe.parallel, parts.mesh)
    parts.row_threads = row_threads(world)
    checkpoint_layers(parts.model.layers, recipe.gradient_checkpointing)
    parts.model.train()
    return parts


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


def _build_alone(recipe: Recipe, world: comm.Group, sizes: MeshSizes, notice: Notice) -> Parts:
    """All that a rank builds without the others."""
    parts = open_parts(recipe, world, sizes, notice)
    parts.adapter = prepare_model(recipe, parts.base, parts.loss.keys)
    for line in limits_on_experts(parts.model, parts.adapter) if parts.adapter else ():
        notice(line)
    if sizes.tp > 1:
        check_plan(parts.model, plan_for(parts.model), sizes.tp)
    parts.flops_per_token = token_flops(parts.model, recipe.data.max_seq_len).total
    return parts


def open_parts(
    recipe: Recipe,
    world: comm.Group,
    sizes: MeshSizes,
    notice: Notice,
    open_base: Callable[[ModelConfig, int, int], BaseModel] = open_model,
) -> Parts:
    """Tokenizer, rows and base model, and from these how the rows become batches; nothing is trainable yet."""
    batch = resolve_batch(recipe, sizes.dp)
    require_paths(recipe)
    tokenizer = open_tokenizer(recipe.model, partial(corpus, recipe.data, recipe.seed))
    splits = load_splits(recipe.data, tokenizer, recipe.seed, notice=notice)
    base = open_base(recipe.model, len(tokenizer), recipe.seed)
    for rows in filter(None, (splits.train, splits.valid)):
        rows.require_ids_below(num_embeddings(base.model))
    packed = decide_packing(recipe, base.model, splits.train, batch.global_size, notice)
    return Parts(recipe, world, sizes, batch, tokenizer, splits, base, TokenLoss(DropoutKeys(), packed))


def decide_packing(recipe: Recipe, model: nn.Module, rows: TokenizedRows, size: int, notice: Notice) -> bool:
    """What `data.packing` means for this model and these rows.

    Args:
        recipe: `auto` packs where that is proven exact, unless rows are to stay in file order or are so few that
            packed they would not fill one global batch.
        model: the base model.
        rows: the training rows.
        size: lines of a global batch.
        notice: gets one line that says why `auto` does not pack.

    Raises:
        ValueError: `true`, and not proven for this architecture.
    """
    data = recipe.data
    if data.packing is False:
        return False
    reason = packing_supported(model)
    if data.packing is True:
        if reason:
            raise ValueError(f"data.packing=true: {reason}")
        return True
    if reason is None and not (data.shuffle or data.group_by_length):
        reason = "shuffle and group_by_length are off, so rows stay in file order"
    if reason is None and rows.lengths.sum() < size * data.max_seq_len:
        reason = f"the rows would not fill one batch of {size} x {data.max_seq_len} tokens"
    if reason:
        notice(f"packing is off: {reason}")
    return reason is None


def _wire_dtype(parallel: ParallelConfig) -> mx.Dtype | None:
    return {"float32": mx.float32, "bfloat16": mx.bfloat16, None: None}[parallel.wire_dtype]


def _bucket_bytes(parallel: ParallelConfig) -> int | None:
    size = parallel.bucket_mib
    return None if size == "auto" else int(size * 2**20)
