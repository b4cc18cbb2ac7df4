"""PEFT folders written by `export --to peft`, held against folders that PEFT itself wrote."""

import json

import mlx.core as mx
import pytest
from export_support import DATA, export, tensor_shapes, train_run


@pytest.fixture(scope="module", params=["llama", "qwen3", "qwen3_5"])
def lora_run(request, tmp_path_factory):
    """Architecture and output folder of a run that started from PEFT's own adapter."""
    lora = {"init_from": str(DATA / f"{request.param}-adapter")}
    return request.param, train_run(tmp_path_factory.mktemp(request.param), request.param, "lora", lora=lora)


def test_names_and_shapes_are_those_that_peft_writes(lora_run, tmp_path):
    """Catches: a wrong module prefix, a missing transpose, a tensor under another name, which PEFT ignores silently."""
    architecture, run = lora_run
    assert export(run, "--to", "peft", "--multimodal", "--output", str(tmp_path / "peft")) == 0, "export failed"
    ours, theirs = tensor_shapes(tmp_path / "peft"), tensor_shapes(DATA / f"{architecture}-adapter")
    assert ours == theirs, f"{set(ours) ^ set(theirs) or 'shapes differ'}"


def test_text_class_names_have_no_language_model_part(lora_run, tmp_path):
    """Catches: names of the multimodal class where AutoModelForCausalLM builds the language model alone."""
    architecture, run = lora_run
    assert export(run, "--to", "peft", "--output", str(tmp_path / "peft")) == 0, "export failed"
    expected = {name.replace("language_model.", "") for name in tensor_shapes(DATA / f"{architecture}-adapter")}
    assert set(tensor_shapes(tmp_path / "peft")) == expected, "names are not those of the text class"


def test_export_starts_another_run_at_the_same_values(lora_run, tmp_path):
    """Catches: values changed on the way out or in, a scale that does not survive as alpha and rank."""
    architecture, run = lora_run
    assert export(run, "--to", "peft", "--output", str(tmp_path / "peft")) == 0, "export failed"
    again = train_run(tmp_path, architecture, "lora", lora={"init_from": str(tmp_path / "peft")})
    first = json.loads((again / "metrics.jsonl").read_text().splitlines()[0])["train/loss"]
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert first < last[0]["train/loss"] - 0.1, "the second run does not start from what the first one learned"
    config = json.loads((again / "adapter_config.json").read_text())["lora_parameters"]
    assert (config["rank"], config["scale"]) == (8, 2.0), f"rank and scale became {config}"


def test_adapters_on_some_layers_are_named_in_full(tmp_path):
    """Catches: suffix targets that put fresh adapters on layers that were not trained."""
    run = train_run(tmp_path, "qwen3", "lora", lora={"num_layers": 1, "targets": ["q_proj"]})
    assert export(run, "--to", "peft") == 0, "export failed"
    config = json.loads((run / "peft" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.2.self_attn.q_proj"], config["target_modules"]


def test_config_says_what_was_trained(tmp_path):
    """Catches: DoRA exported as LoRA, alpha mistaken for the scale."""
    run = train_run(tmp_path, "llama", "dora", lora={"rank": 4, "alpha": 12})
    assert export(run, "--to", "peft", "--base-model", "someone/base") == 0, "export failed"
    config = json.loads((run / "peft" / "adapter_config.json").read_text())
    expected = {"r": 4, "lora_alpha": 12, "use_dora": True, "base_model_name_or_path": "someone/base"}
    assert {key: config[key] for key in expected} == expected, config
    card = (run / "peft" / "README.md").read_text()
    assert "base_model: someone/base" in card and "| train/loss |" in card, card


def test_equal_runs_give_equal_bytes(lora_run, tmp_path):
    """Catches: set order, a time or a path in an exported file."""
    _, run = lora_run
    for name in ("a", "b"):
        assert export(run, "--to", "peft", "--output", str(tmp_path / name)) == 0, "export failed"
    for file in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), f"{file} differs"


def test_checkpoint_is_exported_as_it_was(tmp_path):
    """Catches: the final values exported in place of a checkpoint's."""
    run = train_run(tmp_path, "llama", "lora")
    checkpoint = run / "checkpoints" / "step-0000002"
    assert export(run, "--to", "peft") == 0, "export of the result failed"
    assert export(checkpoint, "--to", "peft", "--output", str(tmp_path / "two")) == 0, "export of a checkpoint failed"
    final = mx.load(str(run / "peft" / "adapter_model.safetensors"))
    earlier = mx.load(str(tmp_path / "two" / "adapter_model.safetensors"))
    assert final.keys() == earlier.keys() and not all(mx.array_equal(final[n], earlier[n]) for n in final), "no change"


def test_full_runs_have_no_adapter(tmp_path, capsys):
    """Catches: an empty PEFT folder after full fine-tuning."""
    run = train_run(tmp_path, "llama", "full")
    assert export(run, "--to", "peft") == 2, "a full run was exported as an adapter"
    assert "method: full" in capsys.readouterr().err
    assert not (run / "peft").exists(), "something was written"


def test_tied_embeddings_are_refused(tmp_path, capsys):
    """Catches: an adapter on a tied embedding, which PEFT would apply to the input only."""
    run = train_run(tmp_path, "qwen3", "lora", lora={"targets": ["q_proj", "embed_tokens"]})
    assert export(run, "--to", "peft") == 2, "a tied embedding was exported"
    assert "tied to the output head" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"), [((), "random start"), (("--base-model", "someone/base"), "adapts experts")]
)
def test_what_peft_cannot_express_is_refused(tmp_path, capsys, words, reason):
    """Catches: stacked expert adapters under names that PEFT ignores, an adapter for a base that nobody has."""
    run = train_run(tmp_path, "experts", "lora")
    assert export(run, "--to", "peft", *words) == 2, "the adapter was exported"
    assert reason in capsys.readouterr().err
    assert not (run / "peft").exists(), "something was written"


def test_foreign_folder_is_left_alone(tmp_path, capsys):
    """Catches: an export that replaces a folder with something else in it."""
    run = train_run(tmp_path, "llama", "lora")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    assert export(run, "--to", "peft", "--output", str(tmp_path / "thesis")) == 2, "a foreign folder was accepted"
    assert "no earlier export" in capsys.readouterr().err
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"
