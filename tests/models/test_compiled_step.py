"""The compiled step gives the uncompiled step's loss and gradients, and is traced once per shape.

By default kernels are not fused, so that no C++ compiler runs: tracing, inputs and the graph's simplification are
what the step's exactness depends on. With `--exhaustive` everything runs.
"""

import mlx.core as mx
import numpy as np
import pytest
from compile_mode import WITH_FUSION, WITHOUT_FUSION, compiling
from mlx.utils import tree_flatten
from tiny import make

import comm
from parallel import FullyShardedDataParallel, TensorParallel, value_and_grad
from trainer.lora import DropoutKeys, LoRASpec, attach, find_targets
from trainer.loss import TokenLoss
from trainer.models.checkpointing import checkpoint_layers
from trainer.models.lora_matmul import use_fast_lora
from trainer.models.prepare import prepare_for_training

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


@pytest.fixture(params=[WITHOUT_FUSION, WITH_FUSION], ids=["unfused", "fused"])
def compiling_on(request):
    """Compiling is on in the test, though off in the suite."""
    if request.param == WITH_FUSION:
        request.getfixturevalue("exhaustive")
    with compiling(request.param):
        yield


def build(architecture, method, dropout=0.0, packed=False, every=0):
    """A tiny model as a run trains it, and its loss."""
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
    return model, TokenLoss(keys, packed)


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


@pytest.mark.parametrize("name", CASES)
def test_equals_the_uncompiled_step(compiling_on, name):
    """Catches dropout keys, segments, experts' choices or recomputed layers that a trace has frozen, and gradients
    that change when equal parts of the graph are merged: two different batches of one shape, accumulated.
    """
    architecture, options = CASES[name]
    model, loss = build(architecture, "full" if name in FULL else "lora", **options)
    plain, compiled = value_and_grad(model, loss), value_and_grad(model, loss, compile_local=True)
    for batches in ([batch_of(1)], [batch_of(2), batch_of(3)]):
        assert_equal(compiled(batches), plain(batches))


class Counted:
    """A loss that counts how often its code runs: once per trace."""

    def __init__(self, loss):
        self.loss, self.count = loss, 0

    def __call__(self, model, batch):
        self.count += 1
        return self.loss(model, batch)


def test_traced_once_per_shape(compiling_on):
    """Catches a trace per step, per micro-batch or per optimizer update, which is kept for ever."""
    model, loss = build("qwen3", "lora", dropout=0.1, packed=True)
    counted = Counted(loss)
    step = value_and_grad(model, counted, compile_local=True)
    lengths = (16, 24, 16, 24, 24)
    for seed, length in enumerate(lengths):
        _, grads, _ = step([batch_of(seed, length), batch_of(seed + 9, length)])
        update = {n: p - 0.1 * g for (n, p), (_, g) in zip(*map(tree_flatten, (model.trainable_parameters(), grads)))}
        model.load_weights(list(update.items()), strict=False)
        mx.eval(model.parameters())
        assert counted.count == len(set(lengths[: seed + 1]))


@pytest.mark.parametrize("wrapper", [FullyShardedDataParallel, TensorParallel])
def test_messages_stay_out_of_traces(wrapper):
    """Catches a compiled step under a wrapper that communicates, or evaluates, inside it."""
    model, loss = build("qwen3", "full")
    counted = Counted(loss)
    with compiling():
        step = value_and_grad(wrapper(model, comm.solo()), counted, compile_local=True)
        for _ in range(2):
            mx.eval(step([batch_of(0)]))
    assert counted.count == 2


def test_no_array_is_caught_in_a_trace(compiling_on):
    """Catches frozen or trained weights that stay those of the first call, and tracers left in the model."""
    model, loss = build("qwen3", "lora")
    plain, compiled = value_and_grad(model, loss), value_and_grad(model, loss, compile_local=True)
    mx.eval(compiled([batch_of(0)]))
    mx.eval(model.parameters())
    scaled = [(name, value * 1.5) for name, value in tree_flatten(model.parameters())]
    model.load_weights(scaled)
    assert_equal(compiled([batch_of(0)]), plain([batch_of(0)]))


def test_weights_and_gradients_are_kept_once(compiling_on):
    """Catches a trace that keeps the arrays of its first call, and a step that keeps gradients it has given away."""
    model, loss = build("qwen3", "full")
    step = value_and_grad(model, loss, compile_local=True)
    mx.eval(step([batch_of(0)]))
    before = mx.get_active_memory()
    model.apply(lambda x: x + 1)
    mx.eval(model.parameters())
    mx.eval(step([batch_of(1)]))
    # A batch has some bytes of its own.
    assert mx.get_active_memory() - before < 4096
