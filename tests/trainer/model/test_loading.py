"""Opening a base model: where its arrays are made."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tiny_recipes import MODELS
from trainer.model import loading
from trainer.recipe.config import ModelConfig, QuantizeConfig


@pytest.mark.parametrize("quantized", [False, True])
def test_files_are_read_by_the_cpu(monkeypatch: pytest.MonkeyPatch, quantized: bool) -> None:
    """Catches a cast or a quantization on the GPU that waits for a slow disk, for which Metal ends it."""
    streams: list[Any] = []
    made: dict[str, Any] = {}
    stream = mx.stream

    @contextmanager
    def recording(where: Any) -> Iterator[None]:
        streams.append(where)
        with stream(where):
            yield
        streams.pop()

    def noting(name: str) -> None:
        original = getattr(loading, name)
        monkeypatch.setattr(loading, name, lambda *x, **y: made.update({name: list(streams)}) or original(*x, **y))

    monkeypatch.setattr(mx, "stream", recording)
    for name in ("load_model", "_cast", "quantize_model"):
        noting(name)
    path = next(path for path in sorted(Path(MODELS).iterdir()) if (path / "model.safetensors").is_file())
    base = loading.open_model(ModelConfig(path=str(path), quantize=QuantizeConfig(4, 32) if quantized else None), 1, 0)
    assert made == {name: [mx.cpu] for name in ("load_model", "_cast", *(["quantize_model"] if quantized else []))}
    assert ("quantization" in base.config) == quantized
