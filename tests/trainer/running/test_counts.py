"""Numbers that a run says of itself at its start."""

from types import SimpleNamespace

import mlx.nn as nn
from mlx.utils import tree_flatten

import comm
from tiny import make
from trainer.running.words import num_elements


def test_a_quantized_model_counts_its_weights() -> None:
    """Catches packed words being counted as parameters, eight of which are one word at 4 bits."""
    model = make("qwen3", hidden_size=64, intermediate_size=64)
    expected = sum(array.size for _, array in tree_flatten(model.parameters()))
    nn.quantize(model, group_size=32, bits=4)
    parts = SimpleNamespace(model=model, mesh=SimpleNamespace(pp=comm.solo()))
    assert num_elements(parts, model.parameters()) == expected
