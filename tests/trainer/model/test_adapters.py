"""Adapter folders of mlx-lm and PEFT, written here tensor by tensor, and what they become in a model."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from tiny import make
from trainer.model.adapters import PEFT_REFUSED, load_into, misfits, read_adapter
from trainer.model.lora import DropoutKeys, attach

UP = "model.layers.1.mlp.up_proj"
PEFT = {"r": 4, "lora_alpha": 8}
MLX_LM = {"lora_parameters": {"rank": 4, "scale": 5.0}}
A, B = mx.arange(32 * 4).reshape(32, 4) / 100, mx.arange(4 * 48).reshape(4, 48) / 100  # (inputs, rank), (rank, outputs)

# Values with which PEFT computes something else.
HARMFUL: dict[str, Any] = {
    "rank_pattern": {"up_proj": 2},
    "alpha_pattern": {"up_proj": 2},
    "modules_to_save": ["lm_head"],
    "bias": "all",
    "lora_bias": True,
    "layer_replication": [[0, 1]],
    "target_parameters": ["w"],
    "trainable_token_indices": [3],
    "use_qalora": True,
    "alora_invocation_tokens": [1],
    "fan_in_fan_out": True,
}


def peft_tensors(module: str = UP) -> dict[str, mx.array]:
    return {f"base_model.model.{module}.lora_A.weight": A.T, f"base_model.model.{module}.lora_B.weight": B.T}


def mlx_lm_tensors(module: str = UP) -> dict[str, mx.array]:
    return {f"{module}.lora_a": A, f"{module}.lora_b": B}


def folder_of(folder: Path, config: Any, peft: dict | None = None, mlx_lm: dict | None = None) -> str:
    """An adapter folder with the tensors of one kind."""
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for name, tensors in (("adapter_model", peft), ("adapters", mlx_lm)):
        if tensors is not None:
            mx.save_safetensors(str(folder / f"{name}.safetensors"), tensors)
    return str(folder)


def adapted(folder: str, model: nn.Module) -> nn.Module:
    """`model` with the adapters of `folder`."""
    adapter = read_adapter(folder, model, 0.0)
    attach(model, adapter.spec, DropoutKeys(), seed=0)
    load_into(model, adapter)
    return model


@pytest.mark.parametrize("kind", ["peft", "mlx_lm"])
def test_both_kinds_add_the_same_product(kind: str, tmp_path: Path) -> None:
    """Catches a missing transpose, and a scale of alpha where it is alpha / rank."""
    config = PEFT if kind == "peft" else {"lora_parameters": {"rank": 4, "scale": 2}}
    folder = folder_of(tmp_path, config, **{kind: {"peft": peft_tensors, "mlx_lm": mlx_lm_tensors}[kind]()})
    plain, x = make("llama"), mx.random.normal((2, 32), key=mx.random.key(0))
    model = adapted(folder, make("llama"))
    expected = plain.layers[1].mlp.up_proj(x) + 2.0 * (x @ A) @ B
    assert mx.allclose(model.layers[1].mlp.up_proj(x), expected, rtol=1e-5, atol=1e-4)
    assert mx.array_equal(model.layers[0].mlp.up_proj(x), plain.layers[0].mlp.up_proj(x)), "only one module is adapted"


@pytest.mark.parametrize(
    ("config", "scale", "method"),
    [
        ({}, 2.0, "lora"),
        ({"use_rslora": True}, 4.0, "lora"),
        ({"use_dora": True}, 2.0, "dora"),
        ({"lora_alpha": 6.0}, 1.5, "lora"),
        (dict(PEFT_REFUSED), 2.0, "lora"),
        ({key: None for key in PEFT_REFUSED}, 2.0, "lora"),
    ],
)
def test_what_peft_settings_mean(config: dict, scale: float, method: str, tmp_path: Path) -> None:
    """Catches rank-stabilised scales taken for plain ones, DoRA taken for LoRA, and refusals of harmless values."""
    folder = folder_of(tmp_path, PEFT | config, peft_tensors())
    spec = read_adapter(folder, make("llama"), 0.25).spec
    assert (spec.paths, spec.rank, spec.scale, spec.dropout, spec.method) == ((UP,), 4, scale, 0.25, method)


@pytest.mark.parametrize("key", sorted(HARMFUL.keys() | PEFT_REFUSED.keys()))
def test_peft_settings_that_change_the_result_are_refused(key: str, tmp_path: Path) -> None:
    """Catches an adapter that is loaded as something else than it was trained as."""
    with pytest.raises(ValueError, match=f"PEFT's {key}="):
        read_adapter(folder_of(tmp_path, PEFT | {key: HARMFUL[key]}, peft_tensors()), make("llama"), 0.0)


@pytest.mark.parametrize("magnitude", ["lora_magnitude_vector.weight", "lora_magnitude_vector"])
def test_dora_magnitudes_become_vectors(magnitude: str, tmp_path: Path) -> None:
    """Catches magnitudes that are transposed, left as a column, or lost."""
    m = mx.arange(48) + 1.0
    tensors = {**peft_tensors(), f"base_model.model.{UP}.{magnitude}": m.reshape(-1, 1)}
    folder = folder_of(tmp_path, PEFT | {"use_dora": True}, tensors)
    assert mx.array_equal(adapted(folder, make("llama")).layers[1].mlp.up_proj.m, m)


def test_embeddings_of_peft(tmp_path: Path) -> None:
    """Catches embedding adapters, whose names lack `.weight`, under the wrong name or turned the wrong way."""
    a, b = mx.random.normal((64, 4)), mx.random.normal((4, 32))
    module = "base_model.model.model.embed_tokens"
    folder = folder_of(tmp_path, PEFT, {f"{module}.lora_embedding_A": a.T, f"{module}.lora_embedding_B": b.T})
    plain, tokens = make("llama"), mx.array([3, 8])
    expected = plain.model.embed_tokens(tokens) + 2.0 * a[tokens] @ b
    assert mx.allclose(adapted(folder, make("llama")).model.embed_tokens(tokens), expected, atol=1e-5)


@pytest.mark.parametrize("prefix", ["base_model.model.model.", "base_model.model.model.language_model.", "model."])
def test_prefixes_of_other_classes_are_the_same_module(prefix: str, tmp_path: Path) -> None:
    """Catches an adapter of a multimodal class, or of a bare model, that finds no module by its path."""
    inside = "layers.1.mlp.up_proj"
    tensors = {f"{prefix}{inside}.lora_A.weight": A.T, f"{prefix}{inside}.lora_B.weight": B.T}
    adapter = read_adapter(folder_of(tmp_path, PEFT, tensors), make("qwen3_5"), 0.0)
    assert adapter.tensors.keys() == {f"language_model.model.{inside}.lora_a", f"language_model.model.{inside}.lora_b"}


def test_mlx_lm_settings(tmp_path: Path) -> None:
    """Catches a scale divided by the rank, and the method of a DoRA folder lost."""
    config = MLX_LM | {"fine_tune_type": "dora"}
    spec = read_adapter(folder_of(tmp_path, config, mlx_lm=mlx_lm_tensors()), make("llama"), 0.5).spec
    assert (spec.paths, spec.rank, spec.scale, spec.dropout, spec.method) == ((UP,), 4, 5.0, 0.5, "dora")


@pytest.mark.parametrize(
    ("config", "files", "words"),
    [
        ([1], {"mlx_lm": mlx_lm_tensors()}, "must hold an object"),
        (MLX_LM, {}, r"has neither adapters\.safetensors nor adapter_model\.safetensors"),
        ({}, {"mlx_lm": mlx_lm_tensors()}, "rank=None; it must be a whole number above 0"),
        ({"lora_parameters": {"rank": 0, "scale": 1}}, {"mlx_lm": mlx_lm_tensors()}, "rank=0"),
        ({"lora_parameters": {"rank": 4, "scale": True}}, {"mlx_lm": mlx_lm_tensors()}, "scale=True; it must be a number"),
        (PEFT | {"r": 4.0}, {"peft": peft_tensors()}, r"r=4\.0; it must be a whole number"),
        (PEFT | {"lora_alpha": float("inf")}, {"peft": peft_tensors()}, "lora_alpha=inf"),
        (MLX_LM, {"mlx_lm": mlx_lm_tensors("model.layers.7.mlp.up_proj")}, r"adapts 'model\.layers\.7\.mlp\.up_proj'"),
        (PEFT, {"peft": peft_tensors("model.layers.7.mlp.up_proj")}, "adapts a module that this model does not have"),
        (PEFT, {"peft": {"base_model.model.lm_head.weight": A}}, r"'base_model\.model\.lm_head\.weight' is no LoRA tensor"),
    ],
)
def test_folders_that_are_no_adapter(config: Any, files: dict, words: str, tmp_path: Path) -> None:
    """Catches a traceback, or a run from other values than asked for."""
    with pytest.raises(ValueError, match=words):
        read_adapter(folder_of(tmp_path, config, **files), make("llama"), 0.0)


def test_a_folder_without_settings(tmp_path: Path) -> None:
    """Catches a missing file told as an error of the system."""
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        read_adapter(str(tmp_path), make("llama"), 0.0)


def test_values_of_other_shapes_are_refused(tmp_path: Path) -> None:
    """Catches values of another rank, and a half of an adapter left at its random start."""
    tensors = {**mlx_lm_tensors(), "model.layers.0.mlp.up_proj.lora_a": A[:, :2]}
    with pytest.raises(ValueError) as error:
        adapted(folder_of(tmp_path, MLX_LM, mlx_lm=tensors), make("llama"))
    for words in (
        "missing: model.layers.0.mlp.up_proj.lora_b",
        "of another shape: model.layers.0.mlp.up_proj.lora_a (32, 2) (the model needs (32, 4))",
    ):
        assert words in str(error.value)


def test_values_take_the_dtype_of_the_model(tmp_path: Path) -> None:
    """Catches float32 adapters in a bfloat16 model, which would widen every activation behind them."""
    model = make("llama")
    model.set_dtype(mx.bfloat16)
    adapted(folder_of(tmp_path, MLX_LM, mlx_lm=mlx_lm_tensors()), model)
    assert {x.dtype for _, x in tree_flatten(model.parameters())} == {mx.bfloat16}


def test_misfits_in_words() -> None:
    """Catches a report that stops at the first difference, and one of what may be left out."""
    shapes = {"a": [2], "b": [3], "d": [1]}
    assert misfits(shapes, {"a": [2], "b": [4], "c": [5], "e": [6]}, ["a", "c"]) == (
        "missing: c; unexpected: d; of another shape: b (3,) (the model needs (4,))"
    )
    assert misfits({"a": [2]}, {"a": (2,), "e": [6]}, ["a"]) == ""


def test_a_module_of_the_config_without_tensors_is_named(tmp_path: Path) -> None:
    """Catches a torn adapter of mlx-lm: a module without tensors would silently stay the base model's."""
    named = {"lora_parameters": MLX_LM["lora_parameters"] | {"keys": ["mlp.up_proj"]}}
    folder = folder_of(tmp_path, named | {"num_layers": 2}, mlx_lm=mlx_lm_tensors())
    with pytest.raises(ValueError, match=r"no tensors for model\.layers\.0\.mlp\.up_proj \(1 of 2 modules"):
        read_adapter(folder, make("llama"), 0.0)
    with pytest.raises(ValueError, match=r"no tensors for model\.layers\.0"):
        read_adapter(folder_of(tmp_path, named | {"num_layers": -1}, mlx_lm=mlx_lm_tensors()), make("llama"), 0.0)
    for config in (named | {"num_layers": 1}, named, MLX_LM | {"num_layers": 2}):
        assert read_adapter(folder_of(tmp_path, config, mlx_lm=mlx_lm_tensors()), make("llama"), 0.0).spec.paths == (UP,)


