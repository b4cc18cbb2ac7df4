"""A model cut down to the layers of one pipeline stage, its layer numbers and weight names kept.

Layers of other stages become parameter-free modules that pass hidden states on, so mlx-lm's own code of a
model (masks, scaling, windows) runs unchanged on every stage. Letters: B rows, L tokens, D hidden dims.
"""

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from parallel.architectures import ARCHITECTURES
from parallel.extension import extend
from parallel.lm_head import is_tied, output_head, text_model
from parallel.pipeline.stage import LeftStage, Passage


class StageCore(nn.Module):
    """The decoder stack of one stage; mixed into the stack's own class."""

    def __call__(self, inputs: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """As the whole stack; raises `LeftStage` at the end of a stage that is not the last."""
        passage = self.passage
        passage.enter(inputs)
        embedding: nn.Module = self["embed_tokens"]
        if not passage.is_first:
            self["embed_tokens"] = Blank(passage)
        try:
            hidden = super().__call__(inputs, *args, **kwargs)
        finally:
            self["embed_tokens"] = embedding
        if not passage.is_last:
            raise LeftStage(hidden)
        return hidden


class Blank(nn.Module):
    """Stands where a later stage would embed: zeros of the right shape, which nothing computes."""

    def __init__(self, passage: Passage):
        super().__init__()
        self.passage = passage

    def __call__(self, tokens: mx.array) -> mx.array:
        """`(B, L)` to `(B, L, D)` zeros."""
        return mx.zeros_like(cast(mx.array, self.passage.incoming))


class Elsewhere(nn.Module):
    """Stands where another stage has a layer, and looks like that layer to the code that makes masks and caches.

    Args:
        layer: The layer; its plain attributes are kept (such as `is_linear`), none of its arrays.
        passage: Given to the layer before the stage's own, which hands out what came in.
    """

    # Never in training mode: what checkpointing adds to a layer would hide the gradient of what comes in.
    training = property(lambda self: False)

    def __init__(self, layer: nn.Module, passage: Passage | None = None):
        super().__init__()
        plain = {k: v for k, v in layer.__dict__.items() if isinstance(v, (bool, int, str)) and not k.startswith("_")}
        self.__dict__.update(plain)
        self.passage = passage

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """`x` itself, or the stage's incoming hidden states."""
        return x if self.passage is None else cast(mx.array, self.passage.incoming)


class Same(nn.Module):
    """Stands where the last stage has the final norm."""

    def __call__(self, x: mx.array) -> mx.array:
        """`x` itself."""
        return x


def check_stages(model: nn.Module) -> None:
    """Refuse a model that cannot be cut.

    Raises:
        ValueError: Names its architecture and those that can.
    """
    model_type = getattr(text_model(model), "model_type", None)
    core = getattr(text_model(model), "model", None)
    known = {name for name, row in ARCHITECTURES.items() if row.staged}
    if model_type not in known or output_head(model) is None or core is None:
        possible = ", ".join(sorted(name for name in known if not name.endswith("_text")))
        raise ValueError(f"PipelineParallel cannot cut model_type {model_type!r}; it can cut {possible}.")


def cut_model(model: nn.Module, own: range, num_layers: int) -> Passage:
    """Drop in place what other stages have; evaluates nothing.

    Args:
        model: A model that `check_stages` has passed.
        own: Numbers of the layers that stay.
        num_layers: How many layers the whole model has.

    Returns:
        What the stage's modules read in each forward pass.
    """
    text, tied = text_model(model), is_tied(model)
    core = text.model
    passage = Passage(is_first=own.start == 0, is_last=own.stop == num_layers)
    core.layers = [
        layer if i in own else Elsewhere(layer, passage if i == own.start - 1 else None)
        for i, layer in enumerate(core.layers)
    ]
    if not passage.is_first and not (passage.is_last and tied):
        core.embed_tokens = Same()
    if not passage.is_last:
        core.norm = Same()
        if "lm_head" in text:
            del text["lm_head"]
    core.passage = passage
    extend(core, StageCore, f"Stage{type(core).__name__}")
    return passage
