"""A run's output opened with mlx-lm's own tools: the same modules, the same logits."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import quantize_model

from saved_models import CONFIGS, TOKENS, make_model, make_tokenizer, nudge_parameters
from trainer.results.mlx_lm_format import adapter_config, write_adapters, write_model

LORA = {"rank": 4, "scale": 2.0, "dropout": 0.0}


def write_base(folder: Path, name: str, model: nn.Module, config: dict | None = None) -> None:
    write_model(folder, tree_flatten(model.parameters()), config or CONFIGS[name], make_tokenizer())


def adapt(model: nn.Module, keys: list[str] | None, use_dora: bool) -> list[tuple[str, mx.array]]:
    """Put random adapters on the modules of these full names (None: everywhere); returns the adapter tensors."""
    model.freeze()
    linear_to_lora_layers(model, -1, LORA if keys is None else {**LORA, "keys": keys}, use_dora=use_dora)
    nudge_parameters(model)
    model.eval()
    return tree_flatten(model.trainable_parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_mlx_lm_loads_the_model_folder(tmp_path: Path, name: str) -> None:
    """A weight that is missing, renamed, or changed by mlx-lm's own clean-up of foreign checkpoints (1 + w norms)."""
    model = make_model(name)
    write_base(tmp_path / "model", name, model)
    loaded, tokenizer = mlx_lm.load(str(tmp_path / "model"))
    assert mx.array_equal(loaded(TOKENS), model(TOKENS))
    assert tokenizer.encode("a tune") == make_tokenizer().encode("a tune")
    assert tokenizer.decode(tokenizer.encode("a tune")) == "a tune"
    assert tokenizer.eos_token == "<end>"


def test_model_in_shards(tmp_path: Path) -> None:
    """An index that names the wrong file, or shards that mlx-lm does not find."""
    model = make_model("qwen3")
    tensors = tree_flatten(model.parameters())
    write_model(tmp_path / "model", tensors, CONFIGS["qwen3"], make_tokenizer(), max_shard_bytes=100_000)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in tensors)
    assert len(set(index["weight_map"].values())) > 2
    for tensor_name, shard in index["weight_map"].items():
        assert tensor_name in mx.load(str(tmp_path / "model" / shard)), tensor_name
    loaded, _ = mlx_lm.load(str(tmp_path / "model"))
    assert mx.array_equal(loaded(TOKENS), model(TOKENS))


def test_quantized_model_stays_quantized(tmp_path: Path) -> None:
    """A quantized config that is lost on the way, so that packed weights are taken for plain ones."""
    model, config = quantize_model(make_model("llama"), CONFIGS["llama"], group_size=32, bits=4)
    write_base(tmp_path / "model", "llama", model, config)
    loaded, _, read = mlx_lm.load(str(tmp_path / "model"), return_config=True)
    assert read["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    assert mx.array_equal(loaded(TOKENS), model(TOKENS))


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layers", ["all", "some"])
def test_mlx_lm_loads_the_adapters(tmp_path: Path, name: str, layers: str, use_dora: bool) -> None:
    """Adapters that mlx-lm puts on other modules than were trained: a dropped layer, or one more with random values."""
    model = make_model(name)
    write_base(tmp_path / "model", name, model)
    prefix = "language_model." if name == "qwen3_5" else ""
    some = [f"{prefix}model.layers.0.mlp.up_proj", f"{prefix}model.layers.1.self_attn.q_proj"]
    tensors = adapt(model, None if layers == "all" else some, use_dora)
    fine_tune_type = "dora" if use_dora else "lora"
    config = adapter_config([key for key, _ in tensors], fine_tune_type=fine_tune_type, **LORA)
    write_adapters(tmp_path, tensors, config)
    loaded, _ = mlx_lm.load(str(tmp_path / "model"), adapter_path=str(tmp_path))
    names = {path for path, _ in tree_flatten(model.parameters())}
    assert {path for path, _ in tree_flatten(loaded.parameters())} == names
    assert len(tensors) == (3 if use_dora else 2) * len(config["lora_parameters"]["keys"])
    assert mx.array_equal(loaded(TOKENS), model(TOKENS))
    if layers == "some":
        assert config["lora_parameters"]["keys"] == some


def test_adapters_on_embedding_and_head(tmp_path: Path) -> None:
    """Adapted modules outside the layers, which mlx-lm finds by full name only."""
    model = make_model("qwen3")
    write_base(tmp_path / "model", "qwen3", model)
    tensors = adapt(model, ["lm_head", "model.embed_tokens"], use_dora=False)
    write_adapters(tmp_path, tensors, adapter_config([k for k, _ in tensors], fine_tune_type="lora", **LORA))
    loaded, _ = mlx_lm.load(str(tmp_path / "model"), adapter_path=str(tmp_path))
    assert mx.array_equal(loaded(TOKENS), model(TOKENS))


def test_refusals(tmp_path: Path) -> None:
    """A config that would make mlx-lm rebuild something else, written without a word."""
    with pytest.raises(ValueError, match="model.norm.weight is not an adapter tensor"):
        adapter_config(["model.norm.weight"], fine_tune_type="lora", **LORA)
    with pytest.raises(ValueError, match="fine_tune_type is 'full'"):
        adapter_config([], fine_tune_type="full", **LORA)


def test_equal_outputs_give_equal_bytes(tmp_path: Path) -> None:
    """A time, host or path in any file, the tokenizer's included."""
    for place in ("here", "there"):
        model = make_model("llama")
        write_base(tmp_path / place / "model", "llama", model)
        tensors = adapt(model, None, use_dora=False)
        config = adapter_config([key for key, _ in tensors], fine_tune_type="lora", **LORA)
        write_adapters(tmp_path / place, tensors, config)
    files = [path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("*") if path.is_file()]
    assert len(files) >= 6
    for file in files:
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes(), file


def test_failed_write_keeps_the_old_output(tmp_path: Path) -> None:
    """A model folder that is half old and half new after an error."""
    model = make_model("llama")
    write_base(tmp_path / "model", "llama", model)
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    class FullDisk:
        def save_pretrained(self, save_directory: str) -> None:
            raise OSError(28, "No space left on device")

    nudge_parameters(model)
    with pytest.raises(OSError, match="No space left"):
        write_model(tmp_path / "model", tree_flatten(model.parameters()), CONFIGS["llama"], FullDisk())
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_base_model_files_are_copied(tmp_path: Path) -> None:
    """A custom architecture or generation settings that the tuned model lacks; a rank without a disk that writes."""
    source = tmp_path / "base"
    source.mkdir()
    (source / "generation_config.json").write_text('{"eos_token_id": 3}')
    (source / "custom.py").write_text("x = 1\n")
    (source / "model.safetensors").write_bytes(b"not copied")
    tensors = tree_flatten(make_model("llama").parameters())
    write_model(tmp_path / "model", tensors, CONFIGS["llama"], make_tokenizer(), source=source)
    assert (tmp_path / "model" / "custom.py").read_text() == "x = 1\n"
    assert (tmp_path / "model" / "generation_config.json").exists()
    write_model(None, tensors, CONFIGS["llama"], make_tokenizer())
    write_adapters(None, tensors, {})
