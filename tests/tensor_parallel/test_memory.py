"""A rank that divides a lazily opened model holds its slices and little more."""

from pathlib import Path

from conftest import PATHS, TIMEOUT_SECONDS
from ranks import run_ranks


def test_peak_memory_of_loading(saved_model: Path) -> None:
    """Catches slices that keep the whole tensor alive, and a load that evaluates everything before slicing.

    The peak while loading is at most the model over the ranks plus its two largest tensors; the peak while
    gathering for a checkpoint is bounded by the slices plus three full tensors.
    """
    worker = Path(__file__).parent / "workers" / "memory.py"
    results = run_ranks(worker, 2, args=[str(saved_model)], timeout=TIMEOUT_SECONDS, env={"PYTHONPATH": PATHS})
    for rank, result in enumerate(results):
        r = result.result
        assert r["model_bytes"] >= 500e6, f"the model has only {r['model_bytes']} bytes"
        assert r["local_bytes"] < 0.51 * r["model_bytes"], f"rank {rank} keeps {r['local_bytes']} bytes"
        bound = r["local_bytes"] + 2 * r["largest_bytes"]
        assert r["peak_bytes"] <= bound, f"rank {rank}: peak {r['peak_bytes']}, allowed {bound}"
        assert r["gathered_bytes"] == r["model_bytes"], "gathering must give the whole model"
        bound = r["local_bytes"] + 3 * r["largest_bytes"]
        assert r["gather_peak_bytes"] <= bound, f"rank {rank}: gathering peaks at {r['gather_peak_bytes']}"


