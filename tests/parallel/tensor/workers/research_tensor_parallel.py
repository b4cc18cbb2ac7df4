"""Tensor parallelism in research code: a model of your own, then an mlx-lm model; the same on 1 and on N ranks.

    python research_tensor_parallel.py                                      one process
    python -m comm launch -n 2 -- python research_tensor_parallel.py MODEL   two; MODEL is a folder or a Hugging Face name
"""

import sys

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm import load, stream_generate

from parallel import TensorParallel, clip_grad_norm, cross_entropy, hidden_and_head, init, shard_linear, value_and_grad


class FeedForward(nn.Module):
    """Two linears; the first one's outputs and the second one's inputs are divided over the ranks."""

    def __init__(self, dims: int, hidden_dims: int, group):
        super().__init__()
        self.up = shard_linear(nn.Linear(dims, hidden_dims), "all-to-sharded", group=group)
        self.down = shard_linear(nn.Linear(hidden_dims, dims), "sharded-to-all", group=group)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down(nn.gelu(self.up(x)))


def train_own_model(group) -> list[float]:
    """A custom model with plain MLX: `nn.value_and_grad` gives final gradients."""
    mx.random.seed(0)  # the same weights on every rank, before they are divided
    model = FeedForward(32, 128, group)
    optimizer = optim.SGD(0.05)
    x = mx.random.normal((64, 32), key=mx.random.key(1))

    def loss_fn(model, x):
        return (model(x) - mx.sin(3 * x)).square().mean()

    losses = []
    for _ in range(20):
        loss, grads = nn.value_and_grad(model, loss_fn)(model, x)
        grads, _ = clip_grad_norm(grads, 1.0, model)  # the norm of the whole model
        optimizer.update(model, grads)
        mx.eval(loss, model.parameters(), optimizer.state)
        losses.append(loss.item())
    return losses


def token_loss(model, batch):
    """Summed loss and number of targets; each rank has the logits of its slice of the vocabulary."""
    hidden, head = hidden_and_head(model, batch["tokens"])
    losses = cross_entropy(head(hidden[:, :-1]), batch["tokens"][:, 1:], head.group, head.first)
    mask = batch["mask"][:, 1:]
    return mx.where(mask, losses, 0.0).sum(), mask.sum()


def train_language_model(path: str, group) -> tuple[list[float], str]:
    """An mlx-lm model: each rank loads and keeps only its slices; then training and generation."""
    model, tokenizer = load(path, lazy=True)
    model = TensorParallel(model, group).train()
    tokens = mx.array([tokenizer.encode("To be, or not to be, that is the question.")])
    batch = {"tokens": tokens, "mask": mx.arange(tokens.shape[1])[None] > 0, "segments": mx.ones_like(tokens)}
    optimizer = optim.AdamW(1e-3)
    step = value_and_grad(model, token_loss)
    losses = []
    for _ in range(10):
        loss, grads, weight = step([batch])
        optimizer.update(model, grads)
        mx.eval(loss, model.parameters(), optimizer.state)
        losses.append(loss.item())
    model.eval()
    prompt = tokenizer.encode("To be, or")
    text = "".join(part.text for part in stream_generate(model, tokenizer, prompt, max_tokens=8))
    return losses, text


if __name__ == "__main__":
    group = init()
    own = train_own_model(group)
    language, text = train_language_model(sys.argv[1] if len(sys.argv) > 1 else "Qwen/Qwen3-0.6B", group)
    if group.rank == 0:
        print(f"own model:      loss {own[0]:.6f} -> {own[-1]:.6f}")
        print(f"language model: loss {language[0]:.6f} -> {language[-1]:.6f}, then {text!r}")
