"""Models written by `export --to fused`, opened by mlx-lm and compared with base + adapter."""

import json
import resource
import signal

import mlx.core as mx
import pytest
from export_support import DATA, export, model_logits, train_run, tuned_logits
from mlx_lm.tuner.lora import LoRALinear


@pytest.mark.parametrize(
    ("architecture", "method", "targets"),
    [
        ("llama", "lora", "all-linear"),
        ("qwen3", "dora", "all-linear"),
        ("qwen3", "lora", ["q_proj", "embed_tokens"]),
        ("qwen3_5", "lora", "all-linear"),
    ],
)
def test_logits_equal_base_and_adapter(tmp_path, architecture, method, targets):
    """Catches: a lost scale, an adapter left out, norms or convolutions changed when the folder is read back."""
    run = train_run(tmp_path, architecture, method, lora={"targets": targets})
    assert export(run, "--to", "fused") == 0, "export failed"
    expected = tuned_logits(architecture, run)
    difference = mx.abs(model_logits(run / "fused") - expected).max().item()
    assert difference < 1e-4, f"logits differ by {difference:.1e}"
    learned = mx.abs(expected - model_logits(DATA / architecture)).max().item()
    assert learned > 0.1, "the adapter does nothing, so the comparison shows nothing"
    assert "mlx_lm.generate" in (run / "fused" / "README.md").read_text()


def test_experts_of_a_random_start(tmp_path, capsys):
    """Catches: expert adapters fused in the wrong layout, a tokenizer missing beside a model without a base folder."""
    run = train_run(tmp_path, "experts", "lora")
    assert export(run, "--to", "fused") == 0, capsys.readouterr().err
    assert mx.isfinite(model_logits(run / "fused")).all().item(), "the model does not open"


def test_wrong_fusion_leaves_the_older_export(tmp_path, monkeypatch, capsys):
    """Catches: a fused model that is written over a good one before anyone compared it."""
    run = train_run(tmp_path, "llama", "lora")
    assert export(run, "--to", "fused") == 0, "export failed"
    before = (run / "fused" / "model.safetensors").read_bytes()
    monkeypatch.setattr(LoRALinear, "fuse", lambda self, dequantize=False: self.linear)
    assert export(run, "--to", "fused") == 2, "a fused model without its adapter was accepted"
    assert "is left as it was" in capsys.readouterr().err
    assert (run / "fused" / "model.safetensors").read_bytes() == before, "the older export is gone"
    assert sorted(path.name for path in run.glob("fused*")) == ["fused"], "something was left beside it"


def test_quantized_base_is_dequantized(tmp_path, capsys):
    """Catches: a fused QLoRA model that is quantized again, with what was learned rounded away."""
    run = train_run(tmp_path, "qwen3_5", "lora", quantize={"bits": 8, "group_size": 32})
    assert export(run, "--to", "fused") == 0, "export failed"
    config = json.loads((run / "fused" / "config.json").read_text())
    assert "quantization" not in config and "quantization_config" not in config, config
    names = mx.load(str(run / "fused" / "model.safetensors"))
    assert not any(name.endswith(".scales") for name in names), "quantized weights were written"
    assert "dequantized to float32" in capsys.readouterr().out


def test_requantized_on_request(tmp_path, capsys):
    """Catches: --requantize without effect, or without a word on what it costs."""
    run = train_run(tmp_path, "qwen3_5", "lora", quantize={"bits": 8, "group_size": 32})
    assert export(run, "--to", "fused", "--requantize") == 0, "export failed"
    assert json.loads((run / "fused" / "config.json").read_text())["quantization"]["bits"] == 8
    assert "rounds away part of what was learned" in capsys.readouterr().out
    assert mx.isfinite(model_logits(run / "fused")).all().item(), "the model does not open"


def test_full_run_is_written_as_it_is(tmp_path):
    """Catches: a checkpoint of full fine-tuning that cannot be turned into a model folder."""
    run = train_run(tmp_path, "qwen3_5", "full")
    checkpoint = run / "checkpoints" / "step-0000003"
    assert export(checkpoint, "--to", "fused", "--output", str(tmp_path / "three")) == 0, "export failed"
    assert mx.array_equal(model_logits(tmp_path / "three"), model_logits(run / "model")).item(), "values differ"
    assert "nothing to fuse" in (tmp_path / "three" / "README.md").read_text(), "the card speaks of an adapter"


@pytest.mark.parametrize("kind", ["peft", "fused"])
def test_a_full_disk_leaves_the_older_export(tmp_path, capsys, kind):
    """Catches a half-written export in place of a good one, or an error that does not say what ran out."""
    run = train_run(tmp_path, "llama", "lora")
    assert export(run, "--to", kind) == 0, "export failed"
    before = {path.name: path.read_bytes() for path in (run / kind).iterdir()}
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails with EFBIG, like a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        code = export(run, "--to", kind)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
        signal.signal(signal.SIGXFSZ, handler)
    err = capsys.readouterr().err
    assert code == 1 and "could not be written: File too large" in err and "is untouched" in err, err
    assert {path.name: path.read_bytes() for path in (run / kind).iterdir()} == before, "the older export changed"
    assert sorted(path.name for path in run.glob(f"{kind}*")) == [kind], "something was left beside it"
