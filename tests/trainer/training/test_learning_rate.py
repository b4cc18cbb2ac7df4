"""Learning rates of every schedule against their formulas, written out again in numpy."""

import numpy as np
import pytest

from trainer.recipe.config import ScheduleConfig
from trainer.training.optim import learning_rate

PEAK = 3e-4


def expected(name: str, steps: np.ndarray, total: int, warmup: int, floor: float) -> np.ndarray:
    """The rates of `steps`: a ramp from zero to the peak, then the shape `name` down to `floor * PEAK`, which stays."""
    after = np.clip((steps - warmup) / max(1, total - warmup), 0, 1)
    shapes = {
        "constant": np.ones_like(after),
        "linear": floor + (1 - floor) * (1 - after),
        "cosine": floor + (1 - floor) * (1 + np.cos(np.pi * after)) / 2,
    }
    ramp = steps / max(warmup, 1)
    return PEAK * np.where(steps < warmup, ramp, shapes[name])


@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("warmup", [0, 1, 10, 99, 100])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_rates_follow_their_formula(name: str, warmup: int, floor: float) -> None:
    """Catches an edge of the warm-up that is off by one, a floor that is forgotten, and rates that rise past the end."""
    steps = np.arange(130)
    schedule = ScheduleConfig(name=name, warmup_steps=warmup, min_lr_ratio=floor)
    found = [learning_rate(int(step), 100, PEAK, schedule) for step in steps]
    np.testing.assert_allclose(found, expected(name, steps, 100, warmup, floor), rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize(
    ("name", "step", "rate"),
    [
        ("constant", 0, 0.0), ("constant", 4, 1.0), ("constant", 99, 1.0),
        ("linear", 2, 0.5), ("linear", 4, 1.0), ("linear", 8, 0.6), ("linear", 12, 0.2), ("linear", 99, 0.2),
        ("cosine", 3, 0.75), ("cosine", 4, 1.0), ("cosine", 8, 0.6), ("cosine", 12, 0.2), ("cosine", 99, 0.2),
    ],
)  # fmt: skip
def test_rates_known_by_heart(name: str, step: int, rate: float) -> None:
    """Catches a formula that is wrong here and above alike: warm-up of 4 in 12 steps, half way at 8, a floor of 0.2."""
    schedule = ScheduleConfig(name=name, warmup_steps=4, min_lr_ratio=0.2)
    assert learning_rate(step, 12, 1.0, schedule) == pytest.approx(rate, abs=1e-15)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_runs_that_end_in_their_warmup(name: str) -> None:
    """Catches a division by zero, or a fall, where the warm-up is as long as the run or longer."""
    schedule = ScheduleConfig(name=name, warmup_steps=5)
    assert [learning_rate(step, 3, 1.0, schedule) for step in range(5)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
