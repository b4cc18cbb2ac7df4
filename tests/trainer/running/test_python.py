"""Runs that are started from Python: the same as the command line's, heard of step by step."""

import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import pytest

from tiny_recipes import tiny_recipe, write_rows
from trainer import RunResult, load_recipe, train
from trainer.__main__ import main
from trainer.recipe.load import to_yaml

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows for all runs."""
    return write_rows(tmp_path_factory.mktemp("rows"))


def test_a_run_from_python_is_the_command_line_s(rows, tmp_path):
    """Catches another result than the command line's, and callbacks that are left out or called twice."""
    recipe = tiny_recipe(rows, tmp_path / "python", logging={"every": 2}, data={"val_fraction": 0.2})
    heard = []
    result = train(
        asdict(recipe),
        ["checkpoint.every=3", "eval.every=3"],
        on_step=lambda step, row: heard.append(("step", step, "train/loss" in row)),
        on_eval=lambda step, metrics: heard.append(("eval", step, "eval/loss" in metrics)),
        on_checkpoint=lambda step, path: heard.append(("checkpoint", step, path.is_dir())),
    )
    assert isinstance(result, RunResult) and result.code == result.signal == 0 and result.step == 6
    assert [what[:2] for what in heard] == [
        ("eval", 0), ("step", 1), ("step", 2), ("step", 3), ("eval", 3), ("checkpoint", 3),
        ("step", 4), ("step", 5), ("step", 6), ("eval", 6), ("checkpoint", 6),
    ]  # fmt: skip
    assert [has for kind, step, has in heard if kind == "step"] == [False, True, False, True, False, True]
    assert all(has for kind, _, has in heard if kind != "step")
    assert result.metrics["train/global_step"] == 6 and result.metrics["best/eval_loss"] > 0
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    assert main([str(tmp_path / "recipe.yaml"), f"output_dir={tmp_path}/shell", "checkpoint.every=3", "eval.every=3"]) == 0
    assert result.path.read_bytes() == (tmp_path / "shell" / "adapters.safetensors").read_bytes()
    again = train(load_recipe(tmp_path / "recipe.yaml"))
    assert again.step == 6 and again.metrics["train/loss"] == result.metrics["train/loss"]


def test_a_run_in_a_thread_leaves_the_signals_alone(rows, tmp_path):
    """Catches a notebook's thread in which no signal can be taken over, and handlers that a run leaves behind."""
    before = signal.getsignal(signal.SIGINT)
    found = []
    recipe = tiny_recipe(rows, tmp_path, max_steps=1)
    thread = threading.Thread(target=lambda: found.append(train(recipe).code))
    thread.start()
    thread.join()
    assert found == [0]
    train(recipe, [f"output_dir={tmp_path}/other"])
    assert signal.getsignal(signal.SIGINT) is before


def test_what_cannot_run_raises(tmp_path):
    """Catches an exit of the interpreter, or a result, where Python code needs an exception."""
    with pytest.raises(ValueError, match="optimizer.lr"):
        train({"model": {"path": "a/b"}, "data": {"train": "x.jsonl"}}, ["optimizer.lr=-1"])


def test_import_is_light():
    """Catches `import trainer` loading MLX, which `--help` would wait for."""
    code = "import sys, trainer; print([m for m in sys.modules if m.startswith(('mlx', 'transformers', 'omegaconf'))])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
