"""The one table of architectures for training, opening and exporting: a row per `model_type`, a file per family.

How a model is divided over ranks stands in `parallel.architectures`, as research code needs that without the trainer.
A type without a row trains all the same: its rows are not packed, and its layers get those functions of
`trainer.layers` whose names their code calls (`trainer.layers.prepare`), which needs no entry.

To add one, open the family's file (or a new one, joined below) and write its row. For a Llama-like model of the made-up
type "lynx", whose packed rows are exact:

    ROWS = {"lynx": Architecture(packs=True)}

Then its tiny config goes into `tests/helpers/tiny.py`, and the parity tests of packing find the row by themselves.
"""

import mlx.nn as nn

from trainer.model.architectures import gemma, llama, qwen
from trainer.model.architectures.table import Architecture

# model_type, as the model's config and `model.model_type` have it
ARCHITECTURES: dict[str, Architecture] = {**gemma.ROWS, **llama.ROWS, **qwen.ROWS}
_WITHOUT_ROW = Architecture()


def architecture(model_type: str) -> Architecture:
    """The row of a type, or what holds for one without."""
    return ARCHITECTURES.get(model_type, _WITHOUT_ROW)


def packing_supported(model: nn.Module) -> str | None:
    """None where packed rows are proven exact for `model`, else the reason why not, with the architecture's name."""
    model_type = getattr(getattr(model, "language_model", model), "model_type", type(model).__name__)
    if not architecture(model_type).packs:
        proven = ", ".join(sorted(name for name, row in ARCHITECTURES.items() if row.packs))
        return f"packing is not proven exact for {model_type}; it is for {proven}."
    if any(type(module).__name__ == "DynamicNTKScalingRoPE" for module in model.modules()):
        return f"packing is not exact for this {model_type}: its RoPE depends on the length of the row."
    return None
