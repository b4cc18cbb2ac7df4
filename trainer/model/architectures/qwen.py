"""Qwen 2 to 3.6."""

from trainer.model.architectures.table import Architecture

ROWS = {
    "qwen2": Architecture(packs=True),
    "qwen3": Architecture(packs=True),
    "qwen3_moe": Architecture(packs=True),
    "qwen3_next": Architecture(packs=True),
    "qwen3_5": Architecture(packs=True, has_text_class=True),
    "qwen3_5_text": Architecture(packs=True, opened_as="qwen3_5"),
    "qwen3_5_moe": Architecture(packs=True, has_text_class=True),
    "qwen3_5_moe_text": Architecture(opened_as="qwen3_5_moe"),
}
