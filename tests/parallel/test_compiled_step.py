"""The compiled step gives the uncompiled step's loss and gradients, and is traced once per shape.

By default kernels are not fused, so that no C++ compiler runs: tracing, inputs and the graph's simplification are
what the step's exactness depends on. With `--exhaustive` everything runs.
"""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import comm
from compile_mode import WITH_FUSION, WITHOUT_FUSION, compiling
from parallel import FullyShardedDataParallel, TensorParallel, value_and_grad
from steps import CASES, FULL, Counted, assert_equal, batch_of, build


@pytest.fixture(
    params=[
        pytest.param(WITHOUT_FUSION, id="unfused"),
        pytest.param(WITH_FUSION, id="fused", marks=pytest.mark.exhaustive),
    ]
)
def compiling_on(request):
    """Compiling is on in the test, though off in the suite."""
    with compiling(request.param):
        yield


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
