"""Qwen 2 to 3.6: softmax attention, experts, and from 3.5 on gated delta nets. Read from mlx-lm 0.32.2."""

from parallel.architectures.blocks import EXPERTS, GATED_DELTA_NET, LLAMA, MLP, attention
from parallel.architectures.table import Architecture, ModelPlan, plain

QWEN3_5 = ModelPlan((attention("num_attention_heads", "num_key_value_heads"), GATED_DELTA_NET, MLP, EXPERTS))

ROWS = {
    "qwen2": Architecture(LLAMA, plain, staged=True),
    "qwen2_moe": Architecture(LLAMA, plain),
    "qwen3": Architecture(LLAMA, plain, staged=True),
    "qwen3_moe": Architecture(LLAMA, plain, staged=True),
    "qwen3_next": Architecture(logits=plain),
    "qwen3_5": Architecture(QWEN3_5, plain, staged=True),
    "qwen3_5_text": Architecture(QWEN3_5, plain, staged=True),
    "qwen3_5_moe": Architecture(QWEN3_5, plain, staged=True),
    "qwen3_5_moe_text": Architecture(logits=plain, staged=True),
}
