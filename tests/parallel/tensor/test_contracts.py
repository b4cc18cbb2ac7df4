"""What TensorParallel promises beside parity: messages, generation, adapters, wrappers, files, meshes."""

from typing import Any

import pytest

GRADIENT_TOLERANCE = 1e-5
Results = list[dict[str, Any]]


def reports(results: Results, check: str) -> list[Any]:
    """Every rank's report of one check."""
    return [result["checks"][check]["report"] for result in results]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "qwen3_moe", "qwen3_5"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_four_activation_sums_per_layer(ring_of_two: Results, architecture: str, method: str) -> None:
    """Catches one sum per linear in place of one per block: a layer needs 2 forward and 2 backward.

    Parameter-sized messages: at most one per block, with all its shared parameters fused.
    """
    for report in reports(ring_of_two, "message_counts"):
        counts = report[f"{architecture}:{method}"]
        assert counts["activation"] == 4, f"{counts['activation']} activation-sized messages per layer"
        assert sum(counts["parameters"].values()) <= 2, f"messages of parameters: {counts['parameters']}"
    if architecture == "llama" and method == "full":
        assert counts["parameters"] == {}, f"nothing is shared in a llama layer: {counts['parameters']}"


@pytest.mark.parametrize("architecture", ["llama", "qwen3_5", "gemma3", "phi3"])
def test_generation_is_the_whole_models(ring_of_two: Results, architecture: str) -> None:
    """Catches caches or logits of a slice taken for the whole: same tokens on all ranks as on one device."""
    for report in reports(ring_of_two, "generation"):
        found = report[architecture]
        assert found["divided"] == found["whole"], f"{found['divided']} != {found['whole']}"
        assert set(found["cached_heads"]) <= {1}, f"2 key heads over 2 ranks, cached {found['cached_heads']}"


@pytest.mark.parametrize("architecture", ["llama", "qwen3_5", "gemma3", "phi3"])
def test_generation_with_copied_key_heads(mpi_of_four: Results, architecture: str) -> None:
    """Catches a rank that reads another rank's key heads: four ranks, two key heads."""
    for report in reports(mpi_of_four, "generation"):
        found = report[architecture]
        assert found["divided"] == found["whole"], f"{found['divided']} != {found['whole']}"


@pytest.mark.parametrize("case", ["qwen3", "qwen3_moe", "dora"])
def test_adapters_put_in_afterwards(ring_of_two: Results, case: str) -> None:
    """Catches adapters on sharded layers that train nothing, differ between ranks, or start differently."""
    for report in reports(ring_of_two, "adapters_after"):
        assert report[case]["initial"] < 1e-6, f"initial values off by {report[case]['initial']}"
        worst, error = report[case]["gradient"]
        assert error < GRADIENT_TOLERANCE, f"gradient of {worst} off by {error}"


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_adapters_on_router_head_and_embedding(ring_of_two: Results, architecture: str) -> None:
    """Catches partial gradients of adapters on what every rank keeps whole, and on the vocabulary."""
    for report in reports(ring_of_two, "adapters_by_name"):
        assert report[architecture]["initial"] == 0, "initial values differ from one device's"
        worst, error = report[architecture]["gradient"]
        assert error < GRADIENT_TOLERANCE, f"gradient of {worst} off by {error}"


@pytest.mark.parametrize("method", ["full", "lora"])
def test_checkpointed_layers(ring_of_two: Results, method: str) -> None:
    """Catches gradients that are summed twice, or not at all, when a layer is computed again."""
    for report in reports(ring_of_two, "checkpointed_layers"):
        worst, error = report[method]
        assert error < GRADIENT_TOLERANCE, f"gradient of {worst} off by {error}"


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3_5", "gemma3"])
def test_packed_rows_and_loss_without_logits(ring_of_two: Results, architecture: str, method: str) -> None:
    """Catches training-time layers that see whole dimensions, and a chunked loss that takes a slice for the vocabulary."""
    for report in reports(ring_of_two, "prepared_layers"):
        worst, error = report[f"{architecture}:{method}"]
        assert error < GRADIENT_TOLERANCE, f"gradient of {worst} off by {error}"


