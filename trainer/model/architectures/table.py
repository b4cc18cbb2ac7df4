"""What training, opening and exporting know of one architecture, as data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """One row: an architecture by its `model_type`; the defaults are those of a type without a row.

    Attributes:
        packs: Losses and all gradients of packed rows are shown equal to those of separate rows
            (`tests/trainer/layers/test_packed_rows.py`); others are refused.
        opened_as: The type under which mlx-lm knows it, where that is another: text-only checkpoints of transformers are
            known under the whole family's name. Default: its own.
        has_text_class: It has a vision tower, and `AutoModelForCausalLM` of transformers builds its language model alone,
            under which names PEFT finds the modules. Default: with a tower, PEFT gets the names of the whole class.
    """

    packs: bool = False
    opened_as: str | None = None
    has_text_class: bool = False
