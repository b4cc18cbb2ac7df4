"""What a pipeline does besides training steps, and what it refuses."""

from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import comm
from comm.capabilities import CAPABILITIES
from parallel import PipelineParallel
from parallel.pipeline.caches import AbsentCache, own_caches
from parallel.pipeline.split import even_split, memory_split
from tensor_models import make_model


def test_generation(checks: list[dict[str, Any]]) -> None:
    """Catches wrong masks or caches of layers on another stage: other tokens than the whole model's, or ranks that differ."""
    for rank, check in enumerate(checks):
        for architecture, tokens in check["generation"].items():
            assert tokens["cut"] == tokens["whole"], f"rank {rank}, {architecture}"


def test_evaluation(checks: list[dict[str, Any]]) -> None:
    """Catches a validation loss that only the last stage knows."""
    for check in checks:
        measured = check["evaluation"]
        assert measured["cut"] == pytest.approx(measured["whole"], rel=1e-6) and measured["tokens"] > 0


@pytest.mark.parametrize("check", ["packed_rows", "logits_loss", "frozen_first_stage"])
def test_gradients_of_other_losses(checks: list[dict[str, Any]], check: str) -> None:
    """Catches stages that do not see the loss function's segments, shortened tokens, or that nothing trains before them.

    Also a gradient lost in layers that are computed again.
    """
    for rank, found in enumerate(checks):
        assert found[check] < 1e-5, f"rank {rank}: off by {found[check]}"


def test_wrong_uses_are_refused(checks: list[dict[str, Any]]) -> None:
    """Catches gradients that would silently be zero, and a loss function that needs what a pipeline has not."""
    for check in checks:
        said = check["refusals"]
        assert "parallel.value_and_grad" in said["gradient"]
        assert "inside a loss_fn" in said["hidden"]
        assert "call the model once" in said["twice"]
    assert "1 micro-batches for 2 pipeline stages" in checks[0]["refusals"]["warnings"]


def test_idle_time(exhaustive: None, checks: list[dict[str, Any]]) -> None:
    """Catches stages that wait for each other more than a pipeline must, and a measure that says so wrongly."""
    measured, theory = checks[0]["bubble"]["measured"], checks[0]["bubble"]["theory"]
    assert 0.8 * theory < measured < 1.3 * theory, f"{measured:.1f} % idle, theory says {theory:.1f} %"


def test_checkpoint_tensors(checks: list[dict[str, Any]]) -> None:
    """Catches checkpoints that lack a stage's layers, hold tied embeddings twice, or cannot be taken up again."""
    for check in checks:
        assert check["checkpoint_tensors"] == {"in_order": True, "equal": True, "back": True}


def test_tied_embeddings_stay_equal(checks: list[dict[str, Any]]) -> None:
    """Catches first and last stage drifting apart in the weight that both have."""
    assert checks[0]["stages_differ_in_optimizer"] == 0.0


@pytest.mark.parametrize("launch", ["ring of two", pytest.param("mpi of four", marks=pytest.mark.exhaustive)])
def test_large_messages(launched: Any, launch: str) -> None:
    """Catches schedules that only work while a message fits the system's buffers (32 MiB here)."""
    assert len(launched(launch)[0]["checks"]["large_messages"]) == 2


@pytest.mark.parametrize("num_layers, num_stages, right", [(4, 3, [2, 1, 1]), (8, 4, [2, 2, 2, 2]), (5, 5, [1] * 5)])
def test_even_split(num_layers: int, num_stages: int, right: list[int]) -> None:
    """Catches lost layers and empty stages."""
    assert even_split(num_layers, num_stages) == right


def test_memory_split() -> None:
    """Catches a small machine that is given as much as a large one, and a head that is not counted."""
    assert memory_split([10] * 12, 0, 0, [100, 100]) == [6, 6]
    assert memory_split([10] * 12, 0, 0, [64, 32, 32]) == [6, 3, 3]
    assert memory_split([10] * 12, 0, 40, [100, 100]) == [8, 4]
    assert memory_split([10] * 3, 0, 0, [1, 1000, 1]) == [1, 1, 1]


def test_refused_at_build() -> None:
    """Catches a pipeline on a backend that cannot send, and models or splits that would fail in the middle of a run."""
    model = make_model("qwen3")
    nccl = comm.solo()
    nccl._size, nccl._backend, nccl.capabilities = 2, "nccl", CAPABILITIES["nccl"]
    with pytest.raises(ValueError, match="nccl cannot; give it a ring or MPI group"):
        PipelineParallel(model, nccl)
    with pytest.raises(ValueError, match="'memry'; it must be 'even', 'memory' or a list"):
        PipelineParallel(model, comm.solo(), split="memry")
    with pytest.raises(ValueError, match=r"split \[3\] has 1 stages and 3 layers"):
        PipelineParallel(model, comm.solo(), split=[3])
    with pytest.raises(ValueError, match="'zb'"):
        PipelineParallel(model, comm.solo(), schedule="zb")
    model.model_type = "mamba"
    with pytest.raises(ValueError, match="cannot cut model_type 'mamba'"):
        PipelineParallel(model, comm.solo())
    assert not isinstance(model, PipelineParallel), "a refused module must stay as it was"


def test_one_stage_is_the_whole_model() -> None:
    """Catches special cases: a pipeline of one rank has every weight under its name and computes the same."""
    plain, alone = make_model("gemma3"), PipelineParallel(make_model("gemma3"), comm.solo())
    tokens = mx.array([[1, 2, 3, 4]])
    assert [n for n, _ in tree_flatten(alone.parameters())] == [n for n, _ in tree_flatten(plain.parameters())]
    assert mx.array_equal(alone(tokens), plain(tokens))


def test_caches_of_other_stages() -> None:
    """Catches a stand-in that takes its mask from a layer of another kind."""
    from mlx_lm.models.cache import KVCache, RotatingKVCache

    caches = [RotatingKVCache(8), KVCache(), RotatingKVCache(8), KVCache()]
    own = own_caches(caches, range(2, 3))
    assert own[2] is caches[2] and [isinstance(c, AbsentCache) for c in own] == [True, True, False, True]
    assert own[0].peer is caches[2] and own[1].peer is None
