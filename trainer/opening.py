"""What a recipe opens: tokenizer, rows and base model, and how the rows become batches. Nothing is trained by it yet.

Enough for `preview`, and the first half of a run (`trainer.build`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from comm import MeshShape
from trainer.agreement import Notice
from trainer.data import (
    PlannedBatch,
    RowSequences,
    Splits,
    TokenizedRows,
    bucket_lengths,
    corpus,
    load_splits,
    plan_epoch,
    plan_packed,
)
from trainer.model.architectures import packing_supported
from trainer.model.loading import BaseModel, num_embeddings, open_model, open_tokenizer
from trainer.objectives.objective import Objective
from trainer.objectives.table import OBJECTIVES
from trainer.recipe.config import ModelConfig, Recipe
from trainer.recipe.paths import require_paths
from trainer.recipe.rules import BatchSizes, resolve_batch


@dataclass(frozen=True)
class Opened:
    """What a recipe names, opened on one rank; every rank has the same.

    Attributes:
        recipe: The resolved recipe.
        sizes: Sizes of the mesh's axes.
        batch: Sizes of a global batch.
        tokenizer: Mlx-lm's wrapper of the tokenizer.
        splits: Tokenised training and validation rows.
        base: The model and its config.
        objective: What is minimised.
        packed: Lines of a batch hold several rows; attention and recurrent state stay inside each.
    """

    recipe: Recipe
    sizes: MeshShape
    batch: BatchSizes
    tokenizer: TokenizerWrapper
    splits: Splits
    base: BaseModel
    objective: Objective
    packed: bool

    @cached_property
    def buckets(self) -> np.ndarray:
        """Padded lengths of the run; validation uses the same, so that it adds no shapes."""
        return bucket_lengths(self.splits.train.lengths, self.recipe.data.max_seq_len)

    def plan(self, rows: TokenizedRows, size: int, seed: int, epoch: int, shuffle: bool | None = None) -> list[PlannedBatch]:
        """The global batches of `size` lines of one pass over `rows`, packed or in groups of like length."""
        data = self.recipe.data
        if self.packed:
            planned = partial(plan_packed, rows.lengths)
        else:
            planned = partial(plan_epoch, rows.lengths, group_by_length=data.group_by_length, buckets=self.buckets)
        return planned(
            seed=seed,
            epoch=epoch,
            global_batch_size=size,
            max_seq_len=data.max_seq_len,
            shuffle=data.shuffle if shuffle is None else shuffle,
        )


def open_recipe(
    recipe: Recipe,
    sizes: MeshShape,
    notice: Notice,
    open_base: Callable[[ModelConfig, int, int], BaseModel] = open_model,
    objective: Objective | None = None,
) -> Opened:
    """Open what a recipe names.

    Args:
        recipe: A checked recipe.
        sizes: Sizes of the mesh's axes; the batch depends on the data-parallel ones.
        notice: Gets one line for each thing that the user should know.
        open_base: Opens the base model from its config, the vocabulary's size and a seed.
        objective: What is minimised. Default: the recipe's.

    Raises:
        ValueError: A file, the rows or the model cannot be used; the text says what is allowed.
    """
    batch = resolve_batch(recipe, sizes.dp)
    require_paths(recipe)
    tokenizer = open_tokenizer(recipe.model, partial(corpus, recipe.data, recipe.seed))
    objective = objective or OBJECTIVES[recipe.objective.name](recipe.objective)
    splits = load_splits(recipe.data, tokenizer, recipe.seed, notice=notice, sequences=_sequences(objective))
    base = open_base(recipe.model, len(tokenizer), recipe.seed)
    for rows in filter(None, (splits.train, splits.valid)):
        rows.require_ids_below(num_embeddings(base.model))
    packed = decide_packing(recipe, base.model, objective, splits.train, batch.global_size, notice)
    return Opened(recipe, sizes, batch, tokenizer, splits, base, objective, packed)


def _sequences(objective: Objective) -> RowSequences | None:
    """How rows become sequences, where the objective does not take them as they are."""
    if type(objective).sequences is Objective.sequences:
        return None
    return RowSequences(objective.name, objective.sequences)


def decide_packing(
    recipe: Recipe, model: nn.Module, objective: Objective, rows: TokenizedRows, size: int, notice: Notice
) -> bool:
    """What `data.packing` means for this model, objective and rows.

    Args:
        recipe: `auto` packs where that is proven exact, unless rows are to stay in file order or are so few that
            packed they would not fill one global batch.
        model: The base model.
        objective: What is minimised.
        rows: The training rows.
        size: Lines of a global batch.
        notice: Gets one line that says why `auto` does not pack.

    Raises:
        ValueError: `true`, and not proven for this architecture.
    """
    data = recipe.data
    if data.packing is False:
        return False
    reason = packing_supported(model)
    if not objective.reads_segments:
        reason = f"the objective {objective.name} does not read segments, so rows of one line would see each other"
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
