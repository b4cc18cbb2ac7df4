"""Tiny random models of the architectures under test."""

import importlib

import mlx.core as mx
import mlx.nn as nn

COMMON = dict(
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    vocab_size=64,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    max_position_embeddings=4096,
)
EXPERTS = dict(
    num_experts=4,
    num_experts_per_tok=2,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    norm_topk_prob=True,
)
HYBRID = dict(
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_conv_kernel_dim=4,
    full_attention_interval=2,
    partial_rotary_factor=0.25,
)
KIMI = dict(
    linear_attn_config=dict(num_heads=4, head_dim=8, kda_layers=[1], short_conv_kernel_size=4),
    kv_lora_rank=16,
    q_lora_rank=None,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    mla_use_nope=True,
    num_experts=0,
    moe_intermediate_size=16,
    moe_layer_freq=1,
    first_k_dense_replace=1,
    model_max_length=4096,
)
CONFIGS: dict[str, dict] = {
    "llama": {},
    "mistral": {"module": "llama"},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "gemma3_text": dict(sliding_window=16, sliding_window_pattern=2, query_pre_attn_scalar=8),
    "qwen3_next": {**EXPERTS, **HYBRID},
    "qwen3_5": {"text_config": {**HYBRID, "rope_parameters": None}},
    "qwen3_5_moe": {"text_config": {**HYBRID, **EXPERTS, "rope_parameters": None}},
    "kimi_linear": KIMI,
}


def make(name: str, seed: int = 0, **changes) -> nn.Module:
    """An evaluated model in training mode."""
    changes = {**CONFIGS[name], **changes}
    module = importlib.import_module(f"mlx_lm.models.{changes.pop('module', name)}")
    config = {**COMMON, "model_type": name, **changes}
    if "text_config" in config:
        config["text_config"] = {**COMMON, "model_type": name, **config["text_config"]}
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    # Norm weights of one hide errors in what they multiply; MLX's initial convolutions are so small that norms blow
    # up rounding.
    model.apply(lambda x: x + 0.1 * mx.random.normal(x.shape) if x.ndim == 1 else x)
    model.apply(lambda x: mx.random.normal(x.shape) * 0.5 if x.ndim == 3 and x.shape[-1] == 1 else x)
    model.train()
    mx.eval(model.parameters())
    return model
