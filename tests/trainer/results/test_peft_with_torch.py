"""Exported PEFT folders, loaded by transformers and PEFT themselves. Runs only where PyTorch and PEFT are installed:

    pip install torch==2.13.0 peft && python -m pytest tests/trainer/results/test_peft_with_torch.py

`.ci/run` does so where they install in time.
"""

import mlx.core as mx
import numpy as np
import pytest
from export_support import DATA, PROBE, export, train_run, tuned_logits

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# What other packages warn about is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

CASES = [
    ("llama", "lora", {"targets": "all-linear"}, "AutoModelForCausalLM"),
    ("llama", "lora", {"targets": ["q_proj", "lm_head", "embed_tokens"]}, "AutoModelForCausalLM"),
    ("qwen3", "dora", {"targets": "all-linear"}, "AutoModelForCausalLM"),
    ("qwen3", "lora", {"targets": "all-linear", "num_layers": 2}, "AutoModelForCausalLM"),
    ("qwen3_5", "lora", {"targets": "all-linear"}, "AutoModelForCausalLM"),
    ("qwen3_5", "dora", {"targets": "all-linear"}, "AutoModelForImageTextToText"),
]


@pytest.mark.parametrize(("architecture", "method", "lora", "class_name"), CASES)
def test_logits_equal_those_of_mlx_lm(tmp_path, architecture, method, lora, class_name):
    """Catches: a wrong name, transpose, alpha or magnitude: PEFT loads such folders and leaves layers unadapted."""
    run = train_run(tmp_path, architecture, method, lora=lora)
    words = ["--multimodal"] if class_name == "AutoModelForImageTextToText" else []
    assert export(run, "--to", "peft", *words) == 0, "export failed"

    base = getattr(transformers, class_name).from_pretrained(str(DATA / architecture), dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(run / "peft")).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(PROBE)).logits.numpy()

    expected = np.array(tuned_logits(architecture, run))
    assert np.abs(logits - expected).max() < 1e-4, f"logits differ by {np.abs(logits - expected).max():.1e}"


def test_peft_finds_base_and_class_by_itself(tmp_path):
    """Catches: a config from which AutoPeftModelForCausalLM cannot open the base model."""
    run = train_run(tmp_path, "qwen3_5", "lora")
    assert export(run, "--to", "peft") == 0, "export failed"
    model = peft.AutoPeftModelForCausalLM.from_pretrained(str(run / "peft"), dtype=torch.float32).eval()
    with torch.no_grad():
        logits = mx.array(model(input_ids=torch.tensor(PROBE)).logits.numpy())
    difference = mx.abs(logits - tuned_logits("qwen3_5", run)).max().item()
    assert difference < 1e-4, f"logits differ by {difference:.1e}"
