"""Gemma 3."""

from trainer.model.architectures.table import Architecture

ROWS = {"gemma3_text": Architecture(packs=True)}
