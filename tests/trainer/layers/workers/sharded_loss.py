"""A prepared Qwen3.5 with LoRA (also on the head) and packed rows under TensorParallel: loss and gradients against
one device.
"""

import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

import comm
from parallel import Head, TensorParallel, gather_tensors, hidden_and_head, model_layout
from trainer.layers.checkpointing import checkpoint_layers
from trainer.layers.linear_cross_entropy import linear_cross_entropy
from trainer.layers.lora_matmul import use_fast_lora
from trainer.layers.token_log_probs import token_log_probs
from trainer.model.lora import DropoutKeys, LoRASpec, attach, find_targets
from trainer.model.method import prepare_for_training

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny import make

TOKENS = mx.random.randint(0, 64, (2, 80), key=mx.random.key(0))
SEGMENTS = mx.array([[1] * 80, [1] * 23 + [2] * 50 + [0] * 7])
IDS = mx.concatenate([TOKENS[:, 1:, None], mx.random.randint(0, 64, (2, 79, 2), key=mx.random.key(2))], axis=-1)
WEIGHTS = mx.random.normal((2, 79, 3), key=mx.random.key(3))
MASK = mx.random.uniform(shape=(2, 79), key=mx.random.key(1)) < 0.6


def model(full: bool) -> nn.Module:
    """The model as the trainer builds it, before wrappers; every parameter has a value other than 0."""
    built = prepare_for_training(make("qwen3_5"))
    if not full:
        built.freeze()
        targets = (*find_targets(built, "all-linear", "all", "lora"), *find_targets(built, ["lm_head"], "all", "lora"))
        attach(built, LoRASpec(targets, 4, 2.0, 0.0, "lora"), DropoutKeys(), seed=0)
        for layer in built.modules():
            if "lora_b" in layer:
                layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(layer.lora_b.size))
        use_fast_lora(built)
    return built.train()


def cross_entropy(hidden: mx.array, head: Head) -> mx.array:
    """Sum of the target tokens' losses."""
    return linear_cross_entropy(hidden, head, TOKENS[:, 1:], MASK)[0]


def log_probs(hidden: mx.array, head: Head) -> mx.array:
    """Log-probabilities of three ids of each target token, weighted."""
    return (token_log_probs(hidden, head, IDS, MASK) * WEIGHTS).sum()


def loss_and_grads(built: nn.Module, of_hidden: Callable) -> tuple[float, dict[str, mx.array]]:
    """The loss and all gradients, whole."""

    def loss(built: nn.Module) -> mx.array:
        hidden, head = hidden_and_head(built, TOKENS, SEGMENTS)
        return of_hidden(hidden[:, :-1], head)

    value, grads = nn.value_and_grad(built, loss)(built)
    mx.eval(value, grads)
    return value.item(), dict(tree_flatten(grads))


def main() -> None:
    """One RESULT line with the worst relative errors."""
    group, result = comm.init(), {}
    for full, of_hidden in product((False, True), (cross_entropy, log_probs)):
        expected, expected_grads = loss_and_grads(model(full), of_hidden)
        sharded = TensorParallel(model(full), group)
        checkpoint_layers(sharded.layers, 2)
        value, local = loss_and_grads(sharded, of_hidden)
        grads = dict(gather_tensors(model_layout(sharded), local.items()))
        norm = lambda x: mx.linalg.norm(x.reshape(-1)).item()
        errors = {name: norm(grads[name] - want) / norm(want) for name, want in expected_grads.items()}
        worst = max(errors, key=errors.get)
        result[f"{of_hidden.__name__} {'full' if full else 'lora'}"] = [abs(value / expected - 1), errors[worst], worst, len(errors)]
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
