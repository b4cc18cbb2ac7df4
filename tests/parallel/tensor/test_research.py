"""The script that the README shows for research code, on one process and on two ranks."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from ranks import run_ranks, slowness
from tensor_cases import PATHS, TIMEOUT_SECONDS
from tensor_models import BASE, make_model
from trainer.data import build_tokenizer

SCRIPT = Path(__file__).parent / "workers" / "research_tensor_parallel.py"


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `mlx_lm.load` opens: a tiny Qwen3 with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = build_tokenizer(["To be, or not to be, that is the question."] * 3, 260)
    tokenizer.save_pretrained(folder)
    model = make_model("qwen3", vocab_size=264)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", **BASE, "vocab_size": 264}))
    return folder


def test_same_on_one_and_two_ranks(small_model: Path) -> None:
    """Catches research code that breaks, or trains something else, when a second rank joins."""
    env = {**os.environ, "PYTHONPATH": PATHS}
    command = [sys.executable, str(SCRIPT), str(small_model)]
    alone = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT_SECONDS * slowness())
    assert alone.returncode == 0, alone.stderr
    ranks = run_ranks(SCRIPT, 2, args=[str(small_model)], timeout=TIMEOUT_SECONDS, env={"PYTHONPATH": PATHS})
    assert ranks[1].stdout == "", "only rank 0 prints"
    number = re.compile(r"-?\d+\.\d+")
    texts = [alone.stdout, ranks[0].stdout]
    losses = [[float(n) for n in number.findall(text)] for text in texts]
    assert len(losses[0]) == len(losses[1]) == 4, f"{texts}"
    assert all(abs(a / b - 1) < 1e-4 for a, b in zip(*losses)), f"{losses}"
    assert losses[0][1] < losses[0][0] and losses[0][3] < losses[0][2], f"the losses fall: {losses[0]}"
    generated = [text.split("then ")[1] for text in texts]
    assert generated[0] == generated[1], f"{generated}"
