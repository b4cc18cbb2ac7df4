"""Read LoRA adapters that others wrote: mlx-lm's folders and PEFT's.

PEFT stores `lora_A` as (rank, inputs) and `lora_B` as (outputs, rank); here `lora_a` is (inputs, rank) and `lora_b`
(rank, outputs), so both are transposed. Modules are matched by their path from `layers.` on, which Hugging Face
and mlx-lm share. Formats: mlx_lm/tuner/utils.py (mlx-lm 0.32), peft/tuners/lora/config.py (PEFT 0.19).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

import comm
from trainer.files.storage import read_json
from trainer.files.tensor_files import read_tensor_file
from trainer.model.lora import LoRASpec, is_adapter

PEFT_SUFFIXES = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_embedding_A": "lora_a",
    "lora_embedding_B": "lora_b",
    "lora_magnitude_vector.weight": "m",
    "lora_magnitude_vector": "m",
}
# PEFT options that change what an adapter computes and are not supported here; the value that is harmless.
PEFT_REFUSED: dict[str, Any] = {
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "bias": "none",
    "lora_bias": False,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "fan_in_fan_out": False,
}


@dataclass(frozen=True)
class Adapter:
    """An adapter folder's content.

    Attributes:
        spec: Modules, rank, scale and method; dropout is that of the recipe.
        tensors: Parameter name in the adapted model to initial value (lazy).
    """

    spec: LoRASpec
    tensors: dict[str, mx.array]


def read_adapter(folder: str, model: nn.Module, dropout: float) -> Adapter:
    """Read `lora.init_from`.

    Args:
        folder: Holds `adapter_config.json` and `adapters.safetensors` (mlx-lm) or `adapter_model.safetensors` (PEFT).
        model: The base model, without adapters.
        dropout: The recipe's probability of dropping an input.

    Raises:
        ValueError: The folder is neither kind, or does not fit the model.
    """
    path = Path(folder)
    if not (path / "adapter_config.json").is_file():
        raise ValueError(f"lora.init_from={folder!r} has no adapter_config.json; give an mlx-lm or PEFT adapter folder.")
    config = read_json(path / "adapter_config.json")
    if not isinstance(config, dict):
        raise ValueError(f"lora.init_from={folder!r}: adapter_config.json must hold an object.")
    modules = dict(model.named_modules())
    if (path / "adapters.safetensors").is_file():
        adapter = _from_mlx_lm(folder, config, read_tensor_file(path / "adapters.safetensors"), dropout)
        _require_all_modules(folder, config, adapter, model)
    elif (path / "adapter_model.safetensors").is_file():
        stored = read_tensor_file(path / "adapter_model.safetensors")
        adapter = _from_peft(folder, config, stored, modules, dropout)
    else:
        raise ValueError(f"lora.init_from={folder!r} has neither adapters.safetensors nor adapter_model.safetensors.")
    missing = [p for p in adapter.spec.paths if p not in modules]
    if missing:
        raise ValueError(f"lora.init_from={folder!r} adapts {missing[0]!r}, which this model does not have.")
    return adapter


def load_into(model: nn.Module, adapter: Adapter) -> None:
    """Overwrite the adapters of `model` (attached with `adapter.spec`) by the stored values.

    Raises:
        ValueError: Tensors are missing, unexpected or of another shape, or hold numbers that are not finite; names all.
    """
    own = {n: p for n, p in comm.named_arrays(model.parameters()) if is_adapter(n)}
    shapes = {name: list(value.shape) for name, value in adapter.tensors.items()}
    if wrong := misfits(shapes, {name: list(value.shape) for name, value in own.items()}, own):
        raise ValueError(f"lora.init_from does not fit this model: {wrong}.")
    if broken := not_finite(adapter.tensors.items()):
        raise ValueError(f"lora.init_from holds numbers that are not finite: {', '.join(broken)}.")
    model.update(tree_unflatten([(n, v.astype(own[n].dtype)) for n, v in adapter.tensors.items()]))


def misfits(
    shapes: Mapping[str, list[int]], expected: Mapping[str, list[int]], required: Iterable[str]
) -> str:
    """What keeps stored tensors from being a model's, in words; empty where all fit.

    Args:
        shapes: Name to shape of what is stored.
        expected: Name to shape of what the model can take.
        required: Names without which the model would keep values that nobody trained.
    """
    lists = {
        "missing": sorted(set(required) - shapes.keys()),
        "unexpected": sorted(shapes.keys() - expected.keys()),
        "of another shape": [
            f"{name} {tuple(shapes[name])} (the model needs {tuple(expected[name])})"
            for name in sorted(shapes.keys() & expected.keys())
            if list(shapes[name]) != list(expected[name])
        ],
    }
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in lists.items() if names)


def not_finite(tensors: Iterable[tuple[str, mx.array]]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity."""
    return [name for name, value in tensors if not mx.isfinite(value).all().item()]


