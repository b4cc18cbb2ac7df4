"""The bench verb: both sides really run, on the same tokens, and the figures are there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ranks import slowness
from trainer.__main__ import main
from trainer.bench.figures import Measurement, table

ROOT = Path(__file__).resolve().parents[3]
RECIPE = """
model:
  config: {model_type: qwen3, hidden_size: 32, num_hidden_layers: 2, intermediate_size: 48, num_attention_heads: 2,
           num_key_value_heads: 1, head_dim: 16, rms_norm_eps: 1.0e-6, rope_theta: 1.0e+4, tie_word_embeddings:
               true,
           vocab_size: 300, max_position_embeddings: 512}
  tokenizer: bpe:300
method: lora
data: {train: synthetic:sql, max_seq_len: 64}
batch_size_per_device: 2
max_steps: 3
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Both sides' figures."""
    recipe = tmp_path_factory.mktemp("bench") / "tiny.yaml"
    recipe.write_text(RECIPE)
    words = [sys.executable, "-m", "trainer", "bench", str(recipe)]
    words += "--vs mlx-lm --synthetic --steps 2 --warmup 1 --json".split()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120 * slowness())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_both_sides_report(found):
    """Catches a side that measures nothing, or that trains on padded or other rows."""
    assert [m["side"] for m in found] == ["mlx-trainer", "mlx-lm"]
    for side in found:
        assert side["tokens_per_sec"] > 0
        assert side["padding_pct"] == pytest.approx(0, abs=0.01)
        assert 0 < side["peak_gib"] < 1
    # Both start from the same weights, so the losses of the first steps are close.
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=0.05)


def test_parts_of_a_step_add_up(found):
    """Catches a split that leaves time out."""
    ours = found[0]
    parts = ours["data_s"] + ours["compute_s"] + ours["optimizer_s"]
    assert parts == pytest.approx(ours["step_s"], rel=0.5)


def test_table_shows_ratios():
    """Catches a ratio upside down."""
    sides = [Measurement("mlx-trainer", 200, 1, 0, 1.0, 2.0), Measurement("mlx-lm", 100, 2, 0, 4.0, 2.0)]
    text = table(sides)
    assert "2.00x" in text
    assert text.splitlines()[2].split() == ["tokens/step", "200", "200"]
    assert "0.25x" in text


def test_a_mistake_is_told_once(tmp_path, capsys):
    """Catches a traceback, or exit code 1, for what the user wrote: found by a side's process, not by the recipe's
    check.
    """
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text(RECIPE)
    assert main(["bench", str(recipe), "--vs", "mlx-lm", "lora.targets=[nowhere]"]) == 2
    told = capsys.readouterr().err
    assert told.count("nowhere") == 1 and "Traceback" not in told
