"""Traced graphs: hand-written gradients and checkpointed parts in their right places."""

from collections import Counter

import mlx.core as mx
import pytest

from trainer.memory.liveness import lifetimes
from trainer.memory.tracing import trace


def square_of_sine(x: mx.array) -> mx.array:
    """With a gradient by hand that uses tan, which nothing else here does."""

    @mx.custom_function
    def run(x: mx.array) -> tuple[mx.array, mx.array]:
        kept = mx.sin(x)
        return kept * kept, kept

    @run.vjp
    def run_vjp(x, cotangents, outputs):
        return mx.tan(x) * outputs[1] * cotangents[0]

    return run(x)[0]


def names(function, *arguments) -> Counter:
    return Counter(operation.name for operation in trace(function, arguments).operations)


def test_a_hand_written_gradient_is_used():
    """The gradient that MLX would have derived, traced instead of the one that is run."""
    found = names(lambda x: [mx.grad(lambda x: square_of_sine(x * 2.0).sum())(x)], mx.zeros((4, 8)))
    assert found["Tan"] == 1 and found["Sin"] == 1 and found["Cos"] == 0


def test_no_marker_is_left():
    """Markers counted as part of the computation, or a graph that depends on itself."""
    x, w = mx.zeros((4, 8)), mx.zeros((8, 8))

    def loss(x, w):
        for _ in range(3):
            x = square_of_sine(x @ w) + x
        return x.sum()

    graph = trace(lambda x, w: list(mx.grad(loss, argnums=(0, 1))(x, w)), [x, w])
    found = Counter(operation.name for operation in graph.operations)
    assert found["AsStrided"] == 0 and found["Tan"] == 3 and len(graph.outputs) == 2
    lifetimes(graph)


def test_the_forward_pass_alone_has_no_backward_pass():
    """Backward passes counted in validation, which has none."""
    assert names(lambda x: [square_of_sine(x)], mx.zeros((4, 8)))["Tan"] == 0


def test_hand_written_gradients_inside_each_other():
    """A gradient inside a function with a gradient by hand, lost or kept although it is not used."""

    def outer(x):
        @mx.custom_function
        def run(x):
            value, gradient = mx.value_and_grad(lambda x: square_of_sine(x).sum())(x)
            return value, gradient

        @run.vjp
        def run_vjp(x, cotangents, outputs):
            return outputs[1] * cotangents[0]

        return run(x)[0]

    assert names(lambda x: [mx.grad(outer)(x)], mx.zeros((4, 8)))["Tan"] == 1


def test_a_checkpointed_part_is_computed_twice_and_keeps_its_input_only():
    """A plan that shows no saving from gradient checkpointing."""

    up, down, x = mx.zeros((16, 256)), mx.zeros((256, 16)), mx.zeros((64, 16))

    def inside(arrays, x):
        return mx.exp(x @ arrays[0]) @ arrays[1] + x

    def gradient(block):
        def loss(up, down, x):
            for _ in range(12):
                x = block([up, down], x)
            return x.square().sum()

        return lambda *arrays: [mx.grad(loss, argnums=2)(*arrays)]

    blocks = (inside, lambda arrays, x: mx.checkpoint(inside)(arrays, x))
    plain, checkpointed = (trace(gradient(block), [up, down, x]) for block in blocks)
    count = [sum(op.name == "Exp" for op in graph.operations) for graph in (plain, checkpointed)]
    assert count == [12, 24]
    peaks = [lifetimes(graph).bytes_over_time().max() for graph in (plain, checkpointed)]
    assert peaks[1] < 0.6 * peaks[0]


def test_mlx_is_left_as_it_was():
    """Stand-ins that stay in MLX after a trace, also one that fails, and reach a run's real steps."""
    names = ("custom_function", "checkpoint", "contiguous")
    before = [getattr(mx, name) for name in names]
    trace(lambda x: [square_of_sine(mx.contiguous(x.T))], [mx.zeros((4, 8))])
    with pytest.raises(ZeroDivisionError):
        trace(lambda x: [x / (1 // 0)], [mx.zeros((4, 8))])
    assert [getattr(mx, name) for name in names] == before


def test_arguments_of_other_kinds_have_no_gradient():
    """Integers or numbers of no dimension among the arguments, which the links between passes must leave out or fit."""

    def chosen(x, scale, index):
        @mx.custom_function
        def run(x, scale, index):
            return x[index] * scale, index

        @run.vjp
        def run_vjp(primals, cotangents, outputs):
            return mx.tan(primals[0]), mx.tanh(cotangents[0].sum()), primals[2]

        return run(x, scale, index)[0].sum()

    found = names(lambda *a: list(mx.grad(chosen, argnums=(0, 1))(*a)), mx.zeros((4, 8)), mx.array(2.0), mx.array([1]))
    assert found["Tan"] == found["Tanh"] == 1