def test_dropout_masks_are_the_whole_models(ring_of_two: Results) -> None:
    """Catches masks that differ between ranks, and masks of a slice drawn for the slice."""
    for report in reports(ring_of_two, "dropout"):
        worst, error = report["by_key"]
        assert error < GRADIENT_TOLERANCE, f"gradient of {worst} off by {error}"
        assert report["by_state"] < GRADIENT_TOLERANCE, f"mlx's dropout: off by {report['by_state']}"


def test_wrapper_behaviour(ring_of_two: Results) -> None:
    """Catches a wrapper that hides or renames parameters, loses flags, or prints local dimensions."""
    for report in reports(ring_of_two, "wrapper_behaviour"):
        assert report["same_object"] and report["same_names"] and report["is_linear"], f"{report}"
        assert report["frozen_stays"], "freeze() before and after wrapping must hold"
        assert report["modes"] == [False, False, False], "eval() must reach all layers"
        assert report["moved"] == 0, "load_weights must reach the layers"
        for printed, whole in zip(report["printed"], report["printed_whole"]):
            dims = whole.split("(", 1)[1].rstrip(")")
            assert dims in printed, f"{printed} does not tell {dims}"
        whole = report["printed_convolution_whole"].rstrip(")")
        assert report["printed_convolution"] == f"Sliced{whole}, ranks=2)", report["printed_convolution"]
        assert report["printed_embedding"].startswith("VocabularyEmbedding(128, 64"), report["printed_embedding"]


def test_peak_memory_of_loading(ring_of_two: Results) -> None:
    """Catches slices that keep the whole tensor alive, and a load that evaluates everything before slicing.

    Loading peaks at most at the model over the ranks plus its two largest tensors; gathering for a checkpoint at
    the slices plus three full tensors.
    """
    for rank, found in enumerate(reports(ring_of_two, "loading_memory")):
        assert found["model_bytes"] >= 500e6, f"the model has only {found['model_bytes']} bytes"
        assert found["local_bytes"] < 0.51 * found["model_bytes"], f"rank {rank} keeps {found['local_bytes']} bytes"
        bound = found["local_bytes"] + 2 * found["largest_bytes"]
        assert found["peak_bytes"] <= bound, f"rank {rank}: peak {found['peak_bytes']}, allowed {bound}"
        bound += found["largest_bytes"]
        assert found["gather_peak_bytes"] <= bound, f"rank {rank}: gathering peaks at {found['gather_peak_bytes']}"


def test_wrong_plan_is_caught(ring_of_two: Results) -> None:
    """Shows that the comparison has teeth: a plan without the MLP's sum is far off."""
    for report in reports(ring_of_two, "wrong_plan"):
        assert report["gradient"][1] > 1e-2, f"a wrong plan went unnoticed: {report}"


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "qwen3_5", "phi3"])
@pytest.mark.parametrize("world", ["ring_of_two", "mpi_of_four"])
def test_weights_round_trip(request: pytest.FixtureRequest, world: str, architecture: str) -> None:
    """Catches checkpoints whose full tensors are mixed up, or that do not cut back into the same slices."""
    for report in reports(request.getfixturevalue(world), "round_trip"):
        found = report[architecture]
        assert found["gathered"], "gathered tensors differ from the whole model's"
        assert found["sliced"] and found["shapes"], "full tensors do not cut back into the slices"


@pytest.mark.parametrize("kind", ["plain", "lora", "qlora"])
def test_shard_linear_alone(ring_of_two: Results, kind: str) -> None:
    """Catches wrong biases, segments or LoRA gradients in a model that uses `shard_linear` and no plan."""
    for report in reports(ring_of_two, "standalone_linears"):
        worst, error = report[kind]
        assert error < GRADIENT_TOLERANCE, f"{worst} off by {error}"


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(
    ("world", "check", "axis"),
    [
        ("ring_of_four", "data_mesh", "dp_replicate"),
        ("mpi_of_four", "deep_meshes", "dp_shard"),
        ("mpi_of_four", "deep_meshes", "pp"),
    ],
)
def test_two_by_two_meshes(exhaustive: None, request: pytest.FixtureRequest, world: str, check: str, axis: str, method: str) -> None:
    """Catches gradients or norms counted over the wrong axis when tensor parallelism and another one compose."""
    for report in reports(request.getfixturevalue(world), check):
        found = report[f"{axis}:{method}"]
        assert found["steps"] < 1e-5, f"losses off by {found['steps']}"
        assert found["norms"] < 1e-5, f"norms off by {found['norms']}"
