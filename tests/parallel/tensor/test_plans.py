"""Plans without ranks: coverage, refusals with the sizes that work, segments."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from members import Rank
from parallel import TensorParallel, shard_linear
from parallel.architectures import ModelPlan
from parallel.tensor.resolve import check_plan, find_blocks, plan_for
from parallel.tensor.slicing import as_segments
from tensor_models import ARCHITECTURES, DIVIDED_BY_LAYER_ONLY, make_model, prepare


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in DIVIDED_BY_LAYER_ONLY])
def test_plans_cover_every_parameter_of_their_blocks(architecture: str) -> None:
    """Catches a plan that forgets a projection, a norm or an array of its architecture."""
    model = make_model(architecture)
    check_plan(model, plan_for(model), 2)
    blocks = find_blocks(model, plan_for(model))
    assert len(blocks) == 2 * len(model.layers), f"{[site.path for site in blocks]}"


@pytest.mark.parametrize(
    ("architecture", "changes", "size", "expected"),
    [
        ("qwen3", {}, 3, ["model.layers.0.self_attn.q_proj: n_heads = 4 is not divisible by 3", "work: 1, 2, 4."]),
        ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 3}, 2, ["k_proj: n_kv_heads = 3", "work: 1."]),
        ("llama", {"intermediate_size": 126}, 4, ["mlp.down_proj: features = 126 is not divisible by 4"]),
        ("llama", {"vocab_size": 129}, 2, ["model.embed_tokens: a vocabulary of 129 is not divisible by 2"]),
        ("qwen3_5", {"linear_num_value_heads": 6}, 4, ["linear_attn.in_proj_z: num_v_heads = 6 is not divisible by 4"]),
    ],
)
def test_indivisible_dimensions(architecture: str, changes: dict, size: int, expected: list[str]) -> None:
    """Catches a model that is cut in the middle of a head, or refused without saying what would work."""
    model = make_model(architecture, **changes)
    with pytest.raises(ValueError) as error:
        check_plan(model, plan_for(model), size)
    for text in expected:
        assert text in str(error.value), f"{text!r} is not in: {error.value}"


def test_every_problem_is_named_once() -> None:
    """Catches a report that stops at the first problem, or repeats it for each layer."""
    model = make_model("qwen3", vocab_size=129, intermediate_size=126)
    with pytest.raises(ValueError) as error:
        check_plan(model, plan_for(model), 4)
    lines = str(error.value).splitlines()
    assert len(lines) == len(set(lines)) == 7, f"{error.value}"


def test_packed_weights_keep_their_groups() -> None:
    """Catches a 4-bit matrix that is cut inside a quantization group."""
    model = prepare(make_model("qwen3", head_dim=16), "qlora")
    with pytest.raises(ValueError, match="o_proj: 64 quantized inputs over 4 ranks are 16 each"):
        check_plan(model, plan_for(model), 4)


def test_uncovered_parameter_is_refused() -> None:
    """Catches a plan that leaves a parameter's gradient partial because nobody thought of it."""
    attention, *others = plan_for(make_model("qwen3")).blocks
    plan = ModelPlan((replace(attention, whole=("q_norm",)), *others))
    with pytest.raises(ValueError, match="says nothing about model.layers.0.self_attn.k_norm.weight"):
        check_plan(make_model("qwen3"), plan, 2)


def test_unknown_architecture_is_refused() -> None:
    """Catches a model that is silently left whole."""
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="No tensor-parallel plan for model_type None; there are plans for gemma3"):
        TensorParallel(model, Rank(0, 2))
    assert type(model) is nn.Linear, "a refused module must stay what it was"


def test_shard_linear_refuses() -> None:
    """Catches unknown shardings and indivisible outputs."""
    with pytest.raises(ValueError, match="sharding is 'column'; it must be one of"):
        shard_linear(nn.Linear(4, 4), "column", group=Rank(0, 2))
    with pytest.raises(ValueError, match=r"weight \(6, 4\) cannot be divided along dimension 0.*divisible by 4"):
        shard_linear(nn.Linear(4, 6), "all-to-sharded", group=Rank(0, 4))
    with pytest.raises(ValueError, match="RMSNorm cannot be sharded: it has no weight matrix"):
        shard_linear(nn.RMSNorm(4), "all-to-sharded", group=Rank(0, 2))


def test_shard_linear_leaves_the_original() -> None:
    """Catches slices that appear in the layer that was passed in."""
    linear = nn.Linear(8, 4)
    linear.freeze(keys=["bias"])
    sharded = shard_linear(linear, "all-to-sharded", group=Rank(1, 2))
    assert linear.weight.shape == (4, 8) and type(linear) is nn.Linear, "the original was changed"
    assert mx.array_equal(sharded.weight, linear.weight[2:]), "rank 1 has the second half of the outputs"
    assert [name for name, _ in tree_flatten(sharded.trainable_parameters())] == ["weight"], "bias was frozen"


def test_segments_in_the_words_of_mlx() -> None:
    """Catches a misread `segments`: a count, indices, or fractions."""
    sizes = [[s.size for s in as_segments(spec, 12)] for spec in (1, 3, [4, 10], [0.25, 0.5])]
    assert sizes == [[12], [4, 4, 4], [4, 6, 2], [3, 3, 6]], f"{sizes}"
