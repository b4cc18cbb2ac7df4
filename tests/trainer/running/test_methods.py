"""Every method on every architecture family: what trains, what is written, and that mlx-lm opens it."""

import json
import math

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_adapters, load_model

import comm
from tiny_recipes import MODELS, model_section, tiny_recipe, write_rows
from trainer.__main__ import main
from trainer.build import build
from trainer.metrics.records import read_records
from trainer.results.opened import load_result
from trainer.training.requests import Stop
from training import train

TOKENS = mx.array([[5, 9, 2, 7, 31, 8, 4, 11]])
ARCHITECTURES = ("llama", "qwen3", "qwen3_moe", "qwen3_5", "gemma3")
QUANTIZE = {"bits": 4, "group_size": 32}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows for all runs."""
    return write_rows(tmp_path_factory.mktemp("rows"), 24)


def run(recipe):
    """Train; returns the losses of the rows of metrics."""
    assert train(recipe, comm.solo(), Stop(), []) == 0
    return [row["train/loss"] for row in read_records(recipe_folder(recipe) / "metrics.jsonl") if "train/loss" in row]


def recipe_folder(recipe):
    """The run's output folder."""
    from pathlib import Path

    return Path(recipe.output_dir)


def trained_logits(recipe):
    """Logits of the trainer's own model with the run's result in it."""
    built = build(recipe, comm.solo(), lambda line: None)
    load_result(built, recipe.output_dir, lambda line: None)
    built.model.eval()
    return built.model(TOKENS)


@pytest.mark.parametrize("method", ["lora", "dora", "full", "qlora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_method_learns_and_writes_what_was_trained(rows, tmp_path, name, method):
    """Catches an architecture whose parameters do not train, or whose result is not what was trained."""
    model = model_section(name)
    if method == "qlora":
        model["quantize"] = QUANTIZE
    recipe = tiny_recipe(
        rows, tmp_path, name, model=model, method=method.removeprefix("q"), max_steps=4, data={"max_seq_len": 32}
    )
    losses = run(recipe)
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    built = build(recipe, comm.solo(), lambda line: None)
    names = {n.rsplit(".", 1)[-1] for n, _ in tree_flatten(built.model.trainable_parameters())}
    assert names == {"lora": {"lora_a", "lora_b"}, "qlora": {"lora_a", "lora_b"}, "dora": {"lora_a", "lora_b", "m"}}.get(
        method, {n.rsplit(".", 1)[-1] for n, _ in tree_flatten(built.model.parameters())}
    )


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", ["llama", "qwen3_5"])
def test_mlx_lm_opens_adapters(rows, tmp_path, name, method):
    """Catches adapter files that mlx-lm loads onto other modules or with another scale."""
    recipe = tiny_recipe(rows, tmp_path, name, method=method, max_steps=2, lora={"num_layers": 2, "alpha": 12})
    run(recipe)
    model, _ = load_model(MODELS / name)
    load_adapters(model, str(tmp_path))
    model.eval()
    assert mx.allclose(model(TOKENS), trained_logits(recipe), atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5", "gemma3", "qwen3_moe"])
def test_mlx_lm_opens_full_result(rows, tmp_path, name):
    """Catches weights that change when mlx-lm sanitizes them again, and a folder without config or tokenizer."""
    recipe = tiny_recipe(rows, tmp_path, name, method="full", max_steps=2)
    run(recipe)
    model, tokenizer = mlx_lm.load(str(tmp_path / "model"))
    assert mx.allclose(model(TOKENS), trained_logits(recipe), atol=1e-5)
    assert tokenizer.decode(tokenizer.encode("alpha beta")) == "alpha beta"


def test_optimizers_and_checkpointed_layers(rows, tmp_path):
    """Catches an optimizer name that does not build or does not learn."""
    for name in ("adamw", "adam", "sgd", "lion", "muon", "adafactor"):
        lr = 1e-1 if name == "sgd" else 3e-3
        recipe = tiny_recipe(rows, tmp_path / name, method="full", optimizer={"name": name, "lr": lr}, max_steps=5)
        losses = run(recipe)
        assert losses[-1] < losses[0], name


def test_bfloat16_keeps_master_weights(rows, tmp_path):
    """Catches updates that are lost to rounding: with float32 copies a small rate still moves the weights."""
    model = model_section("llama") | {"dtype": "bfloat16"}
    optimizer = {"lr": 1e-5, "weight_decay": 0.0}
    recipe = tiny_recipe(rows, tmp_path, "llama", model=model, method="full", max_steps=3, optimizer=optimizer)
    built = build(recipe, comm.solo(), lambda line: None)
    before = dict(built.optimizer.master)
    run(recipe)
    state = json.loads((tmp_path / "checkpoints" / "step-0000003" / "state.json").read_text())
    assert state["state"]["num_updates"] == 3
    saved = mx.load(str(tmp_path / "checkpoints" / "step-0000003" / "optimizer.safetensors"))
    name = next(n for n in before if before[n].ndim == 2)
    assert saved[f"{name}.master"].dtype == mx.float32 and saved[f"{name}.m"].dtype == mx.float32
    assert mx.abs(saved[f"{name}.master"] - before[name]).max().item() > 0


@pytest.mark.parametrize(
    ("method", "damage", "said"),
    [
        ("lora", lambda tensors: {}, "missing: model.layers"),
        ("lora", lambda tensors: dict(list(tensors.items())[1:]), "missing: model.layers"),
        ("lora", lambda tensors: tensors | {"foreign": mx.zeros(2)}, "unexpected: foreign"),
        ("lora", lambda tensors: {n: v[:1] for n, v in tensors.items()}, "of another shape: model.layers"),
        ("full", lambda tensors: dict(list(tensors.items())[1:]), "missing: "),
    ],
)
def test_result_that_is_not_whole_is_refused(rows, tmp_path, method, damage, said):
    """Catches a damaged result that is taken for the base model."""
    recipe = tiny_recipe(rows, tmp_path, method=method, max_steps=1)
    run(recipe)
    path = tmp_path / ("adapters.safetensors" if method == "lora" else "model/model.safetensors")
    tensors = damage(mx.load(str(path)))
    mx.eval(tensors)
    mx.save_safetensors(str(path), tensors, {"format": "mlx"})
    with pytest.raises(ValueError, match=said):
        trained_logits(recipe)
    if method == "lora" and tensors:
        again = tiny_recipe(rows, tmp_path / "again", lora={"init_from": str(tmp_path)}, max_steps=1)
        with pytest.raises(ValueError, match="lora.init_from"):
            run(again)


def test_weights_that_are_not_finite_are_refused(rows, tmp_path, capsys):
    """Catches an export, a loss or an answer of NaN that succeeds."""
    recipe = tiny_recipe(rows, tmp_path, max_steps=1)
    run(recipe)
    path = str(tmp_path / "adapters.safetensors")
    tensors = {name: value * float("nan") for name, value in mx.load(path).items()}
    mx.eval(tensors)
    mx.save_safetensors(path, tensors, {"format": "mlx"})
    for kind in ("peft", "fused"):
        assert main(["export", str(tmp_path), "--to", kind]) == 2
        assert "not finite" in capsys.readouterr().err
        assert not (tmp_path / kind).exists()
    for words in (["eval", str(tmp_path), f"data.valid={rows}"], ["generate", str(tmp_path), "--prompt", "a"]):
        assert main(words) == 2
        assert "holds numbers that are not finite: model.layers.0" in capsys.readouterr().err
