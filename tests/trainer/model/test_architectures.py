"""Rows of the architecture table against what mlx-lm and transformers say themselves."""

import pytest
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from trainer.model.architectures import ARCHITECTURES, architecture
from trainer.model.loading import open_model
from trainer.recipe.config import ModelConfig

TINY = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
    "num_key_value_heads": 1, "vocab_size": 64, "rms_norm_eps": 1e-6, "linear_num_value_heads": 2,
    "linear_num_key_heads": 1, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2, "tie_word_embeddings": False, "max_position_embeddings": 64, "num_experts": 2,
    "num_experts_per_tok": 1, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 32,
    "moe_intermediate_size": 32, "norm_topk_prob": True, "mlp_only_layers": [],
    "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25, "type": "default", "mrope_section": [1, 1, 0]},
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, row in ARCHITECTURES.items() if row.opened_as])
def test_a_text_only_checkpoint_opens_as_its_family(name: str) -> None:
    """Catches a type of transformers that mlx-lm does not know, or knows as another family's."""
    model = open_model(ModelConfig(path=None, tokenizer="bpe:64", config={"model_type": name, **TINY}), 64, 0).model
    assert type(model).__module__ == f"mlx_lm.models.{ARCHITECTURES[name].opened_as}"


def test_text_classes_are_those_of_transformers() -> None:
    """Catches names of a class with a vision tower in an adapter for one without, or the other way round."""
    both = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() & MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys()
    for name, row in ARCHITECTURES.items():
        assert row.has_text_class == (name in both), name
    assert not architecture("no-such-type").has_text_class
