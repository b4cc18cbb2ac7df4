"""What a wrapper does to a module, with a group of one rank: the same object, its names and flags, and back again."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

import comm
from parallel import DataParallel, FullyShardedDataParallel, PipelineParallel, TensorParallel, unwrap
from parallel.extension import class_before, extend, extended_class, overridden_class
from parallel.wrapper import ParallelState, Wrapper, parallel_state, without_gradient
from tiny import make

TOKENS = mx.array([[5, 9, 2, 7]])


class Outer(Wrapper):
    """A wrapper that only notes its group."""

    def __init__(self, module: nn.Module, group: comm.Group | None = None):
        self.join("tp", group)


class Inner(Wrapper):
    """Another one."""

    def __init__(self, module: nn.Module, group: comm.Group | None = None):
        self.join("dp_replicate", group)


class Layer(nn.Module):
    """A parameter of its own, and one of a child."""

    def __init__(self):
        super().__init__()
        self.scale = mx.ones(3)
        self.child = nn.Linear(3, 3)

    def __call__(self, x: mx.array) -> mx.array:
        return self.child(x) * self.scale


@pytest.mark.parametrize("wrapper", [DataParallel, FullyShardedDataParallel, TensorParallel, PipelineParallel])
def test_wrapped_models_stay_what_they_were(wrapper: type[Wrapper]) -> None:
    """Catches a wrapper that returns another object, changes names, freezes, or is no instance of the model's class."""
    plain, model = make("llama"), make("llama")
    model.model.embed_tokens.freeze()
    trained = [name for name, _ in tree_flatten(model.trainable_parameters())]
    wrapped = wrapper(model, comm.solo())
    assert wrapped is model and isinstance(model, wrapper) and isinstance(model, type(plain))
    assert [name for name, _ in tree_flatten(model.parameters())] == [n for n, _ in tree_flatten(plain.parameters())]
    assert [name for name, _ in tree_flatten(model.trainable_parameters())] == trained
    assert model.training and not model.eval().training and not model.layers[0].training
    assert mx.allclose(model(TOKENS), plain(TOKENS), atol=1e-5)
    assert type(unwrap(model)) is type(plain), "unwrap gives the class back"


def test_wrappers_nest_and_come_off_together() -> None:
    """Catches state that the second wrapper loses, and classes or state that stay behind."""
    layer, groups = Layer(), (comm.solo(), comm.solo())
    Outer(Inner(layer, groups[0]), groups[1])
    assert isinstance(layer, Outer) and isinstance(layer, Inner) and isinstance(layer, Layer)
    assert layer.parallel_state.groups == {"dp_replicate": groups[0], "tp": groups[1]}
    assert "parallel_state" not in layer.parameters() and layer.parameters().keys() == {"scale", "child"}
    assert unwrap(layer) is layer and type(layer) is Layer and not hasattr(layer, "parallel_state")
    Inner(layer, groups[0])
    assert layer.parallel_state.groups == {"dp_replicate": groups[0]}, "it may be wrapped again"


def test_what_cannot_be_wrapped_is_refused() -> None:
    """Catches wrappers around functions, and the same wrapper twice, which would sum gradients twice."""
    with pytest.raises(TypeError, match=r"Inner wraps an mlx\.nn\.Module, got builtin_function_or_method"):
        Inner(len)
    layer = Inner(Layer(), comm.solo())
    with pytest.raises(ValueError, match="InnerLayer is already wrapped in Inner"):
        Inner(layer, comm.solo())
    Outer(layer, comm.solo())
    with pytest.raises(ValueError, match="is already wrapped in Inner"):
        Inner(layer, comm.solo())


def test_flags_and_updates_reach_a_wrapped_module() -> None:
    """Catches a wrapper that shares the children but not the module: its own arrays would never train."""
    layer = Inner(Layer(), comm.solo())
    gradients = nn.value_and_grad(layer, lambda m, x: m(x).sum())(layer, mx.ones((1, 3)))[1]
    assert mx.any(gradients["scale"] != 0) and mx.any(gradients["child"]["weight"] != 0)
    layer.update({"scale": mx.zeros(3)})
    assert mx.array_equal(layer(mx.ones((1, 3))), mx.zeros((1, 3)))
    layer.freeze()
    assert not tree_flatten(layer.trainable_parameters())


def test_equal_modules_get_equal_classes() -> None:
    """Catches a class per layer, which is slow, and would keep classes of dropped models for ever."""
    first, second = Inner(Layer(), comm.solo()), Inner(Layer(), comm.solo())
    assert type(first) is type(second) and type(first).__module__ == Layer.__module__
    assert extended_class(Inner, nn.Linear) is extended_class(Inner, nn.Linear)
    assert extended_class(Inner, nn.Linear, "Other").__name__ == "Other"


def test_classes_before_an_extension() -> None:
    """Catches the wrong class where two extensions stand on one module, or none."""
    layer = nn.Linear(3, 3)
    extend(layer, Inner)
    once = type(layer)
    extend(layer, Outer)
    assert class_before(type(layer), Outer) is once and class_before(once, Inner) is nn.Linear
    assert class_before(type(layer), Inner) is type(layer), "another extension stands on top"
    assert class_before(nn.Linear, Inner) is nn.Linear


def test_overridden_classes_keep_their_name() -> None:
    """Catches a `repr` or an error that names a class nobody knows."""
    other = overridden_class(nn.Linear, {"__call__": lambda self, x: x})
    assert (other.__name__, other.__module__, other.__doc__) == ("Linear", nn.Linear.__module__, nn.Linear.__doc__)
    assert issubclass(other, nn.Linear) and other(3, 3)(1) == 1


def test_plain_modules_have_an_empty_state() -> None:
    """Catches a state that is shared by all plain modules."""
    state = parallel_state(nn.Linear(3, 3))
    assert not state.groups and not state.reducers and not state.loss_groups and state.runner is None
    state.groups["tp"] = comm.solo()
    assert not parallel_state(nn.Linear(3, 3)).groups


@pytest.mark.parametrize(("axis", "is_local"), [("dp_replicate", True), ("dp_shard", False), ("pp", False), ("tp", False)])
def test_messages_inside_of_a_pass(axis: str, is_local: bool) -> None:
    """Catches a compiled, or freely ordered, pass around messages."""
    assert ParallelState({axis: comm.solo()}).is_local == is_local


def test_a_step_that_fails_is_over() -> None:
    """Catches plain gradients that are let through after an error inside a step."""
    state = ParallelState()
    with pytest.raises(KeyError), state.step():
        assert state.in_step
        raise KeyError
    assert not state.in_step


@pytest.mark.parametrize("argument", [0, 1])
def test_refused_gradients_name_the_reason(argument: int) -> None:
    """Catches a silent zero, for the output as for the parameters; values pass."""
    refused = lambda x, w: without_gradient(x * 2, [w], "not this way").sum()
    assert refused(mx.ones(2), mx.ones(2)).item() == 4
    with pytest.raises(ValueError, match="not this way"):
        mx.eval(mx.grad(refused, argnums=argument)(mx.ones(2), mx.ones(2)))
