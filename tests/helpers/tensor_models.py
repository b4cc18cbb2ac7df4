"""Tiny random models of each architecture, and the methods that train them."""

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

BASE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "vocab_size": 128,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "norm_topk_prob": True,
}
LINEAR_ATTENTION = {
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}
GRANITE = {
    "logits_scaling": 4.0,
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_bias": True,
    "mlp_bias": True,
}
LATENT_ATTENTION = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
STATE_SPACE = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_ssm": 128,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "lm_head_multiplier": 1.0,
}
# architecture -> mlx-lm module, changes to BASE
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True, "mlp_bias": True, "attention_bias": True}),
    "mistral": ("llama", {"model_type": "mistral"}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "qwen3_5": ("qwen3_5", LINEAR_ATTENTION),
    "qwen3_5_moe": ("qwen3_5_moe", LINEAR_ATTENTION | EXPERTS),
    "gemma3": ("gemma3", {"sliding_window": 16, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16}),
    "granite": ("granite", GRANITE),
    "phi3": ("phi3", {}),
    "qwen2_moe": ("qwen2_moe", EXPERTS),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "deepseek_v3": ("deepseek_v3", LATENT_ATTENTION),
    "falcon_h1": ("falcon_h1", STATE_SPACE),
}
DIVIDED_BY_LAYER_ONLY = ("deepseek_v3", "falcon_h1")  # FSDP takes them; they have no tensor-parallel plan
NESTED = ("qwen3_5", "qwen3_5_moe", "gemma3")
METHODS = ("full", "lora", "dora", "qlora")


def make_model(architecture: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A lazily built random model; equal on every rank for the same seed."""
    module_name, own = ARCHITECTURES[architecture]
    module = importlib.import_module(f"mlx_lm.models.{module_name}")
    config = {"model_type": architecture, **BASE, **own, **changes}
    if architecture in NESTED:
        text_type = "gemma3_text" if architecture == "gemma3" else architecture
        vocab_size = config["vocab_size"]
        config = {"model_type": architecture, "text_config": {**config, "model_type": text_type}, "vocab_size": vocab_size}
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    return shake(model)


def shake(model: nn.Module) -> nn.Module:
    """Move norms and biases off their even initial values, so that mistakes in them show."""
    changed = []
    for i, (name, array) in enumerate(tree_flatten(model.parameters())):
        if array.ndim == 1:
            changed.append((name, array + 0.1 * mx.random.normal(array.shape, key=mx.random.key(i))))
    model.update(tree_unflatten(changed))
    return model


def prepare(model: nn.Module, method: str, seed: int = 1) -> nn.Module:
    """Make `model` ready for a method, with adapters whose two factors are both random."""
    if method == "full":
        return model
    if method == "qlora":
        nn.quantize(model, group_size=32, bits=4, class_predicate=lambda p, m: hasattr(m, "to_quantized") and "mlp.gate" not in p)
    model.freeze()
    add_adapters(model, dora=method == "dora")
    randomize_adapters(model, seed)
    return model


def add_adapters(model: nn.Module, dora: bool) -> None:
    """LoRA or DoRA layers around every linear of the layers; experts get LoRA."""
    layers = []
    for path, module in model.named_modules():
        if ".layers." not in path or path.endswith(("mlp.gate", "shared_expert_gate")):
            continue
        if isinstance(module, (nn.Linear, nn.QuantizedLinear)):
            layers.append((path, (DoRALinear if dora else LoRALinear).from_base(module, r=4, scale=2.0)))
        elif "switch_mlp." in path and hasattr(module, "num_experts"):
            layers.append((path, LoRASwitchLinear.from_base(module, r=4, scale=2.0)))
    model.update_modules(tree_unflatten(layers))


def randomize_adapters(model: nn.Module, seed: int) -> None:
    """Random values for both factors, so that the gradient of neither is zero."""
    changed = []
    for i, (name, array) in enumerate(tree_flatten(model.trainable_parameters())):
        if name.endswith(("lora_a", "lora_b")):
            key = mx.random.key(seed * 1000 + i)
            changed.append((name, 0.1 * mx.random.normal(array.shape, key=key)))
    model.update(tree_unflatten(changed))


def save_large_model(folder: Path) -> None:
    """A Qwen3 folder of more than 500 MB with constant weights."""
    changes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 6, "num_attention_heads": 16}
    changes |= {"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32000}
    shapes = [(name, array.shape) for name, array in tree_flatten(make_model("qwen3", **changes).parameters())]
    mx.save_safetensors(str(folder / "model.safetensors"), {name: mx.full(shape, 0.01) for name, shape in shapes})
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", **BASE, **changes}))
