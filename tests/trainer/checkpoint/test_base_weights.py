"""Adapters continue on the base weights that they were trained on."""

from pathlib import Path

import mlx.core as mx
import pytest

from trainer.checkpoint.state import _check_base
from trainer.checkpoint.weights_digest import weights_digest


def save(folder: Path, seed: int, name: str = "model.safetensors") -> str:
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / name), {"w": mx.random.normal((512, 1024), key=mx.random.key(seed))})
    return weights_digest(folder)


def test_other_weights_of_the_same_shape_show(tmp_path: Path) -> None:
    """Catches a digest of names and shapes only, of the folder's place, or one that is kept when the files change."""
    first = save(tmp_path / "a", 1)
    assert save(tmp_path / "b", 1) == first
    assert save(tmp_path / "a", 2) != first
    assert save(tmp_path / "b", 3, "model-2.safetensors") != first


def test_changed_base_is_refused_and_an_unknown_one_is_said() -> None:
    """Catches adapters that go on, silently, over other weights or another dtype than they have learned on."""
    saved = {"model weights": "one", "model.dtype": "float32", "model.quantize": None}
    notices: list[str] = []
    _check_base(saved, dict(saved), notices.append)
    assert notices == []
    for key in saved:
        with pytest.raises(ValueError, match=f"{key}: "):
            _check_base(saved, saved | {key: "other"}, notices.append)
    _check_base(None, saved, notices.append)
    assert len(notices) == 1 and "base weights" in notices[0]
