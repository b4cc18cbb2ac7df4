"""The training-time layers and the chunked loss under tensor parallelism, with real processes."""

from pathlib import Path

import pytest

from ranks import run_ranks


@pytest.fixture(scope="module")
def result():
    """What rank 0 of two reports."""
    return run_ranks(Path(__file__).parent / "workers" / "sharded_loss.py", 2)[0].result


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("loss", ["cross_entropy", "log_probs"])
def test_equals_one_device(result, loss, method):
    """Catches a vocabulary slice whose softmax or gradient misses the other ranks' logits, and layers that lose
    their split.
    """
    value, gradient, name, num_gradients = result[f"{loss} {method}"]
    assert value < 1e-6
    assert gradient < 1e-5, name
    assert num_gradients > 20
