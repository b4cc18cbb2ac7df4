"""The vocabulary divided over a group: input embedding, output head, and a cross-entropy on logit slices.

No rank ever has the logits of the whole vocabulary in training; called like the layers they replace (for
generation), embedding and head gather them. V is the vocabulary, D the hidden dims. Source: Shoeybi et al.,
arXiv 1909.08053.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

import comm
from parallel.extension import extend
from parallel.layout import Segment
from parallel.tensor.linear import AllToShardedLinear, Sharding, extend_class, linear_dims, shard_in_place
from parallel.tensor.slicing import SlicedModule, remember_whole, slice_array


@dataclass(frozen=True)
class VocabularySlice:
    """This rank's ids: `size` of them from `first`, and the group that has the others."""

    group: comm.Group
    first: int
    size: int


class VocabularyEmbedding(SlicedModule):
    """An embedding of which each rank holds the rows of its vocabulary slice; mixed into the layer's class.

    Forward: one sum over the group. Backward: no communication; tied as the output head, one sum of the hidden
    states' gradient.
    """

    def __call__(self, ids: mx.array) -> mx.array:
        """`(...)` token ids to `(..., D)`, equal on all ranks."""
        local = ids - self.vocabulary.first
        inside = (local >= 0) & (local < self.vocabulary.size)
        rows = super().__call__(mx.where(inside, local, 0))
        return comm.sum_over_group(mx.where(inside[..., None], rows, 0), self.vocabulary.group)

    def as_linear(self, x: mx.array) -> mx.array:
        """`(..., D)` to the logits of the whole vocabulary `(..., V)`, on every rank."""
        return comm.gather_over_group(self.local_logits(x), self.vocabulary.group)

    def local_logits(self, x: mx.array) -> mx.array:
        """`(..., D)` to the logits of this rank's slice `(..., V / ranks)`."""
        return super().as_linear(comm.copy_to_group(x, self.vocabulary.group))  # type: ignore[misc]  # the mixed-in class has it

    def to_lora(self, **options: Any) -> nn.Module:
        """Refused: an adapter's rows would have to be divided too.

        Raises:
            ValueError: Always.
        """
        raise ValueError("The embedding is divided by vocabulary already; put its adapter in before TensorParallel.")


class VocabularyHead(AllToShardedLinear):
    """An output head of which each rank computes its vocabulary slice; mixed into the layer's class."""

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """`(..., D)` to the logits of the whole vocabulary `(..., V)`, on every rank."""
        return comm.gather_over_group(self.local_logits(x), self.vocabulary.group)

    def local_logits(self, x: mx.array) -> mx.array:
        """`(..., D)` to the logits of this rank's slice `(..., V / ranks)`."""
        return super().__call__(x)

    def to_lora(self, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> nn.Module:
        """As for any sharded linear; the result is a head again."""
        return self._as_head(super().to_lora(r, dropout, scale))

    def to_dora(self, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> nn.Module:
        """As for any sharded linear; the result is a head again."""
        return self._as_head(super().to_dora(r, dropout, scale))

    def _as_head(self, layer: nn.Module) -> nn.Module:
        layer.vocabulary = self.vocabulary
        extend_class(layer, VocabularyHead)
        return layer


def shard_embedding(embedding: nn.Module, group: comm.Group) -> None:
    """Divide an `nn.Embedding` or `nn.QuantizedEmbedding` in place, lazily."""
    num_embeddings = embedding.weight.shape[0]
    remember_whole(embedding, group)
    for name in [name for name in ("weight", "scales", "biases") if name in embedding]:
        slice_array(embedding, name, 0, (Segment(num_embeddings),), group)
    embedding.vocabulary = _slice_of(num_embeddings, group)
    extend(embedding, VocabularyEmbedding)


def shard_head(head: nn.Module, group: comm.Group) -> None:
    """Divide the outputs of a linear head (also quantized, or with an adapter) in place, lazily."""
    output_dims, input_dims = linear_dims(head)
    segments = (Segment(output_dims),)
    shard_in_place(head, Sharding("all-to-sharded", group, output_dims, input_dims, segments))
    head.vocabulary = _slice_of(output_dims, group)
    extend_class(head, VocabularyHead)


def cross_entropy(logits: mx.array, targets: mx.array, group: comm.Group, first: int = 0) -> mx.array:
    """Token losses from logits of which each rank has a slice of the vocabulary.

    Forward: two messages of one and two numbers per token. Backward: none.

    Args:
        logits: `(..., V / ranks)`, this rank's slice; computed in float32.
        targets: `(...)` token ids of the whole vocabulary.
        group: The ranks that have the other slices; with one rank this is the plain cross-entropy.
        first: The slice's first token id.

    Returns:
        `(...)` float32 losses, equal on all ranks.
    """
    logits = logits.astype(mx.float32)
    # The largest logit only keeps exp in range: the loss does not depend on it.
    largest = group.all_max(mx.stop_gradient(logits.max(axis=-1)))
    local = targets - first
    inside = (local >= 0) & (local < logits.shape[-1])
    picked = mx.take_along_axis(logits, mx.where(inside, local, 0)[..., None], axis=-1).squeeze(-1)
    sums = mx.stack([mx.exp(logits - largest[..., None]).sum(axis=-1), mx.where(inside, picked, 0.0)])
    total, target = comm.sum_over_group(sums, group)
    return mx.log(total) + largest - target


def _slice_of(num_ids: int, group: comm.Group) -> VocabularySlice:
    size = num_ids // group.size
    return VocabularySlice(group, group.rank * size, size)
