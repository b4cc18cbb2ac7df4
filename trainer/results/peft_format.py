"""Adapters in PEFT's layout, for transformers, vLLM and other readers of PEFT folders.

PEFT stores `lora_A` as (rank, inputs) and `lora_B` as (outputs, rank), the transposes of mlx-lm's, under the module
names of the transformers class that holds the model. For most text models these are mlx-lm's; a model with a vision
tower has two classes with different names. Formats: peft/tuners/lora (PEFT 0.21), transformers 5.23.
"""

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from trainer.model.lora import EMBEDDINGS, LoRASpec

PREFIX = "base_model.model."


def module_name(path: str, *, multimodal: bool) -> str:
    """Name in transformers of a module that mlx-lm calls `path`.

    Args:
        path: as `model.layers.0.mlp.up_proj` or, beside a vision tower, `language_model.model.layers.0.mlp.up_proj`.
        multimodal: in the class with the vision tower, where the language model is one part.
    """
    head, found, rest = path.partition("language_model.")
    if not found or rest == "lm_head":
        return rest or head
    rest = rest.removeprefix("model.")
    return f"model.language_model.{rest}" if multimodal else f"model.{rest}"


def adapter_tensors(
    model: nn.Module, spec: LoRASpec, config: dict[str, Any], *, multimodal: bool
) -> list[tuple[str, mx.array]]:
    """The adapters of `model` as PEFT names and lays them out, in PEFT's order (lazy).

    Args:
        model: an mlx-lm model with the adapters of `spec`.
        spec: modules and method.
        config: the base model's `config.json`.
        multimodal: see `module_name`.

    Raises:
        ValueError: an adapter has no counterpart in PEFT; `--to fused` works for every adapter.
    """
    modules = dict(model.named_modules())
    tensors = {}
    for path in spec.paths:
        layer = modules[path]
        is_embedding = isinstance(getattr(layer, "embedding", None), EMBEDDINGS)
        _check_counterpart(path, layer, spec, is_embedding, config)
        name = PREFIX + module_name(path, multimodal=multimodal)
        for leaf, letter in (("lora_a", "A"), ("lora_b", "B")):
            suffix = f"lora_embedding_{letter}" if is_embedding else f"lora_{letter}.weight"
            tensors[f"{name}.{suffix}"] = layer[leaf].T
        if spec.method == "dora":
            tensors[f"{name}.lora_magnitude_vector"] = layer.m
    return sorted(tensors.items())


def adapter_config(
    model: nn.Module, spec: LoRASpec, *, base_model: str | None, multimodal: bool
) -> dict[str, Any]:
    """PEFT's `adapter_config.json`.

    Args:
        model: an mlx-lm model with the adapters of `spec`.
        spec: modules, rank, scale and method.
        base_model: Hugging Face repository or folder of the unquantized base model.
        multimodal: see `module_name`.
    """
    alpha = spec.scale * spec.rank
    return {
        "peft_type": "LORA",
        "task_type": None if multimodal else "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": spec.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": spec.dropout,
        "target_modules": _target_modules(model, spec.paths, multimodal=multimodal),
        "use_dora": spec.method == "dora",
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _check_counterpart(
    path: str, layer: nn.Module, spec: LoRASpec, is_embedding: bool, config: dict[str, Any]
) -> None:
    """Refuse what PEFT would read as something else."""
    if layer.lora_a.ndim == 3:
        raise ValueError(f"{path} adapts experts, which PEFT has in another form; use --to fused.")
    if is_embedding and spec.method == "dora":
        raise ValueError(f"{path}: DoRA on an embedding differs in PEFT; use --to fused.")
    tied = config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", False))
    if is_embedding and tied:
        raise ValueError(f"{path} is tied to the output head, which PEFT would leave unadapted; use --to fused.")


def _target_modules(model: nn.Module, paths: Iterable[str], *, multimodal: bool) -> list[str]:
    """Last names where they select exactly the adapted modules, else full names."""
    adapted = set(paths)
    last_names = {path.rsplit(".", 1)[-1] for path in adapted}
    same_last_name = {path for path, _ in model.named_modules() if path.rsplit(".", 1)[-1] in last_names}
    if multimodal or same_last_name != adapted:  # a vision tower may have modules of the same last name
        return sorted(module_name(path, multimodal=multimodal) for path in adapted)
    return sorted(last_names)
