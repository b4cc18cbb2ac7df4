"""MLX's memory limits, and when its cache of freed memory is emptied."""

import mlx.core as mx

from parallel.pipeline import machine_bytes
from trainer.recipe.config import LimitsConfig

GIB = 2**30
# Of the memory that MLX may use. Below it, keeping the memory is cheaper than asking the system for it again.
CACHE_SHARE = 0.25


def apply_limits(limits: LimitsConfig) -> None:
    """Set MLX's memory limits (GiB) where the recipe gives them.

    Wired memory exists on Metal only; there it is what the system recommends where the recipe says nothing, as weights
    that macOS pages out are read from the disk in every step.
    """
    if limits.memory_gib is not None:
        mx.set_memory_limit(int(limits.memory_gib * GIB))
    if limits.cache_gib is not None:
        mx.set_cache_limit(int(limits.cache_gib * GIB))
    if mx.metal.is_available():
        recommended = mx.device_info()["max_recommended_working_set_size"]
        mx.set_wired_limit(int(recommended if limits.wired_gib is None else limits.wired_gib * GIB))


def clear_large_cache(limits: LimitsConfig) -> bool:
    """Give freed memory back when more than a quarter of what MLX may use is waiting to be used again.

    Called after work whose arrays have other sizes than a training step's: validation, generation, checkpoints.
    What MLX may use is `limits.memory_gib`, or the machine's memory. Returns whether the cache was cleared.
    """
    usable = limits.memory_gib * GIB if limits.memory_gib is not None else machine_bytes()
    if mx.get_cache_memory() <= CACHE_SHARE * usable:
        return False
    mx.clear_cache()
    return True
