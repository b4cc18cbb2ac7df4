"""Recipes on meshes: the curve and the result of one process, checkpoints that any other mesh continues."""

import mlx.core as mx
import pytest

import comm
from tiny_recipes import run_apart, tiny_recipe, write_rows
from trainer.metrics.records import read_records
from trainer.training.requests import Stop
from training import train

STEPS, SAVED_EVERY, KILLED_AT = 6, 3, 4
MESHES = {"tp": {"tp": 2}, "pp": {"pp": 2}, "dp_shard": {"dp_shard": 2}}
CASES = {"lora": ("qwen3", {"dropout": 0.2}), "full": ("qwen3_5", {})}
METHODS = {"tp": "lora", "pp": "full", "dp_shard": "full"}


def recipe(rows, output_dir, method, parallel):
    """Global batches of 8 rows in micro-batches of 2, whatever the mesh."""
    architecture, lora = CASES[method]
    return tiny_recipe(
        rows,
        output_dir,
        architecture,
        method=method,
        lora=lora,
        max_steps=STEPS,
        checkpoint={"every": SAVED_EVERY},
        batch_size_per_device=2,
        global_batch_size=8,
        data={"val_fraction": 0.2},
        parallel=parallel,
    )


def curve(folder):
    """(loss, norm, validation loss) of every row of metrics."""
    rows = read_records(folder / "metrics.jsonl")
    return [tuple(row.get(key, 0.0) for key in ("train/loss", "train/grad_norm", "eval/loss")) for row in rows]


def tensors(folder):
    """The result's tensors."""
    path = folder / "adapters.safetensors"
    return mx.load(str(path if path.exists() else folder / "model" / "model.safetensors"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows for all runs."""
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
    """Folders of the runs of one process, by method."""
    folders = {method: tmp_path_factory.mktemp(method) for method in CASES}
    for method, folder in folders.items():
        assert train(recipe(rows, folder, method, {}), comm.solo(), Stop(), []) == 0
    return folders


def assert_same_run(found, expected):
    """Losses, norms and final tensors within float32 rounding over the steps."""
    for left, right in zip(curve(found), curve(expected), strict=True):
        assert left == pytest.approx(right, rel=1e-4)
    right = tensors(expected)
    left = tensors(found)
    assert left.keys() == right.keys()
    for name, value in right.items():
        assert left[name].shape == value.shape
        assert mx.abs(left[name] - value).max().item() <= 2e-3 * max(mx.abs(value).max().item(), 1e-2), name


@pytest.mark.parametrize("axis", MESHES)
def test_mesh_is_killed_and_continued_by_one_process(rows, whole, tmp_path, axis):
    """Catches a mesh that trains something else, and checkpoints that hold slices or only one stage."""
    method = METHODS[axis]
    run_apart(recipe(rows, tmp_path, method, MESHES[axis]), 2, step=KILLED_AT)
    assert (tmp_path / "checkpoints" / f"step-{SAVED_EVERY:07d}").is_dir()
    assert train(recipe(rows, tmp_path, method, {}), comm.solo(), Stop(), []) == 0
    assert_same_run(tmp_path, whole[method])


@pytest.mark.parametrize("axis", MESHES)
def test_one_process_is_killed_and_continued_by_a_mesh(rows, whole, tmp_path, axis):
    """Catches slices of a whole checkpoint that go to the wrong rank, and results written in parts."""
    method = METHODS[axis]
    run_apart(recipe(rows, tmp_path, method, {}), 1, step=KILLED_AT)
    run_apart(recipe(rows, tmp_path, method, MESHES[axis]), 2)
    assert_same_run(tmp_path, whole[method])
