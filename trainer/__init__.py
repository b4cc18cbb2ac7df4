"""Drives LoRA and full fine-tuning from YAML recipes: `python -m trainer RECIPE [key=value ...]`.

Nothing is imported here: `--help` and `validate` stay quick, and each verb imports what it needs.
"""

__version__ = "0.1.0"
