"""Tiny models for the memory plan: dense, with recurrent layers, with experts."""

from trainer.model.shapes import PlannedModel, planned_model
from trainer.recipe.config import Recipe
from trainer.recipe.load import recipe_from

QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_theta": 1e4,
}
HYBRID = QWEN3 | {
    "model_type": "qwen3_5_text",
    "tie_word_embeddings": False,
    "linear_num_value_heads": 8,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
}
MOE = QWEN3 | {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
CONFIGS = {"qwen3": QWEN3, "hybrid": {"model_type": "qwen3_5", "text_config": HYBRID}, "moe": MOE}


def make(config: dict, **changes) -> tuple[Recipe, PlannedModel]:
    """A recipe for the config, in float32 over synthetic rows, and its planned model."""
    values = {
        "model": {"config": config, "tokenizer": "bpe:96", "dtype": "float32"},
        "data": {"train": "synthetic:sql", "max_seq_len": 32},
    }
    recipe = recipe_from(values | changes)
    return recipe, planned_model(recipe)
