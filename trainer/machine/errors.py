"""MLX's errors of memory and of the GPU in words that name the setting to change next.

MLX raises them as RuntimeError with a text of the device's own: Metal's allocator and command buffers
(mlx/backend/metal/allocator.cpp, device.cpp), CUDA's allocator, and std::bad_alloc on a CPU. On a Mac some of them
end the process instead, and no Python sees them.
"""

from __future__ import annotations

import argparse
import traceback
from pathlib import Path

from trainer.recipe.config import Recipe
from trainer.recipe.problems import USER_ERRORS

_MEMORY_WORDS = (
    "unable to allocate",
    "attempting to allocate",
    "insufficient memory",
    "outofmemory",
    "out of memory",
    "bad_alloc",
    "outside the supported range",  # of a shape's 32 bits
)
_BUFFER_WORDS = ("resource limit",)
_TIMEOUT_WORDS = ("callbackerrortimeout", "gpu timeout", "impactinginteractivity")
_SHORTEST_ROWS = 256


class DeviceMemoryError(ValueError):
    """The recipe needs more memory than there is; the text names the next setting to change."""


class ArchitectureError(ValueError):
    """mlx-lm's code of an architecture does not take the values of a config, or cannot be differentiated."""


class DeviceTimeoutError(OSError):
    """The GPU's work was ended because it took or waited too long."""


def translated(error: Exception, arguments: argparse.Namespace) -> Exception:
    """The same error, or one in its place that says what to change.

    Args:
        error: Anything that a verb raised.
        arguments: The verb's arguments; the recipe they name decides what to change next.
    """
    if module := _architecture_of(error):
        return ArchitectureError(
            f"The architecture's own code ({module}) fails with this model and recipe: {type(error).__name__}: {error}"
        )
    if "[Primitive::vjp]" in str(error):
        operation = str(error).rpartition(" ")[2].rstrip(".")
        return ArchitectureError(f"This architecture cannot be trained: MLX has no gradient of its operation {operation}.")
    if not isinstance(error, (RuntimeError, MemoryError, OverflowError)):
        return error
    text = f"{type(error).__name__}: {error}" if isinstance(error, MemoryError) else str(error)
    first_line, folded = (text.strip().splitlines() or [""])[0], text.casefold()
    if isinstance(error, MemoryError) or any(word in folded for word in _MEMORY_WORDS):
        return DeviceMemoryError(
            f"It does not fit in memory ({first_line}). Next: {next_setting(_recipe_of(arguments))}. "
            "`python -m trainer plan RECIPE` shows what takes memory, and which mesh fits."
        )
    if any(word in folded for word in _BUFFER_WORDS):
        return DeviceMemoryError(
            f"Metal holds too many buffers ({first_line}). Next: limits.cache_gib=2, which gives unused ones back; "
            "or data.packing=true, which makes all batches of one shape."
        )
    if any(word in folded for word in _TIMEOUT_WORDS):
        return DeviceTimeoutError(
            f"The GPU's work took too long and was ended ({first_line}). One machine: {next_setting(None)}. Several: a "
            "rank waited for a late one; start again, the run goes on from its last checkpoint (--max-restarts)."
        )
    return error


def _architecture_of(error: Exception) -> str:
    """The module of mlx-lm's architectures in which an error was raised, or for which MLX has no gradient; else empty."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    # MLX's own layers may raise it, called from there.
    file = next((file for file in reversed(files) if "/mlx/" not in file), "")
    return f"mlx_lm.models.{Path(file).stem}" if "/mlx_lm/models/" in file else ""


def next_setting(recipe: Recipe | None) -> str:
    """The cheapest setting of a recipe that saves memory and is not set yet, as it is written on the command line."""
    if recipe is None:
        return "a smaller batch_size_per_device, or gradient_checkpointing=true"
    size = recipe.batch_size_per_device
    if size > 1:
        smaller = size // 2 if size % 2 == 0 else 1
        if recipe.global_batch_size is not None:
            return f"batch_size_per_device={smaller} (the global batch stays)"
        steps = (recipe.grad_accumulation_steps or 1) * (size // smaller)
        return f"batch_size_per_device={smaller} grad_accumulation_steps={steps} (the global batch stays)"
    if not recipe.gradient_checkpointing:
        return "gradient_checkpointing=true (slower: layers are computed twice)"
    if recipe.method == "full":
        return "method=lora (full fine-tuning holds gradients and two moments of every weight)"
    if recipe.model.quantize is None:
        return "model.quantize='{bits: 4, group_size: 64}' (QLoRA: the base in 4 bits)"
    if recipe.data.max_seq_len > _SHORTEST_ROWS:
        return f"data.max_seq_len={recipe.data.max_seq_len // 2} (longer rows are cut)"
    return "more ranks, with parallel.dp_shard, parallel.tp or parallel.pp"


def _recipe_of(arguments: argparse.Namespace) -> Recipe | None:
    """The recipe that the command names, by itself or through a run's folder."""
    from trainer.recipe.load import load_recipe

    path = getattr(arguments, "recipe", None) or Path(getattr(arguments, "target", "."), "recipe.yaml")
    try:
        return load_recipe(path, getattr(arguments, "overrides", ()))
    except USER_ERRORS:
        return None
