"""What the parity tests train: cases, a loss through `hidden_and_head`, and a few optimizer steps."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from parallel import clip_grad_norm, cross_entropy, hidden_and_head, value_and_grad
from ranks import ROOT
from tensor_models import METHODS, make_model, prepare

# Where the workers find what they import.
PATHS = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "helpers", ROOT / "tests" / "parallel" / "tensor")))
TIMEOUT_SECONDS = 300
NUM_STEPS = 20
Batches = Callable[[int], list[dict[str, mx.array]]]
ROWS, TOKENS = 2, 13
MAIN_CASES = [f"{a}:{m}" for a in ("llama", "qwen3", "qwen3_moe", "qwen3_5") for m in METHODS]
OTHERS = ("mistral", "qwen2", "qwen2_moe", "qwen3_5_moe", "gemma3", "granite", "phi3", "smollm3")
LORA_CASES = [f"{a}:lora" for a in OTHERS]
SHORT_CASES = ["llama:full", "qwen3:lora", "qwen3_moe:dora", "qwen3_5:qlora", "phi3:lora"]


@dataclass(frozen=True)
class Case:
    """An architecture and a method, named "architecture:method"."""

    name: str

    @property
    def architecture(self) -> str:
        """Key of `tensor_models.ARCHITECTURES`."""
        return self.name.split(":")[0]

    @property
    def method(self) -> str:
        """One of `tensor_models.METHODS`."""
        return self.name.split(":")[1]

    @property
    def num_steps(self) -> int:
        """Optimizer steps compared: 20 for the main cases."""
        return NUM_STEPS if self.name in MAIN_CASES else 4

    def model(self) -> nn.Module:
        """The whole model, equal in every process."""
        return prepare(make_model(self.architecture), self.method)


def batch(step: int) -> dict[str, mx.array]:
    """Random tokens of one step; the first row's last tokens are padding."""
    tokens = mx.random.randint(0, 128, (ROWS, TOKENS), key=mx.random.key(100 + step))
    positions = mx.arange(TOKENS)[None]
    mask = (positions > 0) & (positions < mx.array([[TOKENS - 3], [TOKENS]]))
    return {"tokens": tokens, "mask": mask, "segments": mx.ones((ROWS, TOKENS), dtype=mx.int32)}


def loss_fn(model: nn.Module, batch: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
    """Summed token losses from vocabulary slices, and their number."""
    hidden, head = hidden_and_head(model, batch["tokens"])
    losses = cross_entropy(head(hidden[:, :-1]), batch["tokens"][:, 1:], head.group, head.first)
    mask = batch["mask"][:, 1:]
    return mx.where(mask, losses, 0.0).sum(), mask.sum()


def logits_loss(model: nn.Module, tokens: mx.array) -> mx.array:
    """Mean loss from the logits of the whole vocabulary, as research code writes it."""
    return nn.losses.cross_entropy(model(tokens[:, :-1]).astype(mx.float32), tokens[:, 1:]).mean()


def first_gradients(model: nn.Module) -> tuple[mx.array, dict[str, mx.array]]:
    """Loss and gradients of `nn.value_and_grad` at the initial weights."""
    model.train()
    loss, grads = nn.value_and_grad(model, logits_loss)(model, batch(0)["tokens"])
    mx.eval(loss, grads)
    return loss, dict(tree_flatten(grads))


def train_on(model: nn.Module, batches: Batches, num_steps: int) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of AdamW steps with clipping; `batches` gives the micro-batches of a step."""
    optimizer = optim.AdamW(1e-3, bias_correction=True)
    step = value_and_grad(model, loss_fn)
    losses, norms = [], []
    for i in range(num_steps):
        loss, grads, _ = step(batches(i))
        grads, norm = clip_grad_norm(grads, 1.0, model)
        optimizer.update(model, grads)
        mx.eval(loss, norm, model.parameters(), optimizer.state)
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms


def train(model: nn.Module, num_steps: int = NUM_STEPS, *shares: slice) -> tuple[list[float], list[float]]:
    """As `train_on`, with the rows of `batch`; `shares` are those of each micro-batch (all)."""

    def micro_batches(step: int) -> list[dict[str, mx.array]]:
        whole = batch(step)
        return [{key: array[rows] for key, array in whole.items()} for rows in shares or [slice(None)]]

    return train_on(model.train(), micro_batches, num_steps)


def relative_error(value: mx.array, right: mx.array) -> float:
    """Largest difference over the largest magnitude."""
    return (mx.abs(value - right).max() / mx.maximum(mx.abs(right).max(), 1e-12)).item()


def worst(errors: dict[str, float]) -> tuple[str, float]:
    """The name with the largest error, and that error; NaN counts as the largest."""
    name = max(errors, key=lambda k: float("inf") if errors[k] != errors[k] else errors[k])
    return name, errors[name]


def summary(values: Any) -> Any:
    """JSON-able copy of nested tuples."""
    return [summary(v) for v in values] if isinstance(values, (list, tuple)) else values