def _number(folder: str, settings: Any, key: str, kind: type) -> Any:
    """A positive number of an adapter's settings."""
    value: Any = settings.get(key) if isinstance(settings, dict) else None
    is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not is_number or not 0 < value < float("inf"):
        what = "whole number" if kind is int else "number"
        raise ValueError(f"lora.init_from={folder!r}: adapter_config.json says {key}={value!r}; it must be a {what} above 0.")
    return kind(value)


def _from_mlx_lm(folder: str, config: dict[str, Any], tensors: dict[str, mx.array], dropout: float) -> Adapter:
    parameters = config.get("lora_parameters")
    rank, scale = _number(folder, parameters, "rank", int), _number(folder, parameters, "scale", float)
    paths = tuple(sorted({name.rsplit(".", 1)[0] for name in tensors if is_adapter(name)}))
    spec = LoRASpec(paths, rank, scale, dropout, config.get("fine_tune_type", "lora"))
    return Adapter(spec, tensors)


def _require_all_modules(folder: str, config: dict[str, Any], adapter: Adapter, model: nn.Module) -> None:
    """Refuse mlx-lm's adapters without a module that their config names: it would silently stay the base model's.

    mlx-lm's `linear_to_lora_layers` adapts the modules of `lora_parameters.keys` in the last `num_layers` layers, and
    those whose full names are keys, which is how a run's own config names them.
    """
    keys, num_layers = config["lora_parameters"].get("keys"), config.get("num_layers")
    if not isinstance(num_layers, int | None) or isinstance(num_layers, bool):
        raise ValueError(
            f"lora.init_from={folder!r}: adapter_config.json says num_layers={num_layers!r}; it must be a whole number."
        )
    if keys is None:
        return
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError(
            f"lora.init_from={folder!r}: adapter_config.json says keys={keys!r}; it must be a list of modules' names."
        )
    layers = [] if num_layers is None else model.layers[-max(num_layers, 0) :]  # 0 and below are all, as in mlx-lm
    paths = {id(module): path for path, module in model.named_modules()}
    expected = {f"{paths[id(layer)]}.{key}" for layer in layers for key, _ in layer.named_modules() if key in keys}
    expected |= set(keys) & set(paths.values())
    if missing := sorted(expected - set(adapter.spec.paths)):
        raise ValueError(
            f"lora.init_from={folder!r}: adapters.safetensors has no tensors for {missing[0]} ({len(missing)} of "
            f"{len(expected)} modules of its adapter_config.json are missing)."
        )


def _from_peft(
    folder: str, config: dict[str, Any], stored: dict[str, mx.array], modules: dict[str, nn.Module], dropout: float
) -> Adapter:
    for key, harmless in PEFT_REFUSED.items():
        if config.get(key, harmless) not in (harmless, None):
            raise ValueError(f"lora.init_from={folder!r}: PEFT's {key}={config[key]!r} is not supported.")
    by_ending = {_from_layers(path): path for path in modules}
    tensors = {}
    for name, value in stored.items():
        module, slot = _split_peft_name(folder, name)
        path = by_ending.get(_from_layers(module))
        if path is None:
            raise ValueError(f"lora.init_from={folder!r}: {name} adapts a module that this model does not have.")
        tensors[f"{path}.{slot}"] = value.T if slot != "m" else value.reshape(-1)
    rank, alpha = _number(folder, config, "r", int), _number(folder, config, "lora_alpha", float)
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    paths = tuple(sorted({name.rsplit(".", 1)[0] for name in tensors}))
    return Adapter(LoRASpec(paths, rank, scale, dropout, "dora" if config.get("use_dora") else "lora"), tensors)


def _split_peft_name(folder: str, name: str) -> tuple[str, str]:
    for suffix, slot in PEFT_SUFFIXES.items():
        if name.endswith(f".{suffix}"):
            return name.removesuffix(f".{suffix}").removeprefix("base_model.model."), slot
    raise ValueError(f"lora.init_from={folder!r}: {name!r} is no LoRA tensor.")


def _from_layers(path: str) -> str:
    """The part of a module path that Hugging Face and mlx-lm share: `layers.3.mlp.up_proj`, or the last name."""
    head, found, rest = path.partition("layers.")
    return f"layers.{rest}" if found else path.rsplit(".", 1)[-1]
