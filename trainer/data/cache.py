"""Tokenised rows on disk, under a hash of everything that they depend on.

An entry is a folder of .npy files, mapped and not read. It is written beside its place and renamed into it, so
a reader never sees half of one, and of two processes that make the same entry one wins and both can use it.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .encode import plain_tokenizer
from .rows import TokenStore

LAYOUT = 3  # part of every key: raise it when rows are tokenised or stored differently


def cache_folder(cache_dir: str | Path | None) -> Path:
    """`cache_dir`, or `MLX_TRAINER_CACHE`, or `~/.cache/mlx-trainer`."""
    chosen = cache_dir or os.environ.get("MLX_TRAINER_CACHE") or "~/.cache/mlx-trainer"
    return Path(chosen).expanduser() / "rows"


def cache_key(**parts: Any) -> str:
    """A hash of JSON-able values."""
    return hashlib.sha256(json.dumps({"layout": LAYOUT, **parts}, sort_keys=True).encode()).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """A hash of what decides how a tokenizer splits text and renders chats."""
    plain = plain_tokenizer(tokenizer)
    rules = plain.backend_tokenizer.to_str() if plain.is_fast else sorted(plain.get_vocab().items())
    return cache_key(
        kind=type(plain).__name__,
        wrapper=type(tokenizer).__name__,
        rules=rules,
        chat_template=plain.chat_template,
        special={name: str(token) for name, token in plain.special_tokens_map.items()},
    )


def cached_store(
    folder: Path, key: str, make: Callable[[], TokenStore], notice: Callable[[str], None]
) -> TokenStore:
    """The store under `key`, made and kept when it is not there yet.

    A folder that cannot be written costs a notice and the rows stay in memory.
    """
    entry = folder / key
    store = _open(entry)
    if store is not None:
        return store
    store = make()
    try:
        _write(store, entry)
    except OSError as error:
        notice(f"tokenised rows are not cached: {error}")
    return store


def _open(entry: Path) -> TokenStore | None:
    """None when the entry is missing or not readable as written (then it is made again)."""
    try:
        counts = json.loads((entry / "counts.json").read_text())
        arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="r") for name in TokenStore.ARRAYS}
        return TokenStore(**arrays, **counts)
    except (OSError, ValueError, TypeError):
        return None


def _write(store: TokenStore, entry: Path) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=entry.parent))
    try:
        for name in TokenStore.ARRAYS:
            np.save(unfinished / f"{name}.npy", getattr(store, name))
        counts = {name: getattr(store, name) for name in TokenStore.COUNTS}
        (unfinished / "counts.json").write_text(json.dumps(counts))
        if _open(entry) is None:
            shutil.rmtree(entry, ignore_errors=True)  # an entry that cannot be read would block the rename
            unfinished.rename(entry)
    except OSError:
        if _open(entry) is None:  # else another process was first with the same rows
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
