"""Shapes on each rank, against the wrapper that really divides the model."""

from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from comm import MeshShape
from parallel import TensorParallel
from parallel.pipeline.split import even_split
from planned_models import CONFIGS, MOE, QWEN3, make
from trainer.memory.placement import Placement
from trainer.verbs.plan import meshes


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_tensor_parallel_shapes_are_those_of_the_wrapper(name, method, tp):
    """A plan that promises less memory than a rank will need, or refuses a model that would fit."""
    _, planned = make(CONFIGS[name], method=method)
    parts = Placement(planned.model).tensor_parallel(tp)
    group = SimpleNamespace(rank=tp - 1, size=tp)
    wrapped = TensorParallel(planned.model, group)
    expected = {n: tuple(p.shape) for n, p in tree_flatten(wrapped.parameters())}
    assert {part.name: part.shape for part in parts} == expected


def test_tensor_parallel_refusals_come_through():
    """A mesh that the run would refuse, planned as if it worked."""
    _, planned = make(QWEN3)
    with pytest.raises(ValueError, match="Sizes that work"):
        Placement(planned.model).tensor_parallel(3)


def test_pipeline_stages_hold_every_parameter_once():
    """A layer on no stage or on two; a tied embedding missing where the head needs it."""
    for config in (QWEN3, CONFIGS["hybrid"]):
        _, planned = make(config)
        placement = Placement(planned.model)
        split = even_split(placement.num_layers, 3)
        stages = [{p.name for p in placement.rank(MeshShape(1, pp=3), s, split)} for s in range(3)]
        assert set.union(*stages) == {part.name for part in placement.parts}
        twice = set.intersection(stages[0], stages[2])
        assert all("embed_tokens" in name for name in twice) and bool(twice) == (config is QWEN3)
        assert not stages[1] & (stages[0] | stages[2])
        assert any(name.endswith("model.norm.weight") for name in stages[2])


def test_fsdp_divides_the_first_dimension_and_rounds_up():
    """A rank that holds the larger part of an uneven split."""
    _, planned = make(QWEN3)
    placement = Placement(planned.model)
    whole = {part.name: part.shape for part in placement.parts}
    for part in placement.rank(MeshShape(1, dp_shard=5), 0, [5]):
        assert part.shape == (-(-whole[part.name][0] // 5), *whole[part.name][1:])


def test_all_meshes_of_a_world():
    """A mesh left out, or one of the wrong size."""
    found = list(meshes(12))
    assert len(set(found)) == len(found) == 40
    assert all(mesh.world == 12 for mesh in found)


def test_a_quantized_checkpoint_is_counted_as_stored():
    """Weights of 4 bits counted as 16, or layers that are stored whole counted as quantized."""
    stored = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*self_attn.*"],
    }
    _, planned = make(MOE | {"tie_word_embeddings": False, "quantization_config": stored})
    dtypes = {n: p.dtype for n, p in tree_flatten(planned.model.parameters())}
    quantized = {n for n, dtype in dtypes.items() if dtype == mx.uint32}
    assert quantized and all("mlp" in name for name in quantized)
    assert dtypes["lm_head.weight"] == mx.float32
