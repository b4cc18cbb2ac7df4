"""Short runs on the tiny checkpoints of tests/reference, to be exported."""

import json
from pathlib import Path

import mlx.core as mx
from mlx_lm import load

from trainer.__main__ import main
from training import train_with_recipe

DATA = Path(__file__).parents[2] / "reference" / "data"
PROBE = [[5, 9, 31, 7, 120, 64, 3, 250, 11, 77, 8, 19], [1, 2, 300, 44, 45, 46, 201, 7, 7, 90, 33, 12]]

RECIPE = """
model: {model}
method: {method}
lora: {lora}
data: {{train: {rows}, max_seq_len: 64, shuffle: false}}
batch_size_per_device: 2
max_steps: 3
optimizer: {{lr: 1e-2}}
checkpoint: {{every: 2, resume: none}}
logging: {{every: 1}}
output_dir: {output}
"""


# A random start: a mixture of experts with the tokenizer of the qwen3 checkpoint.
EXPERTS = {
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "vocab_size": 320,
}


def train_run(
    folder: Path, architecture: str, method: str, *, lora: dict | None = None, quantize: dict | None = None
) -> Path:
    """Three steps, with a checkpoint after the second; returns the output folder.

    Args:
        folder: gets the recipe and the output.
        architecture: a checkpoint of tests/reference, or "experts" for a random start.
        method, lora, quantize: as in a recipe.
    """
    if architecture == "experts":
        model = {"config": EXPERTS, "tokenizer": str(DATA / "qwen3")}
    else:
        model = {"path": str(DATA / architecture)}
    text = RECIPE.format(
        model=json.dumps(model | {"dtype": "float32", "quantize": quantize}),
        method=method,
        lora=json.dumps(lora or {}),
        rows=DATA / "train.jsonl",
        output=folder / "output",
    )
    train_with_recipe(text, folder)
    return folder / "output"


def export(run: Path, *words: str) -> int:
    """`python -m trainer export RUN ...`; returns the exit code."""
    return main(["export", str(run), *words])


def tuned_logits(architecture: str, run: Path) -> mx.array:
    """Logits of base and adapter, both opened by mlx-lm."""
    model, _ = load(str(DATA / architecture), adapter_path=str(run))
    return model(mx.array(PROBE))


def model_logits(folder: Path) -> mx.array:
    """Logits of a model folder, opened by mlx-lm."""
    model, _ = load(str(folder))
    return model(mx.array(PROBE))


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a PEFT folder."""
    return {name: value.shape for name, value in mx.load(str(folder / "adapter_model.safetensors")).items()}
