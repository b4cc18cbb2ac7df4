"""What `python -m trainer bench` measures, and how it is shown."""

from dataclasses import dataclass
from typing import Any

SIDES = ("mlx-trainer", "mlx-lm")


@dataclass(frozen=True)
class Measurement:
    """One side's figures; those that a side cannot measure are None.

    Attributes:
        side: One of `SIDES`.
        tokens_per_sec: Real (non-padding) tokens a second over the timed steps, all ranks.
        step_s: Seconds of a step; data_s, compute_s, optimizer_s are its parts.
        padding_pct: Share of padding in the timed steps.
        peak_gib: Peak memory after the model was loaded, the model included.
        mfu_pct: Model FLOPs utilisation, on chips whose peak is known.
        loss: Mean training loss of the timed steps.
        facts: What a baseline for several devices depends on; from a measurement on one device.
    """

    side: str
    tokens_per_sec: float
    step_s: float
    padding_pct: float
    peak_gib: float
    loss: float
    data_s: float | None = None
    compute_s: float | None = None
    optimizer_s: float | None = None
    mfu_pct: float | None = None
    facts: dict[str, Any] | None = None

    @property
    def tokens_per_step(self) -> float:
        """Real tokens of a step: packed rows hold more than as many single ones."""
        return self.tokens_per_sec * self.step_s


def table(found: list[Measurement]) -> str:
    """Measurements as lines of text, with the ratio of the first to the second where there are two."""
    rows: list[tuple[str, str, str]] = [
        ("tokens/s", "tokens_per_sec", ".0f"),
        ("tokens/step", "tokens_per_step", ".0f"),
        ("s/step", "step_s", ".3f"),
        ("  data", "data_s", ".4f"),
        ("  forward and backward", "compute_s", ".3f"),
        ("  optimizer", "optimizer_s", ".3f"),
        ("padding %", "padding_pct", ".1f"),
        ("peak memory, GiB", "peak_gib", ".2f"),
        ("MFU %", "mfu_pct", ".1f"),
        ("loss", "loss", ".4f"),
    ]
    lines = [f"{'':24}" + "".join(f"{m.side:>14}" for m in found) + (f"{'ratio':>10}" if len(found) == 2 else "")]
    for label, name, style in rows:
        values = [getattr(m, name) for m in found]
        if all(value is None for value in values):
            continue
        cells = "".join(f"{'' if value is None else format(value, style):>14}" for value in values)
        with_ratio = len(values) == 2 and name in ("tokens_per_sec", "peak_gib") and values[1]
        lines.append(f"{label:24}{cells}" + (f"{values[0] / values[1]:>9.2f}x" if with_ratio else ""))
    return "\n".join(lines)
