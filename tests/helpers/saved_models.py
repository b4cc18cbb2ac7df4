"""Tiny random models and a byte tokenizer for tests of what is written and read back."""

import importlib

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "rms_norm_eps": 1e-6,
    "num_hidden_layers": 2,
}
LINEAR_ATTENTION = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
}
CONFIGS: dict[str, dict] = {
    "llama": {**COMMON, "model_type": "llama", "head_dim": 16, "tie_word_embeddings": True, "rope_theta": 10000.0},
    "qwen3": {
        **COMMON,
        "model_type": "qwen3",
        "head_dim": 16,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
    },
    "qwen3_5": {
        "model_type": "qwen3_5",
        "text_config": {
            **COMMON,
            **LINEAR_ATTENTION,
            "model_type": "qwen3_5_text",
            "head_dim": 32,
            "num_hidden_layers": 4,
            "tie_word_embeddings": False,
        },
    },
}
TOKENS = mx.array([[1, 5, 9, 2, 33, 60, 7, 7]])


def make_model(name: str) -> nn.Module:
    """A random model of that architecture in which no parameter is all ones or zeros."""
    architecture = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(0)
    model = architecture.Model(architecture.ModelArgs.from_dict(CONFIGS[name]))
    nudge_parameters(model)
    model.eval()
    return model


def nudge_parameters(model: nn.Module) -> None:
    """Move every trainable parameter a little, as training would."""
    for path, value in tree_flatten(model.trainable_parameters()):
        model.load_weights([(path, value + 0.05 * mx.random.normal(value.shape))], strict=False)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end token: every architecture's own tokenizer class cuts text like this one."""
    alphabet = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_only = Tokenizer(models.BPE({**alphabet, "<end>": len(alphabet)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<end>", pad_token="<end>")
