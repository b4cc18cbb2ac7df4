"""The step gives the same loss and gradients however a global batch is cut into ranks and micro-batches."""

import json
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import pytest
from workers.step import measure

import comm
from ranks import run_ranks
from tiny_recipes import tiny_recipe, write_rows

WORKER = Path(__file__).parent / "workers" / "step.py"
CASES = {
    "lora": {"architecture": "qwen3", "method": "lora", "lora": {"dropout": 0.3}},
    "full": {"architecture": "qwen3", "method": "full"},
    "moe": {"architecture": "qwen3_moe", "method": "lora"},
    # Compiled on the two ranks, not in the one process.
    "compiled": {"architecture": "qwen3_5", "method": "lora", "lora": {"dropout": 0.3}},
}
TOLERANCE = 1e-5  # float32, relative to each tensor's largest entry


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows, and the cases as two ranks run them."""
    folder = tmp_path_factory.mktemp("step")
    rows = write_rows(folder)
    cases = {name: asdict(recipe(rows, folder, name, 4, 1)) for name in CASES}
    (folder / "cases.json").write_text(json.dumps(cases))
    return folder


def recipe(rows, folder, name, per_device, accumulation):
    """The case's recipe with this division of a global batch."""
    return tiny_recipe(
        rows, folder, **CASES[name], batch_size_per_device=per_device, grad_accumulation_steps=accumulation
    )


def whole(folder, name, per_device=8, accumulation=1):
    """What one process measures."""
    return measure(asdict(recipe(folder / "rows.jsonl", folder, name, per_device, accumulation)), comm.solo())


def assert_equal(found, expected):
    """Every tensor within the tolerance."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = mx.abs(found[name].astype(mx.float32) - value.astype(mx.float32)).max().item()
        assert error <= TOLERANCE * max(mx.abs(value).max().item(), 1e-12), name


@pytest.fixture(scope="module", params=["ring", "mpi"])
def two_ranks(request, folder):
    """Measurements of two real processes."""
    run_ranks(WORKER, 2, backend=request.param, args=[folder], timeout=120)
    return {name: mx.load(str(folder / f"{name}-2.safetensors")) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one_process(folder, two_ranks, name):
    """Catches means of per-rank means, wrong row division, dropout that depends on the mesh, and messages inside the
    compiled part of a step.
    """
    assert_equal(two_ranks[name], whole(folder, name))


@pytest.mark.parametrize("name", CASES)
def test_two_micro_batches_equal_one(folder, name):
    """Catches accumulation that weighs micro-batches instead of tokens."""
    assert_equal(whole(folder, name, per_device=4, accumulation=2), whole(folder, name))
