"""What a LoRA step does not compute, counted in its graph: gradients of frozen weights, and anything backward below
the first adapter.
"""

from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from tiny import CONFIGS, make
from trainer.layers.lora_matmul import use_fast_lora
from trainer.memory.tracing import trace
from trainer.model.lora import DropoutKeys, LoRASpec, attach, find_targets
from trainer.model.method import prepare_for_training
from trainer.objectives.sft import SupervisedFineTuning
from trainer.training.loss import StepLoss

ARCHITECTURES = ("llama", "qwen3_5")
PRODUCTS = ("Matmul", "AddMM")
TOKENS = 26  # no size of the models


def products(architecture: str, num_layers: int, adapted: int | None, with_gradients: bool = True) -> Counter:
    """Matrix products of a step by the shape of their last two dims.

    Args:
        architecture: of a tiny model with all weights of a layer, and the head, in place.
        num_layers: of the model.
        adapted: last layers that get LoRA; None = every parameter is trained.
        with_gradients: False counts the forward pass alone.
    """
    depth = {"num_hidden_layers": num_layers}
    if "text_config" in CONFIGS[architecture]:
        depth = {"text_config": CONFIGS[architecture]["text_config"] | depth}
    model, keys = prepare_for_training(make(architecture, **depth)), DropoutKeys()
    if adapted is not None:
        model.freeze()
        paths = find_targets(model, "all-linear", adapted, "lora")
        attach(model, LoRASpec(paths, 3, 2.0, 0.0, "lora"), keys, 0)
        use_fast_lora(model)
    mx.eval(model.parameters())
    batch = {
        "tokens": mx.zeros((1, TOKENS), mx.int32),
        "mask": mx.arange(TOKENS)[None] > 0,
        "keys": mx.zeros((1, 2), mx.uint32),
    }
    loss = StepLoss(SupervisedFineTuning(), keys, packed=False)
    names, values = zip(*tree_flatten(model.trainable_parameters()))

    def step(*arrays: mx.array) -> list[mx.array]:
        model.load_weights(list(zip(names, arrays)), strict=False)
        if not with_gradients:
            return list(loss(model, batch))
        (total, _), grads = nn.value_and_grad(model, loss)(model, batch)
        return [total, *(grad for _, grad in tree_flatten(grads))]

    operations = trace(step, list(values)).operations
    return Counter(op.shapes[0][-2:] for op in operations if op.name in PRODUCTS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_gradient_of_a_frozen_weight(architecture):
    """Catches a product as large as a weight: full training has one per matrix, LoRA none."""
    # The gradient of an MLP matrix is (48, 32) or (32, 48), and no activation of these models is.
    sizes = [(48, 32), (32, 48)]
    full, lora = (products(architecture, 2, adapted) for adapted in (None, 2))
    assert sum(full[size] for size in sizes) == 2 * 3
    assert sum(lora[size] for size in sizes) == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_differentiated_below_the_first_adapter(architecture):
    """Catches a backward pass through frozen lower layers: its cost must not grow with their number."""
    backward = [
        (products(architecture, depth, 1) - products(architecture, depth, 1, with_gradients=False)).total()
        for depth in (2, 4)
    ]
    assert backward[0] == backward[1] > 0
