"""Which layers a pipeline stage has, and a model cut down to them, its layer numbers and weight names kept.

Layers of other stages become parameter-free modules that pass hidden states on, so mlx-lm's own code of a
model (masks, scaling, windows) runs unchanged on every stage. Letters: B rows, L tokens, D hidden dims.
"""

import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

import comm
from parallel.lm_head import output_head, text_model
from parallel.pipeline.stage import LeftStage, Passage

# Text models whose stages are proven equal to the whole model.
STAGED = ("gemma3", "llama", "mistral", "phi3", "qwen2", "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_moe")


class StageCore(nn.Module):
    """The decoder stack of one stage; mixed into the stack's own class."""

    def __call__(self, inputs: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """As the whole stack; raises `LeftStage` at the end of a stage that is not the last."""
        passage = self.passage
        passage.enter(inputs)
        embedding = self.embed_tokens
        if not passage.is_first:
            self.embed_tokens = Blank(passage)
        try:
            hidden = super().__call__(inputs, *args, **kwargs)
        finally:
            self.embed_tokens = embedding
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
        return mx.zeros_like(self.passage.incoming)


class Elsewhere(nn.Module):
    """Stands where another stage has a layer, and looks like that layer to the code that makes masks and caches.

    Args:
        layer: the layer; its plain attributes are kept (such as `is_linear`), none of its arrays.
        passage: given to the layer before the stage's own, which hands out what came in.
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
        return x if self.passage is None else self.passage.incoming


class Same(nn.Module):
    """Stands where the last stage has the final norm."""

    def __call__(self, x: mx.array) -> mx.array:
        """`x` itself."""
        return x


class AbsentCache:
    """Stands in a list of key-value caches for a layer of another stage; masks come from a cache of the same kind.

    Args:
        peer: the cache of one of this stage's layers, or None when no layer here uses such masks.
    """

    def __init__(self, peer: Any = None):
        self.peer = peer
        self.state: list = []
        self.meta_state = ""
        self.nbytes = 0

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        """The mask of the peer's layers."""
        return None if self.peer is None else self.peer.make_mask(*args, **kwargs)

    def is_trimmable(self) -> bool:
        """Nothing is held, so nothing hinders."""
        return True

    def trim(self, num_tokens: int) -> int:
        """Nothing to do; says that it is done."""
        return num_tokens

    def empty(self) -> bool:
        """Always: the layer's keys are elsewhere."""
        return True

    def merge(self, caches: Sequence["AbsentCache"]) -> "AbsentCache":
        """For several rows at once: the stand-in whose peer is the peers' cache of all rows."""
        peers = [cache.peer for cache in caches]
        return AbsentCache(None if self.peer is None else self.peer.merge(peers))

    def extract(self, row: int) -> "AbsentCache":
        """For one row of several."""
        return AbsentCache()

    def _left_to_the_peer(self, *args: Any, **kwargs: Any) -> None:
        """What changes the rows of a batch; the peer stands in the same list and is told itself."""

    extend = filter = prepare = finalize = advance = _left_to_the_peer


def own_caches(caches: Sequence[Any], own: range) -> list[Any]:
    """A model's caches with those of other stages' layers replaced."""
    kinds = {_cache_kind(caches[i]): caches[i] for i in reversed(own)}
    for peer in kinds.values():
        if hasattr(peer, "merge"):
            peer.merge = _merged_once(peer.merge)
    return [cache if i in own else AbsentCache(kinds.get(_cache_kind(cache))) for i, cache in enumerate(caches)]


def _merged_once(merge: Callable[[Sequence[Any]], Any]) -> Callable[[Sequence[Any]], Any]:
    """`merge` that gives a layer and its stand-ins the same cache, as the rows' own caches are the same."""
    merged: dict[tuple[int, ...], Any] = {}

    def once(caches: Sequence[Any]) -> Any:
        rows = tuple(map(id, caches))
        if rows not in merged:
            merged[rows] = merge(caches)
        return merged[rows]

    return once


def check_stages(model: nn.Module) -> None:
    """Refuse a model that cannot be cut.

    Raises:
        ValueError: names its architecture and those that can.
    """
    model_type = getattr(text_model(model), "model_type", None)
    core = getattr(text_model(model), "model", None)
    known = {*STAGED, *(f"{name}_text" for name in STAGED)}
    if model_type not in known or output_head(model) is None or core is None:
        possible = ", ".join(sorted(STAGED))
        raise ValueError(f"PipelineParallel cannot cut model_type {model_type!r}; it can cut {possible}.")


def cut_model(model: nn.Module, own: range, num_layers: int) -> Passage:
    """Drop in place what other stages have; evaluates nothing.

    Args:
        model: checked by `check_stages`.
        own: numbers of the layers that stay.
        num_layers: of the whole model.

    Returns:
        What the stage's modules read in each forward pass.
    """
    text, tied = text_model(model), output_head(model).tied
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
    core.__class__ = type(f"Stage{type(core).__name__}", (StageCore, type(core)), {"__module__": __name__})
    return passage


def even_split(num_layers: int, num_stages: int) -> list[int]:
    """Layers per stage, as equal as can be; the first stages have one more, as the last one has the head."""
    least, more = divmod(num_layers, num_stages)
    return [least + (stage < more) for stage in range(num_stages)]


def memory_split(
    layer_bytes: Sequence[int], first_bytes: int, last_bytes: int, memory_bytes: Sequence[int]
) -> list[int]:
    """Layers per stage so that the fullest machine is as little full as can be; every stage has at least one.

    Args:
        layer_bytes: of each layer.
        first_bytes, last_bytes: of what the first stage (embedding) and the last (norm, head) have besides.
        memory_bytes: of each stage's machine.
    """
    num_layers, num_stages = len(layer_bytes), len(memory_bytes)
    sums = [0]
    for size in layer_bytes:
        sums.append(sums[-1] + size)

    def fullness(stage: int, first: int, last: int) -> float:
        more = first_bytes * (stage == 0) + last_bytes * (stage == num_stages - 1)
        return (sums[last] - sums[first] + more) / memory_bytes[stage]

    # best[n]: the least fullness of the stages so far when they have the first n layers, and their counts.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for stage in range(num_stages):
        ends = range(stage + 1, num_layers - (num_stages - 1 - stage) + 1)
        best = {
            end: min(
                (max(level, fullness(stage, start, end)), [*counts, end - start])
                for start, (level, counts) in best.items()
                if start < end
            )
            for end in ends
        }
    return best[num_layers][1]


def choose_split(
    model: nn.Module, split: str | Sequence[int], group: comm.Group, peers: Sequence[comm.Group] = ()
) -> list[int]:
    """Layers per stage, equal on all ranks.

    Args:
        model: the whole model.
        split: "even", "memory", or the counts.
        group: the stages.
        peers: groups whose ranks must choose alike (data and tensor parallel): of the machines that hold the
            same stage, the smallest counts.

    Raises:
        ValueError: unknown, or it does not fit the layers or the stages.
    """
    num_layers = len(text_model(model).model.layers)
    check_split(split, num_layers, group.size)
    if split == "even":
        return even_split(num_layers, group.size)
    if split == "memory":
        core = text_model(model).model
        layers = [_num_bytes(layer) for layer in core.layers]
        head = output_head(model).module
        return memory_split(layers, _num_bytes(core.embed_tokens), _num_bytes(head), _memory_of_stages(group, peers))
    return list(split)


def check_split(split: str | Sequence[int], num_layers: int, num_stages: int) -> None:
    """Refuse a split that does not fit.

    Raises:
        ValueError: unknown, or it does not fit the layers or the stages.
    """
    if num_stages > num_layers:
        raise ValueError(f"{num_layers} layers cannot be cut into {num_stages} stages; each needs at least one.")
    if split in ("even", "memory"):
        return
    if isinstance(split, str):
        raise ValueError(f"split is {split!r}; it must be 'even', 'memory' or a list of layers per stage.")
    counts = list(split)
    if len(counts) != num_stages or any(count < 1 for count in counts) or sum(counts) != num_layers:
        raise ValueError(
            f"split {counts} has {len(counts)} stages and {sum(counts)} layers; {num_stages} stages of at least one "
            f"layer with {num_layers} layers together are needed."
        )


def _memory_of_stages(group: comm.Group, peers: Sequence[comm.Group]) -> list[int]:
    """Bytes that each stage's rank may use: its machine's memory over the ranks of this pipeline on it."""
    hosts = comm.all_gather_object(socket.gethostname(), group)
    mebibytes = mx.array(machine_bytes() // hosts.count(hosts[group.rank]) // 2**20, dtype=mx.int32)
    for peer in peers:
        mebibytes = peer.all_min(mebibytes)
    return [n * 2**20 for n in group.all_gather(mebibytes).tolist()]


def machine_bytes() -> int:
    """Memory of this machine."""
    if mx.default_device() == mx.gpu:
        return int(mx.device_info()["memory_size"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _num_bytes(module: nn.Module) -> int:
    return sum(array.nbytes for _, array in tree_flatten(module.parameters()))


def _cache_kind(cache: Any) -> tuple[type, Any]:
    return type(cache), getattr(cache, "max_size", None)
