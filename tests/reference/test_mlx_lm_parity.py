"""The trainer against `mlx_lm.tuner.train`: same model, rows and optimizer, so the same losses.

mlx-lm's loss also counts the padding token that follows a short row. Rows here are cut to one length, where its
definition and ours agree. Its batches come in an order drawn from NumPy's global generator, which is drawn again.
"""

import json
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, train as mlx_lm_train
from mlx_lm.tuner.utils import linear_to_lora_layers

from training import train_with_recipe

DATA = Path(__file__).parent / "data"
MODEL = DATA / "qwen3"
LENGTH = 48
BATCH_SIZE = 4
NUM_EPOCHS = 2
LEARNING_RATE = 1e-3
NUMPY_SEED = 5
LORA = {"rank": 8, "scale": 2.0, "dropout": 0.0}

RECIPE = """
model: {{path: {model}, dtype: float32}}
method: {method}
lora: {{init_from: {adapter}}}
data: {{train: {rows}, max_seq_len: {length}, packing: false, group_by_length: false, shuffle: false}}
batch_size_per_device: {batch_size}
optimizer: {{name: adam, lr: {lr}, bias_correction: false}}
schedule: {{name: constant}}
max_grad_norm: null
checkpoint: {{every: 1000000, resume: none}}
logging: {{every: 1}}
output_dir: {output}
"""


class Losses(TrainingCallback):
    """Collects mlx-lm's training losses."""

    def __init__(self):
        self.values: list[float] = []

    def on_train_loss_report(self, train_info: dict) -> None:
        self.values.append(train_info["train_loss"])


def long_texts(tokenizer) -> list[str]:
    """Texts of at least LENGTH tokens: eight rows of the reference data each."""
    texts = [json.loads(line)["text"] for line in (DATA / "train.jsonl").read_text().splitlines()]
    joined = [" ".join(texts[i : i + 8]) for i in range(0, len(texts), 8)]
    assert min(len(tokenizer.encode(text)) for text in joined) >= LENGTH, "mlx-lm would count padding as a target"
    return joined


def mlx_lm_losses(method: str, folder: Path) -> tuple[list[float], list[str]]:
    """Train with mlx-lm; returns its loss of every step and the rows in the order in which it took them."""
    model, tokenizer = load(str(MODEL))
    texts = long_texts(tokenizer)
    if method == "lora":
        mx.random.seed(3)
        model.freeze()
        linear_to_lora_layers(model, len(model.layers), LORA)
        mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
        config = {"fine_tune_type": "lora", "num_layers": len(model.layers), "lora_parameters": LORA}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    num_batches = len(texts) // BATCH_SIZE
    np.random.seed(NUMPY_SEED)
    orders = [np.random.permutation(num_batches) for _ in range(NUM_EPOCHS)]
    taken = [texts[b * BATCH_SIZE + i] for order in orders for b in order for i in range(BATCH_SIZE)]

    np.random.seed(NUMPY_SEED)
    losses = Losses()
    args = TrainingArgs(
        batch_size=BATCH_SIZE,
        iters=num_batches * NUM_EPOCHS,
        steps_per_report=1,
        max_seq_length=LENGTH,
        adapter_file=str(folder / "trained.safetensors"),
    )
    dataset = [(tokenizer.encode(text)[:LENGTH], 0) for text in texts]
    mlx_lm_train(model, optim.Adam(LEARNING_RATE), dataset, args=args, training_callback=losses)
    return losses.values, taken


def trainer_losses(method: str, texts: list[str], folder: Path) -> list[float]:
    """Train the same rows in the same order with this package; returns the loss of every step."""
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = RECIPE.format(
        model=MODEL,
        method=method,
        adapter=folder if method == "lora" else "null",
        rows=folder / "rows.jsonl",
        length=LENGTH,
        batch_size=BATCH_SIZE,
        lr=LEARNING_RATE,
        output=folder / "output",
    )
    return [row["train/loss"] for row in train_with_recipe(recipe, folder)]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_losses_equal_mlx_lm(method, tmp_path):
    """Catches: a drift from mlx-lm in loss, LoRA layers, adapter import or Adam without bias correction."""
    expected, texts = mlx_lm_losses(method, tmp_path)
    losses = trainer_losses(method, texts, tmp_path)
    assert expected[0] - expected[-1] > 0.1, f"the comparison run does not learn: {expected}"
    assert losses == pytest.approx(expected, abs=1e-5), f"{method}: {losses} instead of {expected}"
