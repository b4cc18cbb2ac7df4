"""Tiny models as a run trains them, batches for them, and the comparison of two steps."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tiny import make
from trainer.layers.checkpointing import checkpoint_layers
from trainer.layers.lora_matmul import use_fast_lora
from trainer.model.lora import DropoutKeys, LoRASpec, attach, find_targets
from trainer.model.method import prepare_for_training
from trainer.objectives.sft import SupervisedFineTuning
from trainer.training.loss import StepLoss

TOLERANCE = 1e-5  # float32, relative to each tensor's largest entry
# A name, and what is special: every kind of layer, method and input that the step has.
CASES = {
    "full-dense": ("qwen3", {}),
    "lora-dense-packed": ("llama", {"dropout": 0.3, "packed": True}),
    "lora-hybrid-packed-recomputed": ("qwen3_5", {"dropout": 0.3, "packed": True, "every": 1}),
    "full-experts": ("qwen3_moe", {}),
    "full-windows-packed": ("gemma3_text", {"packed": True, "every": 2}),
    "lora-hybrid-experts": ("qwen3_5_moe", {"dropout": 0.1}),
}
FULL = ("full-dense", "full-experts", "full-windows-packed")


def build(architecture, method, dropout=0.0, packed=False, every=0):
    """A tiny model and its loss."""
    model, keys = prepare_for_training(make(architecture)), DropoutKeys()
    if method == "lora":
        model.freeze()
        paths = find_targets(model, "all-linear", "all", "lora")
        attach(model, LoRASpec(paths, 4, 2.0, dropout, "lora"), keys, 0)
        use_fast_lora(model)
        model.apply_to_modules(lambda _, m: "lora_b" in m and m.update({"lora_b": m.lora_b + 0.1}))
    checkpoint_layers(model.layers, every)
    model.train()
    mx.eval(model.parameters())
    return model, StepLoss(SupervisedFineTuning(), keys, packed)


def batch_of(seed, length=48, rows=2):
    """Rows of three documents and some padding; every third token or so is a target."""
    random = np.random.RandomState(seed)
    segments = np.zeros((rows, length), np.int32)
    for row, borders in enumerate(np.sort(random.randint(2, length - 4, (rows, 2)))):
        segments[row] = 1 + (np.arange(length) >= borders[0]) + (np.arange(length) >= borders[1])
    segments[:, length - 3 :] = 0
    mask = random.rand(rows, length) < 0.4
    mask[:, 0] = False
    arrays = {
        "tokens": random.randint(0, 64, (rows, length)).astype(np.int32),
        "mask": mask & (segments > 0) & (segments == np.roll(segments, 1, axis=1)),
        "segments": segments,
        "keys": random.randint(0, 2**32, (rows, 2), dtype=np.uint32),
    }
    return {name: mx.array(value) for name, value in arrays.items()} | {"max_targets": rows * length // 2}


def assert_equal(found, expected):
    """Loss, token count and every gradient."""
    mx.eval(found, expected)
    assert found[2].item() == expected[2].item()
    assert found[0].item() == pytest.approx(expected[0].item(), rel=TOLERANCE)
    got, want = dict(tree_flatten(found[1])), dict(tree_flatten(expected[1]))
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert mx.abs(got[name] - value).max() <= TOLERANCE * max(mx.abs(value).max().item(), 1e-9), name


class Counted:
    """A loss that counts how often its code runs: once per trace."""

    def __init__(self, loss):
        self.loss, self.count = loss, 0

    def __call__(self, model, batch):
        self.count += 1
        return self.loss(model, batch)
