"""Llama and what is built like it. Read from mlx-lm 0.32.2."""

from parallel.architectures.blocks import LLAMA
from parallel.architectures.table import Architecture, divided, plain, scaled

ROWS = {
    "cohere": Architecture(logits=scaled),
    "cohere2": Architecture(logits=scaled),
    "granite": Architecture(LLAMA, divided),
    "llama": Architecture(LLAMA, plain, staged=True),
    "mistral": Architecture(LLAMA, plain, staged=True),
    "mixtral": Architecture(logits=plain),
    "olmo2": Architecture(logits=plain),
    "smollm3": Architecture(LLAMA, plain),
}
