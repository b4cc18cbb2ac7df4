"""Small models on the device in use: loss and every gradient of a step against the same step on the CPU."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

import comm
from trainer.build import Run, build
from trainer.data import synthetic_rows
from trainer.recipe.config import Recipe
from trainer.recipe.load import recipe_from
from trainer.selftest.operations import relative_distance
from trainer.selftest.outcome import Check

SECTION = "models against the CPU"
BOUND = 1e-4  # of each gradient's largest entry, float32; kernels of devices round in other orders
REDUCED_BOUND = 3e-2  # where float32 products have fewer bits
NUM_ROWS = 24

QWEN3 = {
    "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 320, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512, "rope_theta": 1e4,
}  # fmt: skip
QWEN3_5 = {
    "model_type": "qwen3_5",
    "text_config": QWEN3 | {
        "model_type": "qwen3_5_text", "tie_word_embeddings": False, "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4, "full_attention_interval": 4,
    },
}  # fmt: skip
MODELS = {"Qwen3": QWEN3, "Qwen3.5": QWEN3_5}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"method": "lora"},
    "QLoRA": {"method": "lora", "model": {"quantize": {"bits": 4, "group_size": 32}}},
    "full": {"method": "full"},
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointed": {"gradient_checkpointing": True},
    "packed": {"data": {"packing": True}},
    "compiled": {},
}


def model_checks(folder: Path, has_reduced_products: bool) -> list[Check]:
    """Each model, method and way to compute a step; compiled steps on GPUs only.

    Args:
        folder: Gets the rows.
        has_reduced_products: Products of float32 on this device have fewer bits.
    """
    write_rows(folder)
    bound = REDUCED_BOUND if has_reduced_products else BOUND
    ways = [way for way in WAYS if way != "compiled" or mx.default_device() == mx.gpu]
    return [
        Check(SECTION, f"{model}, {method}, {way}", bound, partial(_distance, folder, model, method, way))
        for model in MODELS
        for method in METHODS
        for way in ways
    ]


def write_rows(folder: Path) -> None:
    """The rows that the small models train on."""
    lines = (json.dumps(row) + "\n" for row in synthetic_rows("sql", "train", 0)[:NUM_ROWS])
    (folder / "rows.jsonl").write_text("".join(lines))


def recipe_of(folder: Path, model: str, settings: dict[str, Any]) -> Recipe:
    """A recipe for one of `MODELS` over the written rows, in float32; `settings` by section, as in a YAML file."""
    values: dict[str, Any] = {
        "model": {"config": MODELS[model], "tokenizer": "bpe:300", "dtype": "float32"},
        "data": {"train": str(folder / "rows.jsonl"), "max_seq_len": 96, "packing": False, "val_fraction": 0.0},
        "lora": {"rank": 4, "dropout": 0.0},
        "batch_size_per_device": 2,
        "output_dir": str(folder / "run"),
    }
    for name, value in settings.items():
        values[name] = values.get(name, {}) | value if isinstance(value, dict) else value
    return recipe_from(values)


def first_step(run: Run) -> dict[str, mx.array]:
    """Loss and gradients of a run's first step, by name; every adapter has a product other than 0."""
    loss, grads, _ = run.step_fn(run.batches.make(0).arrays())
    found = {"loss": loss, **dict(comm.named_arrays(grads))}
    mx.eval(found)
    return found


def filled(run: Run) -> Run:
    """The run whose adapters' second factors, which start as 0, hold numbers, so that every gradient shows."""
    for path, module in run.model.named_modules():
        if "lora_b" in module:
            key = mx.random.key(sum(path.encode()))
            module["lora_b"] = (0.1 * mx.random.normal(module["lora_b"].shape, key=key)).astype(module["lora_b"].dtype)
    return run


def _distance(folder: Path, model: str, method: str, way: str) -> tuple[float, str]:
    """From the plain way on the CPU, of the same lines of rows."""
    plain = METHODS[method] | (WAYS[way] if way == "packed" else {})
    recipe = recipe_of(folder, model, METHODS[method] | WAYS[way])
    with _device(mx.cpu):
        exact = filled(_built(recipe_of(folder, model, plain), compiled=False))
        weights = exact.model.parameters()
        wanted = first_step(exact)
    run = _built(recipe, compiled=way == "compiled")
    run.model.update(weights)
    found = first_step(run)
    errors = {name: relative_distance(found[name], wanted[name]) for name in wanted}
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst


def _built(recipe: Recipe, compiled: bool) -> Run:
    return build(recipe, comm.solo(), lambda line: None, compile_step=compiled)


@contextmanager
def _device(device: Any) -> Iterator[None]:
    """MLX's default device for a while."""
    before = mx.default_device()
    mx.set_default_device(device)
    try:
        yield
    finally:
        mx.set_default_device(before)
