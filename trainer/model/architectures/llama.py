"""Llama, and Mistral, which mlx-lm builds as a Llama."""

from trainer.model.architectures.table import Architecture

ROWS = {
    "llama": Architecture(packs=True),
    "llama4": Architecture(has_text_class=True),
    "mistral": Architecture(packs=True),
}
