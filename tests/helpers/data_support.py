"""Small tokenizers and configurations for the data tests."""

import json
from pathlib import Path
from types import SimpleNamespace

from trainer.data import build_tokenizer

TEXTS = ["the quick brown fox jumps over the lazy dog", "Q: what is it? A: SELECT name FROM staff WHERE age > 30"]


def small_tokenizer(special_tokens: tuple[str, ...] = (), chat_template: str | None = None):
    """A tokenizer of 300 entries and these added special tokens."""
    tokenizer = build_tokenizer(TEXTS, 300)
    if special_tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special_tokens)})
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def config(**changes) -> SimpleNamespace:
    """The `data:` part of a recipe."""
    values = {
        "train": "synthetic:sql", "valid": None, "val_fraction": 0.0, "format": "auto", "max_seq_len": 64,
        "packing": "auto", "group_by_length": True, "loss_on": "auto", "shuffle": True, "on_bad_row": "stop",
    }
    return SimpleNamespace(**values | changes)


def write_rows(path: Path, rows: list) -> Path:
    """A .jsonl file; a row that is a string is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path
