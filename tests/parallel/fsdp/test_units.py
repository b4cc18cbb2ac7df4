"""Sharded modules on one rank and on paper: padding, dtypes, names, copies, phases."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

import comm
from members import Rank
from parallel import FullyShardedDataParallel, gather_tensors, hidden_and_head, model_layout, unwrap, value_and_grad
from parallel.fsdp.resharding import ReshardedLeaf
from parallel.layout import Segment, Split
from parallel.phases import Phases, UnitCall
from tensor_models import make_model, prepare


@pytest.mark.parametrize("rows, ranks", [(7, 2), (5, 4), (1, 3), (8, 4)])
def test_uneven_first_dimension(rows: int, ranks: int) -> None:
    """Catches lost or doubled rows where the ranks do not divide them; the padding is zeros."""
    full = mx.arange(1, rows * 3 + 1).reshape(rows, 3)
    splits = [Split("dp_shard", Rank(rank, ranks), 0, (Segment(rows),)) for rank in range(ranks)]
    slices = [split.slice(full) for split in splits]
    assert {s.shape for s in slices} == {(splits[0].local_size, 3)}, "slices must have equal shapes"
    joined = mx.concatenate(slices)
    assert mx.array_equal(joined[:rows], full) and not mx.any(joined[rows:])


@pytest.mark.parametrize("method", ["full", "qlora", "dora"])
def test_alone_it_is_the_model(method: str) -> None:
    """Catches changed names, dtypes or outputs; and weights that are not whole again after a call."""
    plain, sharded = prepare(make_model("qwen3"), method), prepare(make_model("qwen3"), method)
    FullyShardedDataParallel(sharded, comm.solo())
    tokens = mx.array([[5, 9, 2, 7]])
    kinds = [[(n, p.dtype, p.shape) for n, p in tree_flatten(m.parameters())] for m in (plain, sharded)]
    assert kinds[0] == kinds[1]
    assert mx.allclose(plain(tokens), sharded(tokens), atol=1e-5)
    trained = [[n for n, _ in tree_flatten(m.trainable_parameters())] for m in (plain, sharded)]
    assert trained[0] == trained[1], "wrapping must not unfreeze anything"


def test_research_code_gradients() -> None:
    """Catches a plain `nn.value_and_grad` on a sharded model that differs from the step's gradients."""
    plain, sharded = make_model("llama"), FullyShardedDataParallel(make_model("llama"), comm.solo())
    tokens = mx.array([[5, 9, 2, 7, 1]])

    def loss(model: nn.Module, tokens: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).mean()

    right = dict(tree_flatten(nn.value_and_grad(plain, loss)(plain, tokens)[1]))
    found = dict(tree_flatten(nn.value_and_grad(sharded, loss)(sharded, tokens)[1]))
    assert right.keys() == found.keys()
    assert all(mx.allclose(found[name], grad, atol=1e-6) for name, grad in right.items())


def test_head_outside_of_a_unit() -> None:
    """Catches a loss that is given slices instead of the head's whole weight."""
    model = FullyShardedDataParallel(make_model("llama"), comm.solo())
    hidden, head = hidden_and_head(model, mx.array([[1, 2, 3]]))
    assert mx.allclose(head(hidden), model(mx.array([[1, 2, 3]])), atol=1e-6)
    assert "Sharded" not in type(head.module).__name__, "the copy must not gather by itself"


def test_layers_stay_what_they_were() -> None:
    """Catches a wrapper that breaks `isinstance`, or a layer that lost its gradient of its own."""
    model = FullyShardedDataParallel(make_model("qwen3"), comm.solo())
    leaf = model.layers[0].mlp.up_proj
    assert isinstance(leaf, nn.Linear) and isinstance(leaf, ReshardedLeaf)
    names = [n for n, _ in tree_flatten(model.parameters())]
    assert sorted(n for n, _ in gather_tensors(model_layout(model), tree_flatten(model.parameters()))) == sorted(names)
    assert all("dp_shard" in layout.groups for layout in model_layout(model).values())
    assert type(unwrap(model)).__name__ == "Model"


def test_a_model_whose_layers_stand_elsewhere() -> None:
    """Catches a stack that is divided as one unit, or left half wrapped by the refusal."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    names = [name for name, _ in tree_flatten(model.parameters())]
    with pytest.raises(ValueError, match="where the layers of mlx.nn.layers.containers.Sequential are"):
        FullyShardedDataParallel(model, comm.solo())
    assert type(model) is nn.Sequential and [name for name, _ in tree_flatten(model.parameters())] == names


def test_a_matrix_alone_is_no_linear_layer() -> None:
    """Catches a router, which returns a choice beside the scores, being differentiated as a linear layer."""
    model = FullyShardedDataParallel(make_model("deepseek_v3"), comm.solo())
    gate = model.layers[1].mlp.gate
    assert gate.weight.ndim == 2 and not isinstance(gate, ReshardedLeaf)
    assert isinstance(model.layers[1].mlp.switch_mlp.up_proj, ReshardedLeaf)


def test_gradients_without_target_tokens() -> None:
    """Catches NaN where a batch has no target token at all."""
    model = FullyShardedDataParallel(make_model("qwen3"), comm.solo())
    batch = {"tokens": mx.array([[1, 2, 3]])}
    loss, grads, _ = value_and_grad(model, lambda m, b: (0 * m(b["tokens"]).sum(), mx.array(0)))([batch])
    mx.eval(loss, grads)
    assert loss.item() == 0 and not any(mx.any(mx.isnan(g)).item() for _, g in tree_flatten(grads))


def test_next_unit_is_gathered_before_this_one_computes() -> None:
    """Catches messages that leave only when they are needed, and weights that are held longer than their unit's turn."""
    order: list[str] = []

    class Recorded(Phases):
        def _gather(self, current: list[mx.array], following: list[mx.array]) -> None:
            order.append(f"{len(current)} then {len(following)}")
            super()._gather(current, following)

    phases = Recorded()
    with phases.recording() as trace:
        for name in ("a", "b", "c"):
            message = mx.ones((4,)) + len(order)
            trace.add(UnitCall(name, forward=[message], backward=[message * 2], outputs=message * 3))
        trace.in_backward = True
        trace.add(UnitCall("c", forward=[mx.ones((4,))]))
    calls = list(trace.calls)
    phases.evaluate_forward(trace, mx.ones(()))
    assert order == ["1 then 1", "1 then 1", "1 then 0"]
    assert all(not call.forward and call.outputs is None for call in calls), "forward weights must be let go"
    phases.evaluate_backward(trace, {"a": {"w": mx.ones((1,))}})
    assert order[3:] == ["1 then 1", "1 then 1", "1 then 0"] and not trace.calls and not trace.recomputed
    assert phases.peak_gathered_bytes == 32
