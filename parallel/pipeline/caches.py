"""The caches of one pipeline stage: those of its own layers, and stand-ins for the others."""

from collections.abc import Callable, Sequence
from typing import Any


class AbsentCache:
    """Stands in a list of key-value caches for a layer of another stage; masks come from a cache of the same kind.

    Args:
        peer: The cache of one of this stage's layers, or None when no layer here uses such masks.
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


def _cache_kind(cache: Any) -> tuple[type, Any]:
    return type(cache), getattr(cache, "max_size", None)