def test_a_module_that_the_config_names_in_full_without_tensors_is_named(tmp_path: Path) -> None:
    """Catches a run's own adapter that lost a module, as such configs name modules in full and not inside a layer."""
    named = {"num_layers": -1, "lora_parameters": MLX_LM["lora_parameters"] | {"keys": [UP, UP.replace("1", "0")]}}
    folder = folder_of(tmp_path, named, mlx_lm=mlx_lm_tensors())
    with pytest.raises(ValueError, match=r"no tensors for model\.layers\.0\.mlp\.up_proj \(1 of 2 modules"):
        read_adapter(folder, make("llama"), 0.0)
    named["lora_parameters"] |= {"keys": [UP]}
    assert read_adapter(folder_of(tmp_path, named, mlx_lm=mlx_lm_tensors()), make("llama"), 0.0).spec.paths == (UP,)


@pytest.mark.parametrize("key, value", [("num_layers", "two"), ("num_layers", True), ("keys", UP), ("keys", [1])])
def test_modules_of_another_type_are_named(tmp_path: Path, key: str, value: Any) -> None:
    """Catches a config whose modules cannot be told, and which is believed without a look at them."""
    parameters = MLX_LM["lora_parameters"] | ({"keys": value} if key == "keys" else {})
    config = {"lora_parameters": parameters} | ({"num_layers": value} if key == "num_layers" else {})
    with pytest.raises(ValueError, match=f"adapter_config.json says {key}="):
        read_adapter(folder_of(tmp_path, config, mlx_lm=mlx_lm_tensors()), make("llama"), 0.0)


def test_numbers_that_are_not_finite_are_named(tmp_path: Path) -> None:
    """Catches training that starts from a NaN, in which every step is then skipped."""
    tensors = mlx_lm_tensors() | {f"{UP}.lora_b": B * float("nan")}
    with pytest.raises(ValueError, match=r"not finite: model\.layers\.1\.mlp\.up_proj\.lora_b\.$"):
        adapted(folder_of(tmp_path, MLX_LM, mlx_lm=tensors), make("llama"))
