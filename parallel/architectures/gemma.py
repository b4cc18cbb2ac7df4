"""Gemma 1 to 3. Read from mlx-lm 0.32.2."""

from parallel.architectures.blocks import LLAMA
from parallel.architectures.table import Architecture, plain, softcapped

ROWS = {
    "gemma": Architecture(logits=plain),
    "gemma2": Architecture(logits=softcapped),
    # The text model within it, of type gemma3_text, has the head.
    "gemma3": Architecture(LLAMA, staged=True),
    "gemma3_text": Architecture(LLAMA, plain, staged=True),
}
