"""Hidden states and output head of a language model, apart, so that a loss need never build all logits.

Letters: B rows, L tokens, D hidden dims, V vocabulary. An mlx-lm text model is `head(norm(layers(embed(x))))`;
the table of architectures says what else is done to the logits. Where the pieces are not known, the whole
model is run and the head is the identity: right, but with all logits in memory.
"""

from dataclasses import dataclass, field, replace
from typing import cast

import mlx.core as mx
import mlx.nn as nn

import comm
from parallel.architectures import ARCHITECTURES
from parallel.wrapper import parallel_state


@dataclass(frozen=True)
class Head:
    """The map from hidden states to logits.

    Attributes:
        module: The projection, `nn.Linear` or an embedding (also quantized, LoRA or sharded); None = identity.
        tied: The projection is the input embedding's `as_linear`.
        scale: Factor on the logits.
        softcap: Logits become `softcap * tanh(logits / softcap)`, or None.
        group: Ranks that split the vocabulary (size 1: every rank has all of it).
        first: First vocabulary id of this rank's slice.
    """

    module: nn.Module | None
    tied: bool = False
    scale: float = 1.0
    softcap: float | None = None
    group: comm.Group = field(default_factory=comm.solo)
    first: int = 0

    def __call__(self, hidden: mx.array) -> mx.array:
        """Logits of this rank's vocabulary slice: `(..., D)` to `(..., V / group.size)`."""
        return self.capped(self.projected(hidden))

    def projected(self, hidden: mx.array) -> mx.array:
        """The module's output, before scale and softcap; shapes as for a call."""
        if self.module is None:
            return hidden
        if self.group.size > 1:
            return self.module.local_logits(hidden)
        return self.module.as_linear(hidden) if self.tied else self.module(hidden)

    def capped(self, logits: mx.array) -> mx.array:
        """Scale and softcap of `projected` states, also in a wider type."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * mx.tanh(logits / self.softcap)
        return logits


def text_model(model: nn.Module) -> nn.Module:
    """The language part of an mlx-lm model: `model.language_model` where it has one, else `model` itself."""
    return cast(nn.Module, getattr(model, "language_model", model))


def output_head(model: nn.Module) -> Head | None:
    """The head of an mlx-lm model, or None where the table of architectures does not know its logits."""
    text = text_model(model)
    row = ARCHITECTURES.get(getattr(text, "model_type", ""))
    if row is None or row.logits is None:
        return None
    args = text.args
    tied = getattr(text, "tie_word_embeddings", getattr(args, "tie_word_embeddings", False)) or "lm_head" not in text
    module = text.model.embed_tokens if tied else text.lm_head
    # Left by TensorParallel where it divides the vocabulary.
    part = getattr(module, "vocabulary", None)
    sharding = {} if part is None else {"group": part.group, "first": part.first}
    return Head(module, tied=tied, **row.logits(args), **sharding)


def is_tied(model: nn.Module) -> bool:
    """Whether the output head is the input embedding; False where the head is not known."""
    head = output_head(model)
    return head is not None and head.tied


def hidden_and_head(model: nn.Module, tokens: mx.array, segments: mx.array | None = None) -> tuple[mx.array, Head]:
    """Run `model` up to its final norm.

    Args:
        model: An mlx-lm model, plain or wrapped, or any module that maps tokens to logits.
        tokens: `(B, L)` int32.
        segments: `(B, L)` int32 document numbers of packed rows; None = one document per row.

    Returns:
        hidden: `(B, L, D)`, or the logits `(B, L, V)` with an identity head where the architecture is unknown.
        head: the `Head` with `head(hidden) == model(tokens)`.
    """
    cache = None if segments is None else model.segment_cache(segments)
    head = output_head(model)
    if head is None:
        return (model(tokens) if cache is None else model(tokens, cache=cache)), Head(None)
    core = text_model(model).model
    hidden = parallel_state(model).guarded(core(tokens) if cache is None else core(tokens, cache))
    # Only now: a head whose weights are divided for storage gathers them for its copy.
    module = head.module
    return hidden, replace(head, module=module.whole()) if module is not None and hasattr(module, "whole") else head
