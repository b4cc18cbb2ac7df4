"""Arrays that stand in a module for a while."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from parallel import slots_of, swapped


class Two(nn.Module):
    """Two layers in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(2, 2), nn.Linear(2, 2)]

    def __call__(self, x: mx.array) -> mx.array:
        return self.layers[1](self.layers[0](x))


def test_other_arrays_are_there_within_and_gone_afterwards() -> None:
    """Catches an array that stays, after an error too, or that lands at another name."""
    model = Two()
    own = model.layers[1].weight
    slots = slots_of(model, ["layers.1.weight"])
    with swapped(slots, [mx.zeros((2, 2))]):
        assert not model.layers[1].weight.any().item() and model.layers[0].weight.any().item()
    assert model.layers[1].weight is own
    with pytest.raises(RuntimeError), swapped(slots, [mx.zeros((2, 2))]):
        raise RuntimeError
    assert model.layers[1].weight is own


def test_what_a_trace_leaves_is_taken_back() -> None:
    """Catches arrays of a trace that stay in the model, and with them its whole graph."""
    model = Two()
    names = ["layers.0.weight", "layers.1.weight"]
    own = [module[name] for module, name in slots_of(model, names)]
    with swapped(slots_of(model, names), own):
        model.layers[0].weight = own[0] + 1
    assert all(module[name] is array for (module, name), array in zip(slots_of(model, names), own, strict=True))
    with pytest.raises(ValueError, match="zip"), swapped(slots_of(model, names), own[:1]):
        pass
