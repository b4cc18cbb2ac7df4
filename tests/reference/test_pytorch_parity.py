"""The trainer against curves that transformers and PEFT made on the same checkpoints, adapters and rows.

The folders under data/ are as `save_pretrained` wrote them (see make_reference.py), so these tests also hold the
readers of Hugging Face checkpoints and PEFT adapters to what users really have.
"""

import json
from pathlib import Path

import mlx.core as mx
import pytest

from training import train_with_recipe

DATA = Path(__file__).parent / "data"
CURVES = json.loads((DATA / "curves.json").read_text())
RUNS = sorted(CURVES["runs"])
# On every step, of losses near 5 and norms near 2. Rounding was 2e-5 at most on a CPU; GPUs may multiply in less than
# float32. Weight decay on vectors as well shows as 4e-4.
TOLERANCE = 1e-4 if mx.default_device() == mx.cpu else 1e-3

RECIPE = """
model: {{path: {model}, dtype: float32}}
method: {method}
lora: {{init_from: {adapter}}}
data: {{train: {rows}, max_seq_len: 256, packing: false, group_by_length: false, shuffle: false}}
batch_size_per_device: {batch_size}
max_steps: {num_steps}
optimizer: {{name: adamw, lr: {lr}, weight_decay: {weight_decay}, betas: {betas}, eps: {eps}}}
schedule: {{name: constant}}
max_grad_norm: {max_grad_norm}
checkpoint: {{every: 1000000, resume: none}}
logging: {{every: 1}}
output_dir: {output}
"""


def recipe_text(run: str, output: Path) -> str:
    """The recipe of a reference run, e.g. "qwen3-lora"."""
    architecture, method = run.rsplit("-", 1)
    optimizer = CURVES["optimizer"]
    return RECIPE.format(
        model=DATA / architecture,
        method=method,
        adapter=DATA / f"{architecture}-adapter" if method == "lora" else "null",
        rows=DATA / "train.jsonl",
        output=output,
        **{key: CURVES[key] for key in ("batch_size", "num_steps", "max_grad_norm")},
        **{key: optimizer[key] for key in ("lr", "weight_decay", "betas", "eps")},
    )


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory) -> tuple[str, list[dict]]:
    """Name of a reference run and the trainer's rows for it."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, train_with_recipe(recipe_text(request.param, folder / "output"), folder)


def largest_difference(rows: list[dict], key: str, reference: list[float]) -> tuple[float, int]:
    """Largest |trainer - reference| and the step (from 1) where it is."""
    assert len(rows) == len(reference), f"{len(rows)} rows of metrics for {len(reference)} steps"
    return max((abs(row[key] - value), step) for step, (row, value) in enumerate(zip(rows, reference), 1))


def test_loss_of_every_step(run):
    """Catches: a wrong weight or adapter import (step 1), a wrong loss mean, EOS or row order, a wrong update rule."""
    name, rows = run
    difference, step = largest_difference(rows, "train/loss", CURVES["runs"][name]["loss"])
    assert difference < TOLERANCE, f"{name}: train/loss differs by {difference:.2e} at step {step}"


def test_gradient_norm_of_every_step(run):
    """Catches: wrong gradients that a loss hides under Adam (it divides by their size), a norm after clipping."""
    name, rows = run
    difference, step = largest_difference(rows, "train/grad_norm", CURVES["runs"][name]["grad_norm"])
    assert difference < TOLERANCE, f"{name}: train/grad_norm differs by {difference:.2e} at step {step}"
