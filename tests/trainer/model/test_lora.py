"""Which modules `lora.targets` means, what adapters start from, and whose dropout masks are whose."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

from tiny import make
from trainer.model.lora import (
    DropoutKeys,
    LoRASpec,
    RowDropout,
    attach,
    find_targets,
    is_adapter,
    limits_on_experts,
)

ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
LINEAR_ATTENTION = {f"linear_attn.{name}" for name in ("in_proj_qkvz", "in_proj_ba", "out_proj")}
SPLIT_LINEAR_ATTENTION = {f"linear_attn.in_proj_{name}" for name in ("qkv", "z", "a", "b")} | {"linear_attn.out_proj"}
MLP = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
EXPERTS = {f"mlp.switch_mlp.{name}_proj" for name in ("gate", "up", "down")}
SHARED_EXPERT = {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}


def in_layer(paths: tuple[str, ...], layer: int) -> set[str]:
    """The targets of one layer, by their path inside it."""
    mark = f"layers.{layer}."
    return {path.partition(mark)[2] for path in paths if mark in path}


def spec(paths: tuple[str, ...], method: str = "lora", dropout: float = 0.0) -> LoRASpec:
    return LoRASpec(paths, rank=4, scale=2.0, dropout=dropout, method=method)


@pytest.mark.parametrize(
    ("architecture", "method", "layers"),
    [
        ("llama", "lora", [ATTENTION | MLP, ATTENTION | MLP]),
        ("llama", "dora", [ATTENTION | MLP, ATTENTION | MLP]),
        ("qwen3_5", "lora", [SPLIT_LINEAR_ATTENTION | MLP, ATTENTION | MLP]),
        ("qwen3_moe", "lora", [ATTENTION | EXPERTS, ATTENTION | EXPERTS]),
        ("qwen3_moe", "dora", [ATTENTION, ATTENTION]),
        ("qwen3_next", "lora", [LINEAR_ATTENTION | EXPERTS | SHARED_EXPERT, ATTENTION | EXPERTS | SHARED_EXPERT]),
    ],
)
def test_all_linear(architecture: str, method: str, layers: list[set[str]]) -> None:
    """Catches adapters on routers, gates, heads and embeddings, DoRA on experts, and kinds of layers left out."""
    paths = find_targets(make(architecture), "all-linear", "all", method)
    assert [in_layer(paths, layer) for layer in range(2)] == layers
    assert len(paths) == len(set(paths)) == sum(map(len, layers)), "nothing outside of the layers"


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        (["self_attn.v_proj"], {"model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"}),
        (["model.layers.1.mlp.up_proj"], {"model.layers.1.mlp.up_proj"}),
        (["lm_head", "embed_tokens"], {"lm_head", "model.embed_tokens"}),
        (["1.mlp.down_proj", "lm_head"], {"model.layers.1.mlp.down_proj", "lm_head"}),
    ],
)
def test_names_are_endings_of_paths(targets: str | list[str], expected: set[str]) -> None:
    """Catches names that match in the middle of a word or of a path, and heads that cannot be named."""
    assert set(find_targets(make("llama"), targets, "all", "lora")) == expected


def test_routers_only_by_name() -> None:
    """Catches a gate that nobody can adapt, though it is asked for, and one that is taken for it by its last letters."""
    paths = find_targets(make("qwen3_next"), ["gate"], "all", "lora")
    assert set(paths) == {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}


@pytest.mark.parametrize(("num_layers", "layers"), [("all", {0, 1}), (2, {0, 1}), (1, {1}), ("1", {1}), (9, {0, 1})])
def test_last_layers(num_layers: str | int, layers: set[int]) -> None:
    """Catches the first layers taken for the last, a number as text, and a head that counts as a layer."""
    model = make("llama")
    paths = find_targets(model, ["q_proj", "lm_head"], num_layers, "lora")
    assert set(paths) == {f"model.layers.{layer}.self_attn.q_proj" for layer in layers} | {"lm_head"}
    assert {layer for layer in range(2) if in_layer(find_targets(model, "all-linear", num_layers, "lora"), layer)} == layers


@pytest.mark.parametrize(
    ("architecture", "targets", "num_layers", "method", "words"),
    [
        ("llama", ["q_prj"], "all", "lora", r"\['q_prj'\] match no module; .*Did you mean 'q_proj'\?"),
        ("llama", ["proj"], "all", "lora", r"\['proj'\] match no module"),
        ("llama", ["q_proj", "norm"], "all", "lora", r"\['norm'\] match no module"),
        ("llama", ["layers.0.self_attn.q_proj"], 1, "lora", "with lora.num_layers=1 selects no module"),
        ("llama", "all-linear", 0, "lora", "with lora.num_layers=0 selects no module"),
        ("qwen3_moe", ["up_proj"], "all", "dora", r"DoRA is not defined for expert layers \(.*switch_mlp.up_proj\)"),
    ],
)
def test_targets_that_mean_nothing(
    architecture: str, targets: str | list[str], num_layers: str | int, method: str, words: str
) -> None:
    """Catches a run that trains nothing, or less than was asked for, without a word."""
    with pytest.raises(ValueError, match=words):
        find_targets(make(architecture), targets, num_layers, method)


def test_quantized_modules_are_targets_too() -> None:
    """Catches QLoRA without adapters: a quantized linear layer is no `nn.Linear`."""
    plain, quantized = make("qwen3_moe"), make("qwen3_moe")
    nn.quantize(quantized, 32, 4, class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] == 32)
    found = find_targets(quantized, "all-linear", "all", "lora")
    assert found == find_targets(plain, "all-linear", "all", "lora")
    kinds = {type(dict(quantized.named_modules())[path]).__name__ for path in found}
    assert kinds >= {"QuantizedLinear", "QuantizedSwitchLinear"}
    assert set(find_targets(quantized, ["embed_tokens"], "all", "lora")) == {"model.embed_tokens"}


def test_fresh_adapters_change_nothing() -> None:
    """Catches adapters of another kind than the module, values that are not zero in sum, and unfrozen weights."""
    plain, model, tokens = make("qwen3_moe"), make("qwen3_moe"), mx.array([[5, 9, 2]])
    model.freeze()
    paths = find_targets(model, ["q_proj", "up_proj", "embed_tokens"], "all", "lora")
    attach(model, spec(paths), DropoutKeys(), seed=3)
    assert mx.allclose(model(tokens), plain(tokens), atol=1e-6)
    assert all(is_adapter(name) for name, _ in tree_flatten(model.trainable_parameters()))
    kinds = {type(module) for path, module in model.named_modules() if path in paths}
    assert kinds == {LoRALinear, LoRASwitchLinear, LoRAEmbedding}


def test_fresh_dora_keeps_the_outputs() -> None:
    """Catches magnitudes that are not those of the base weights."""
    plain, model, tokens = make("llama"), make("llama"), mx.array([[5, 9, 2]])
    model.freeze()
    attach(model, spec(find_targets(model, "all-linear", "all", "dora"), "dora"), DropoutKeys(), seed=3)
    assert isinstance(model.layers[0].self_attn.q_proj, DoRALinear)
    assert mx.allclose(model(tokens), plain(tokens), atol=1e-5)


def test_initial_values_depend_on_seed_and_path_only() -> None:
    """Catches a stage, or a smaller choice of modules, that starts from other values; and equal ones in two layers."""

    def initial(targets: list[str], seed: int) -> dict[str, mx.array]:
        model = make("llama")
        model.freeze()
        attach(model, spec(find_targets(model, targets, "all", "lora")), DropoutKeys(), seed)
        return dict(tree_flatten(model.trainable_parameters()))

    name = "model.layers.{}.self_attn.q_proj.lora_a"
    both, alone = initial(["q_proj", "up_proj"], 3), initial(["q_proj"], 3)
    assert all(mx.array_equal(both[key], value) for key, value in alone.items())
    assert not mx.array_equal(alone[name.format(0)], alone[name.format(1)])
    assert not mx.array_equal(alone[name.format(0)], initial(["q_proj"], 4)[name.format(0)])
    bound = 32**-0.5
    a = alone[name.format(0)]
    assert bound * 0.8 < mx.abs(a).max().item() <= bound, "uniform in +-1/sqrt(inputs)"
    assert all(not mx.any(value) for key, value in alone.items() if key.endswith("lora_b"))


def test_masks_belong_to_rows_and_layers() -> None:
    """Catches masks that depend on the batch a row stands in, and layers or rows that share one."""
    keys = DropoutKeys()
    rows = mx.array([[1, 2], [3, 4], [5, 6]], dtype=mx.uint32)
    layer, other = RowDropout(0.5, keys, "a"), RowDropout(0.5, keys, "b")
    keys.current = rows
    whole = layer.mask((3, 5, 40))
    assert not mx.array_equal(whole, other.mask((3, 5, 40)))
    assert not mx.array_equal(whole[0], whole[1])
    keys.current = rows[1:]
    assert mx.array_equal(layer.mask((2, 5, 40)), whole[1:])


def test_kept_inputs_are_scaled() -> None:
    """Catches a wrong probability, a sum that shrinks, another dtype, and dropout in evaluation."""
    keys = DropoutKeys()
    layer, x = RowDropout(0.25, keys, "a"), mx.ones((2, 100, 100), dtype=mx.bfloat16)
    assert layer.eval()(x) is x and RowDropout(0.0, keys, "a")(x) is x, "no keys are needed"
    keys.current = mx.array([[1, 2], [3, 4]], dtype=mx.uint32)
    out = layer.train()(x)
    assert out.dtype == mx.bfloat16
    kept = np.array((out != 0).astype(mx.float32)).mean()
    assert abs(kept - 0.75) < 0.02
    assert set(np.unique(np.array(out.astype(mx.float32)))) == {0.0, float(mx.array(4 / 3, mx.bfloat16))}


def test_limits_on_experts_are_said() -> None:
    """Catches a dropout, or a method, that silently does not reach the experts."""
    model = make("qwen3_moe")
    assert limits_on_experts(model, spec((), "lora", 0.1)) == []
    assert "dora leaves the 6 expert layers" in limits_on_experts(model, spec((), "dora"))[0]
    wanted = spec(find_targets(model, "all-linear", "all", "lora"), dropout=0.1)
    attach(model, wanted, DropoutKeys(), seed=0)
    assert limits_on_experts(model, wanted) == ["lora.dropout=0.1 is not applied inside the 6 adapted expert layers"]
    assert limits_on_experts(model, spec(wanted.paths)) == [], "no dropout, nothing to say"
    assert limits_on_experts(make("llama"), spec((), "dora", 0.1)) == []
