"""What a rank holds when weights are sharded or layers are cut, on a model of 48 equal layers."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from ranks import ROOT, run_ranks
from tensor_models import BASE, make_model

CHANGES = {"num_hidden_layers": 48, "hidden_size": 128, "intermediate_size": 512}
NUM_RANKS = 4


@pytest.fixture(scope="module")
def measured(exhaustive: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """Each rank's bytes, by way of training."""
    folder = tmp_path_factory.mktemp("layers")
    shapes = [(name, array.shape) for name, array in tree_flatten(make_model("qwen3", **CHANGES).parameters())]
    arrays = {name: 0.02 * mx.random.normal(shape, key=mx.random.key(i)) for i, (name, shape) in enumerate(shapes)}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", **BASE, **CHANGES}))
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "helpers", ROOT / "tests" / "parallel" / "tensor")))
    worker = Path(__file__).parent / "workers" / "memory.py"
    results = run_ranks(worker, NUM_RANKS, args=[str(folder)], timeout=240, env={"PYTHONPATH": paths})
    yield [result.result for result in results]
    (folder / "model.safetensors").unlink()


def test_sharded_training_step(measured: list[dict[str, Any]]) -> None:
    """Catches gathered weights or whole gradients that stay alive: at most 0.35 of what an unsharded rank takes."""
    for rank, ways in enumerate(measured):
        share = ways["sharded"]["step"] / ways["whole"]["step"]
        assert share <= 0.35, f"rank {rank}: {share:.3f} of the whole model's {ways['whole']['step']} bytes"


def test_pipelined_training_step(measured: list[dict[str, Any]]) -> None:
    """Catches stages that keep other stages' layers, gradients or optimizer state: at most 0.4 of one process."""
    for rank, ways in enumerate(measured):
        share = ways["cut"]["step"] / ways["whole"]["step"]
        assert share <= 0.4, f"rank {rank}: {share:.3f} of the whole model's {ways['whole']['step']} bytes"


@pytest.mark.parametrize("way", ["sharded", "cut"])
def test_loading(measured: list[dict[str, Any]], way: str) -> None:
    """Catches a rank that reads more of the files than its own layers or slices."""
    for rank, ways in enumerate(measured):
        whole = ways["whole"]["parameters"]
        assert ways[way]["parameters"] < 0.27 * whole, f"rank {rank} keeps {ways[way]['parameters']} of {whole} bytes"
        assert ways[way]["loading"] < 0.3 * whole, f"rank {rank} peaks at {ways[way]['loading']} of {whole} bytes"


def test_gathered_weights_in_flight(measured: list[dict[str, Any]]) -> None:
    """Catches units gathered far ahead of their use: this one and the next, nothing more."""
    for ways in measured:
        layer = ways["whole"]["parameters"] / CHANGES["num_hidden_layers"]
        assert 0 < ways["sharded"]["gathered"] <= 2 * layer, f"{ways['sharded']['gathered']} bytes, a layer has {layer}"


def test_resharding_matters(measured: list[dict[str, Any]]) -> None:
    """Catches an option without effect: weights that stay gathered for the backward pass take visibly more."""
    for ways in measured:
        more = ways["kept"]["step"] - ways["sharded"]["step"]
        assert more > 0.5 * ways["whole"]["parameters"], f"only {more} bytes more"
