"""From a recipe to everything a run needs. The only file that sees all the parts; the loop sees none of this.

LoRA, DoRA and full fine-tuning, packing, checkpointed layers and the mesh differ here and nowhere else.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

import comm
from parallel import DataParallel
from trainer.adapters import load_into, read_adapter
from trainer.batches import Share, TrainingBatches
from trainer.config import Recipe
from trainer.data import Splits, bucket_lengths, corpus, load_splits, plan_epoch
from trainer.evaluation import Evaluator
from trainer.loading import BaseModel, materialize, open_model, open_tokenizer
from trainer.lora import DropoutKeys, LoRASpec, attach, find_targets
from trainer.loss import TokenLoss
from trainer.optim import Optimizer
from trainer.rules import BatchSizes, MeshSizes, resolve_batch, resolve_mesh

Notice = Callable[[str], None]


@dataclass
class Parts:
    """A run's parts, built on every rank alike.

    Attributes:
        recipe: the resolved recipe.
        world: all ranks.
        mesh, batch: sizes of the mesh's axes and of a global batch.
        tokenizer: mlx-lm's wrapper of the tokenizer.
        splits: tokenised training and validation rows.
        base: the model and its config; adapters and wrappers are in place.
        adapter: modules and shape of the adapters, or None for full fine-tuning.
        loss: the loss function for `parallel.value_and_grad`.
        batches: the steps' inputs on this rank.
        optimizer: holds moments and master weights.
        identity: what a checkpoint must agree on to be continued, by recipe key.
    """

    recipe: Recipe
    world: comm.Group
    mesh: MeshSizes
    batch: BatchSizes
    tokenizer: TokenizerWrapper
    splits: Splits
    base: BaseModel
    adapter: LoRASpec | None
    loss: TokenLoss
    batches: TrainingBatches
    optimizer: Optimizer
    identity: dict[str, Any]

    @property
    def model(self) -> nn.Module:
        """The wrapped model."""
        return self.base.model

    @property
    def total_steps(self) -> int:
        """Optimizer updates of the whole run."""
        return self.recipe.max_steps or self.recipe.epochs * self.batches.steps_per_epoch

    def evaluator(self) -> Evaluator:
        """Measures the model on the validation rows, which must be there."""
        assert self.splits.valid is not None, "there are no validation rows"
        return Evaluator(
            self.model,
            self.tokenizer,
            self.loss,
            self.splits.valid,
            self.recipe.eval,
            self.batches.share,
            self.world,
            max_seq_len=self.recipe.data.max_seq_len,
            pad_id=self.batches.pad_id,
        )

    def digests(self) -> dict[str, str]:
        """What must be equal on all ranks, for `agreement.require_same`."""
        return {
            "recipe": _digest(asdict(replace(self.recipe, output_dir=""))),
            "model config": _digest(self.base.config),
            "tokenizer": _digest(sorted(self.tokenizer.get_vocab().items())),
            "training data": self.splits.train.digest,
            "validation data": self.splits.valid.digest if self.splits.valid else "none",
        }


def build(recipe: Recipe, world: comm.Group, notice: Notice) -> Parts:
    """Build all parts of a run.

    Args:
        recipe: a checked recipe.
        world: all ranks.
        notice: gets one line for each thing that the user should know.

    Raises:
        ValueError: something in the recipe cannot be done; the text says what and what is allowed.
    """
    mesh = resolve_mesh(recipe.parallel, world.size)
    batch = resolve_batch(recipe, mesh.dp)
    tokenizer = open_tokenizer(recipe.model, partial(corpus, recipe.data, recipe.seed))
    splits = load_splits(recipe.data, tokenizer, recipe.seed, notice=notice)
    base = open_model(recipe.model, len(tokenizer), recipe.seed)
    keys = DropoutKeys()
    adapter = prepare_method(recipe, base.model, keys)
    materialize(base.model)
    DataParallel(base.model, world, wire_dtype=_wire_dtype(recipe), bucket_bytes=_bucket_bytes(recipe))
    base.model.train()
    return Parts(
        recipe=recipe,
        world=world,
        mesh=mesh,
        batch=batch,
        tokenizer=tokenizer,
        splits=splits,
        base=base,
        adapter=adapter,
        loss=TokenLoss(keys),
        batches=training_batches(recipe, splits, batch, world.rank, tokenizer),
        optimizer=Optimizer(base.model.trainable_parameters(), recipe.optimizer),
        identity=identity(recipe, splits, batch, base),
    )


def prepare_method(recipe: Recipe, model: nn.Module, keys: DropoutKeys) -> LoRASpec | None:
    """Make the recipe's parameters trainable and all others frozen; returns the adapters' spec, if any.

    Raises:
        ValueError: nothing would be trainable, or the adapters do not fit the model.
    """
    if recipe.method == "full":
        model.unfreeze()
        _require_trainable(model, "method: full")
        return None
    model.freeze()
    lora = recipe.lora
    if lora.init_from is not None:
        adapter = read_adapter(lora.init_from, model, lora.dropout)
        attach(model, adapter.spec, keys, recipe.seed)
        load_into(model, adapter)
        spec = adapter.spec
    else:
        paths = find_targets(model, lora.targets, lora.num_layers, recipe.method)
        spec = LoRASpec(paths, lora.rank, lora.alpha / lora.rank, lora.dropout, recipe.method)
        attach(model, spec, keys, recipe.seed)
    _require_trainable(model, f"method: {recipe.method}")
    return spec


def training_batches(
    recipe: Recipe, splits: Splits, batch: BatchSizes, dp_rank: int, tokenizer: TokenizerWrapper
) -> TrainingBatches:
    """The steps' inputs of one data-parallel rank."""
    data = recipe.data
    share = Share(dp_rank, batch.dp, batch.per_device, batch.accumulation)
    lengths = splits.train.lengths
    buckets = bucket_lengths(lengths, data.max_seq_len)

    def planner(epoch: int) -> list:
        return plan_epoch(
            lengths,
            seed=recipe.seed,
            epoch=epoch,
            global_batch_size=share.global_batch_size,
            max_seq_len=data.max_seq_len,
            shuffle=data.shuffle,
            group_by_length=data.group_by_length,
            buckets=buckets,
        )

    return TrainingBatches(splits.train, planner, share, recipe.seed, pad_token(tokenizer))


def pad_token(tokenizer: TokenizerWrapper) -> int:
    """Id that fills rows up: the tokenizer's padding token, else its end of text, else 0. It is never a target."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def identity(recipe: Recipe, splits: Splits, batch: BatchSizes, base: BaseModel) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued, by the recipe key that a user would change."""
    lora = asdict(recipe.lora) if recipe.method != "full" else None
    return {
        "model": _digest(base.config),
        "method": recipe.method,
        "lora": lora,
        "data": splits.train.digest,
        "data.order": [recipe.data.shuffle, recipe.data.group_by_length, recipe.data.max_seq_len],
        "seed": recipe.seed,
        "global_batch_size": batch.global_size,
        "optimizer.name": recipe.optimizer.name,
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _require_trainable(model: nn.Module, setting: str) -> None:
    if not tree_flatten(model.trainable_parameters()):
        raise ValueError(f"{setting} leaves no trainable parameter in this model.")


def _wire_dtype(recipe: Recipe) -> mx.Dtype | None:
    return {"float32": mx.float32, "bfloat16": mx.bfloat16, None: None}[recipe.parallel.wire_dtype]


def _bucket_bytes(recipe: Recipe) -> int | None:
    size = recipe.parallel.bucket_mib
    return None if size == "auto" else int(size * 2**20)
