"""The model of a recipe as shapes only: built from `config.json`, quantized and adapted, with no weight in memory.

The model's own class is made with lazy parameters that nobody evaluates, and goes through the same steps as
in a run; so counts and bytes are those of the run for every architecture that mlx-lm has.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn

from comm import MeshShape
from parallel.pipeline import check_split, check_stages
from parallel.tensor import check_plan, plan_for
from trainer.files.storage import read_json
from trainer.layers.checkpointing import checkpoint_layers
from trainer.model.architectures import packing_supported
from trainer.model.loading import BaseModel, open_model
from trainer.model.lora import DropoutKeys
from trainer.model.method import prepare_model
from trainer.recipe.config import ModelConfig, Recipe
from trainer.recipe.paths import require_paths

_GROUP_SIZES = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16, "affine": 64}
# Formats of `quantization_config` that name the format only; the bits and mode that MLX gives them.
_NAMED_FORMATS: dict[str, dict[str, Any]] = {
    "mxfp4": {"bits": 4, "mode": "mxfp4"},
    "mxfp8": {"bits": 8, "mode": "mxfp8"},
    "pack-quantized": {"bits": 4, "group_size": 32, "mode": "affine"},
    "mxfp4-pack-quantized": {"bits": 4, "mode": "mxfp4"},
    "nvfp4-pack-quantized": {"bits": 4, "mode": "nvfp4"},
}


@dataclass(frozen=True)
class PlannedModel:
    """A recipe's model, ready to be counted and traced.

    Attributes:
        model: The model with adapters and frozen parameters as in a run; its arrays are lazy and must stay so.
        keys: The holder of its dropout keys.
        is_packed: Whether rows are packed.
        text_config: The part of the config that describes the language model.
        notices: What was assumed.
    """

    model: nn.Module
    keys: DropoutKeys
    is_packed: bool
    text_config: dict[str, Any]
    notices: tuple[str, ...]


def planned_model(recipe: Recipe) -> PlannedModel:
    """The model of a recipe, from its config alone.

    Raises:
        ValueError: The config cannot be read or does not describe a model, or the method does not fit it.
    """
    require_paths(recipe, ("model.path", "lora"))
    config = described(recipe.model)
    text_config = config.get("text_config", config)
    notices = []
    settings = replace(recipe.model, config=config)
    if settings.dtype == "auto":
        settings = replace(settings, dtype="bfloat16")
        notices.append(
            "model.dtype: auto is counted as bfloat16, as on a GPU; a CPU would take float32, and rows in slices"
        )
    base = open_shapes(settings, _vocabulary(recipe.model, text_config), recipe.seed)
    try:
        notices += _quantize(base, recipe.model)
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"The model's quantization cannot be understood: {type(error).__name__}: {error}") from error
    is_packed = recipe.data.packing is not False and packing_supported(base.model) is None
    keys = DropoutKeys()
    prepare_model(recipe, base, keys)
    checkpoint_layers(base.model.layers, recipe.gradient_checkpointing)
    base.model.train()
    return PlannedModel(base.model, keys, is_packed, text_config, tuple(notices))


def check_mesh(recipe: Recipe, mesh: MeshShape) -> None:
    """Refuse a mesh that the model of a recipe cannot be divided over, from its config.

    Raises:
        ValueError: Heads or dimensions that tp does not divide, more stages than layers, an architecture that
            cannot be divided or cut; or as `planned_model`.
    """
    model = planned_model(recipe).model
    if mesh.tp > 1:
        check_plan(model, plan_for(model), mesh.tp)
    if mesh.pp > 1:
        check_stages(model)
        check_split(recipe.parallel.split, len(model.layers), mesh.pp)


def open_shapes(config: ModelConfig, vocab_size: int, seed: int) -> BaseModel:
    """The model that the config describes, not quantized; its arrays are never to be evaluated, no weight is read."""
    values = described(config)
    return open_model(replace(config, path=None, config=values, quantize=None), vocab_size, seed)


def described(config: ModelConfig) -> dict[str, Any]:
    """The model's config, from the recipe or from its files; a copy."""
    if config.config:
        return dict(config.config)
    assert config.path is not None, "a checked recipe has a config or a path"
    return read_config(config.path)


def read_config(path: str) -> dict[str, Any]:
    """`config.json` of a model folder or of a Hugging Face repository, of which nothing else is downloaded."""
    folder = Path(path).expanduser()
    file = folder / "config.json"
    if not folder.exists():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            file = Path(hf_hub_download(path, "config.json"))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"model.path={path!r}: its config.json cannot be read ({reason}). A folder with that one file is enough."
            ) from error
    if not file.is_file():
        raise ValueError(f"model.path={path!r} has no config.json.")
    config = read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold an object.")
    return config


def _vocabulary(model: ModelConfig, text_config: dict[str, Any]) -> int:
    """Size of the vocabulary; a config without one takes it from the tokenizer that is to be built."""
    size = text_config.get("vocab_size") or (model.tokenizer or "").removeprefix("bpe:")
    if not str(size).isdigit():
        raise ValueError("model.config needs vocab_size to be planned without its tokenizer.")
    return int(size)


def _quantize(base: BaseModel, model: ModelConfig) -> list[str]:
    """Quantize lazily: as the checkpoint is stored, then as the recipe asks."""
    notices = []
    stored = _stored_quantization(base.config)
    if isinstance(stored, str):
        notices.append(f"the weights are stored as {stored}, which is counted as if it were not quantized")
    elif stored is not None:
        settings, predicate = stored
        nn.quantize(base.model, **settings, class_predicate=predicate)
        base.config["quantization"] = settings
    if model.quantize is not None:
        from mlx_lm.utils import quantize_model

        # mlx-lm prints what it did.
        with contextlib.redirect_stdout(io.StringIO()):
            group_size, bits = model.quantize.group_size, model.quantize.bits
            base.model, base.config = quantize_model(base.model, base.config, group_size, bits)
    return notices


def _stored_quantization(config: dict[str, Any]) -> tuple[dict[str, Any], Callable] | str | None:
    """Settings and predicate for `nn.quantize`, the name of a format that MLX unpacks, or None."""
    if (mlx_style := config.get("quantization")) is not None:
        chosen = {key: mlx_style[key] for key in ("group_size", "bits", "mode") if key in mlx_style}
        return chosen, lambda path, module: mlx_style.get(path, _divides(module, chosen["group_size"]))
    stored = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    if stored is None:
        return None
    method = stored.get("quant_method", "")
    if method in ("awq", "gptq"):
        settings: dict[str, Any] = {"bits": stored["bits"], "group_size": stored["group_size"]}
    else:
        known = _NAMED_FORMATS.get(stored.get("format", method))
        if known is None:
            return method or "an unknown format"
        settings = known
    settings = {"group_size": _GROUP_SIZES[settings.get("mode", "affine")]} | settings
    skipped = [*stored.get("ignore", []), *(stored.get("modules_to_not_convert") or [])]

    def predicate(path: str, module: nn.Module) -> bool:
        is_linear = _divides(module, settings["group_size"]) and not isinstance(module, nn.Embedding)
        return is_linear and not any(_matches(path, entry) for entry in skipped)

    return settings, predicate


def _divides(module: nn.Module, group_size: int) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0


def _matches(path: str, entry: str) -> bool:
    """Whether an entry of the ignored layers means this module; mlx-lm's stacked experts are one layer each there."""
    path = path.replace(".switch_mlp.", ".experts.0.")
    if entry.startswith("re:"):
        return re.match(entry.removeprefix("re:"), path) is not None
    return path == entry or path.endswith(f".{entry}")
