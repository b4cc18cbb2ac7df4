"""Which tokens may see which in training rows: several documents in a row, sliding windows.

mlx-lm's models ask their `cache` argument for masks. The objects here answer that one question and hold nothing
else; layers extended by `prepare_for_training` read windows and documents from them.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

# Where documents begin is rounded down to this, so that few shapes occur.
START_STEP = 64


@dataclass(frozen=True)
class TrainingMask:
    """A causal mask in words.

    Attributes:
        window: Keys a query sees at most, itself included; None = all.
        segments: (B, T) document numbers, or None.
        starts: For each of the T tokens a key before which neither it nor any later token sees one, in no row; None
            = 0.
    """

    window: int | None = None
    segments: mx.array | None = None
    starts: np.ndarray | None = None

    def array(self, num_tokens: int) -> mx.array:
        """(B or 1, 1, T, T) bool, True where the key is seen."""
        distance = mx.arange(num_tokens)[:, None] - mx.arange(num_tokens)
        visible = (distance >= 0)[None, None]
        if self.window is not None:
            visible = visible & (distance < self.window)
        if self.segments is not None:
            visible = visible & (self.segments[:, None, :, None] == self.segments[:, None, None, :])
        return visible


@dataclass(frozen=True)
class AttentionSegments:
    """Stands where mlx-lm expects a layer's key-value cache.

    Attributes:
        segments: (B, T) document numbers, or None for one document a row.
        starts: See `TrainingMask`.
        positions: (B, T) each token's place in its document, or None.
    """

    segments: mx.array | None = None
    starts: np.ndarray | None = None
    positions: mx.array | None = None

    def make_mask(
        self, num_tokens: int, return_array: bool = False, window_size: int | None = None
    ) -> TrainingMask | mx.array:
        """The mask of a layer with this window."""
        window = window_size if window_size is not None and window_size < num_tokens else None
        mask = TrainingMask(window, self.segments, self.starts)
        return mask.array(num_tokens) if return_array else mask


@dataclass(frozen=True)
class StateSegments:
    """Stands where mlx-lm expects the cache of a layer with a recurrent state. The attribute is that of
    `AttentionSegments`.
    """

    segments: mx.array | None = None

    def make_mask(self, num_tokens: int) -> None:
        """No mask: padding comes last, where it changes nothing that counts."""


def segment_caches(layers: list[nn.Module], segments: mx.array | None) -> list[AttentionSegments | StateSegments]:
    """What to give as `cache` to a model with these layers, to keep the documents of packed rows apart.

    Args:
        layers: The model's decoder layers.
        segments: (B, T) int, one number per document, 0 for padding; None = one document a row.
    """
    if segments is None:
        attention = AttentionSegments()
    else:
        attention = AttentionSegments(segments, _first_starts(segments), positions_in_document(segments))
    state = StateSegments(segments)
    return [state if has_state(layer) else attention for layer in layers]


def positions_in_document(segments: mx.array) -> mx.array:
    """(B, T) document numbers to each token's place in its document, from 0."""
    index = mx.broadcast_to(mx.arange(segments.shape[1]), segments.shape)
    before = mx.concatenate([segments[:, :1], segments[:, :-1]], axis=1)
    return index - mx.cummax(mx.where(segments != before, index, 0), axis=1)


def has_state(layer: nn.Module) -> bool:
    """Whether a decoder layer carries a recurrent state."""
    return bool(getattr(layer, "is_linear", False))


def _first_starts(segments: mx.array) -> np.ndarray | None:
    """For each token the earliest start of its document over all rows (T,), rounded down; None inside
    `mx.compile`, where segments cannot be read."""
    try:
        numbers = np.array(segments)
    except ValueError:
        return None
    begins = np.diff(numbers, axis=1, prepend=numbers[:, :1]) != 0
    starts = np.maximum.accumulate(np.where(begins, np.arange(numbers.shape[1]), 0), axis=1)
    return starts.min(axis=0) // START_STEP * START_STEP
