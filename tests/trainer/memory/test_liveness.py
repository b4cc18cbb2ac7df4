"""Memory of a computation from its graph, against counts by hand."""

import mlx.core as mx

from trainer.memory.liveness import execution_order, lifetimes
from trainer.memory.tracing import Graph, Operation, trace

KIB = 1024


def peak(function, *arguments, given_up=()):
    graph = trace(function, arguments)
    names = {graph.inputs[i]: arguments[i].nbytes for i in given_up}
    return lifetimes(graph, names).bytes_over_time().max()


def test_a_chain_needs_one_buffer():
    """Elementwise results that MLX writes in place, counted once each."""
    x = mx.zeros((256,))
    assert peak(lambda x: [mx.exp(mx.sin(x * 2.0)) + 1.0], x) == KIB


def test_a_value_needed_later_keeps_its_buffer():
    """The activations kept for the backward pass, forgotten."""
    x = mx.zeros((256,))

    def function(x):
        first = mx.exp(x)
        return [mx.sin(mx.cos(first)) * first]

    assert peak(function, x) == 2 * KIB


def test_views_cost_nothing_and_reshaped_transposes_do():
    """Transposes counted as copies, or the copy behind a transpose forgotten."""
    x = mx.zeros((16, 16))
    assert peak(lambda x: [x.T[1:3].sum()], x) < KIB
    assert peak(lambda x: [mx.exp(x).reshape(256)], x) == KIB
    assert peak(lambda x: [mx.exp(x).T.reshape(256)], x) == 2 * KIB


def test_an_input_that_is_given_up_makes_room():
    """An optimizer's old state, counted beside the new one."""
    x = mx.zeros((256,))
    assert peak(lambda x: [x * 2.0 + 1.0], x) == KIB
    assert peak(lambda x: [x * 2.0 + 1.0], x, given_up=[0]) == KIB


def test_nothing_is_evaluated():
    """A plan for a model larger than this machine that tries to make its weights."""
    huge = mx.zeros((1 << 20, 1 << 20))
    before = mx.get_active_memory()
    assert peak(lambda w: [(w @ w.T).sum()], huge) >= 1 << 42
    assert mx.get_active_memory() - before < 1 << 20


def test_order_of_execution_respects_every_input():
    """An order in which a result is read before it is made."""
    x = mx.zeros((4, 4))

    def function(x):
        for _ in range(40):
            x = mx.sin(x @ x) + x.sum() * mx.cos(x)
        return [x, x.sum()]

    graph = trace(function, [x])
    order = execution_order(graph)
    assert sorted(order) == list(range(len(graph.operations)))
    seen = set(graph.inputs) | {name for op in graph.operations for name in op.inputs}
    seen -= {name for op in graph.operations for name in op.outputs}
    for index in order:
        operation = graph.operations[index]
        assert seen.issuperset(operation.inputs)
        seen.update(operation.outputs)


def test_unread_results_are_freed():
    """The second result of an operation that nobody reads, kept for ever."""
    split = Operation("Divmod", ("x",), ("q", "r"), ((256,), (256,)), (KIB, KIB))
    use = Operation("Matmul", ("q",), ("y",), ((256,),), (KIB,))
    last = Operation("Matmul", ("y",), ("z",), ((256,),), (KIB,))
    over_time = lifetimes(Graph((split, use, last), ("x",), ("z",))).bytes_over_time()
    assert list(over_time) == [2 * KIB, 2 * KIB, 2 * KIB]
