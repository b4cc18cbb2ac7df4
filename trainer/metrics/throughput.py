"""What a run measures of itself: tokens per second and memory.

Times are of the host. They count real (non-padding) tokens of all ranks, and leave out evaluation and checkpoints.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

import comm
from parallel import StepTimes, bubble_pct, parallel_state
from trainer.machine.limits import GIB


class Throughput:
    """Counts the work between two log records.

    Args:
        num_devices: Ranks of the run.
        flops_per_token: Floating-point operations of one token's forward and backward. None: no TFLOP/s.
        peak_tflops: What one device can do at most. None: no `throughput/mfu_pct`.
        baseline_tokens_per_sec: Tokens per second of the same recipe on one device. None: no scaling efficiency.
        clock: Seconds; a test may give its own.
    """

    def __init__(
        self,
        num_devices: int,
        *,
        flops_per_token: float | None = None,
        peak_tflops: float | None = None,
        baseline_tokens_per_sec: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.num_devices = num_devices
        self.flops_per_token = flops_per_token
        self.peak_tflops = peak_tflops
        self.baseline_tokens_per_sec = baseline_tokens_per_sec
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Begin a new window now."""
        self._start, self._paused = self._clock(), 0.0
        self._num_steps = self._num_tokens = self._num_samples = self._num_slots = 0

    def add(self, num_tokens: int, num_samples: int, num_slots: int) -> None:
        """Count one optimizer step, whose outputs have been evaluated.

        Args:
            num_tokens: Non-padding tokens of the global batch.
            num_samples: Rows of the global batch.
            num_slots: Positions of the global batch, padding included.
        """
        self._num_steps += 1
        self._num_tokens += num_tokens
        self._num_samples += num_samples
        self._num_slots += num_slots

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside (evaluation, a checkpoint, a step measured in parts) is not counted."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def row(self) -> dict[str, float]:
        """The window's `throughput/*` and `time/step_s`, and a new window. Empty when no step was counted."""
        seconds = self._clock() - self._start - self._paused
        row = self._row(seconds) if self._num_steps and seconds > 0 else {}
        self.restart()
        return row

    def _row(self, seconds: float) -> dict[str, float]:
        per_device = self._num_tokens / seconds / self.num_devices
        row = {
            "throughput/tokens_per_sec": self._num_tokens / seconds,
            "throughput/tokens_per_sec_per_device": per_device,
            "throughput/samples_per_sec": self._num_samples / seconds,
            "time/step_s": seconds / self._num_steps,
        }
        if self._num_slots:
            row["throughput/padding_pct"] = 100 * (1 - self._num_tokens / self._num_slots)
        if self.flops_per_token is not None:
            row["throughput/tflops_per_device"] = per_device * self.flops_per_token / 1e12
            if self.peak_tflops is not None:
                row["throughput/mfu_pct"] = 100 * row["throughput/tflops_per_device"] / self.peak_tflops
        if self.baseline_tokens_per_sec is not None:
            row["throughput/scaling_efficiency_pct"] = 100 * per_device / self.baseline_tokens_per_sec
        return row


def memory_row() -> dict[str, float]:
    """This process's MLX memory in GiB: the peak so far, in use, and held free for reuse."""
    return {
        "memory/peak_gib": mx.get_peak_memory() / GIB,
        "memory/active_gib": mx.get_active_memory() / GIB,
        "memory/cache_gib": mx.get_cache_memory() / GIB,
    }


def memory_of_ranks(world: comm.Group) -> dict[str, float]:
    """Each rank's peak in GiB, for a run's summary: `memory/peak_gib_rank_0`, …; empty on one rank. Every rank must
    call it."""
    if world.size == 1:
        return {}
    peaks = world.all_gather(mx.array([mx.get_peak_memory() / GIB]))
    return {f"memory/peak_gib_rank_{rank}": comm.number(peak) for rank, peak in enumerate(peaks)}


def communication_row(
    times: StepTimes, usual_compute: list[float], model: nn.Module, world: comm.Group
) -> dict[str, float]:
    """The `comm/*` keys of one step that was measured in phases. Every rank must call it.

    Args:
        times: The times of that step.
        usual_compute: Seconds for loss and gradients in the undisturbed steps before it; none = no exposed share.
        model: The wrapped model.
        world: All ranks.

    Returns:
        `comm/allreduce_s`: seconds that summing gradients takes when nothing else runs.
        `comm/rank_skew_s`: the longest wait of a rank for the slowest one.
        `comm/exposed_pct`: share of an undisturbed step's gradient time in which communication is not hidden.
        `comm/bytes_per_step`, `comm/bus_gb_per_s`: bytes that one replica sums, and the bandwidth of each link
        that a ring would need for that (NCCL's bus bandwidth, 2 (n - 1) / n of the bytes).
        `pp/bubble_pct` with a pipeline. What does not apply is absent; with one rank, everything.
    """
    state, seconds = parallel_state(model), times.seconds
    if all(group.size == 1 for group in state.groups.values()):
        return {}
    row = {"comm/rank_skew_s": comm.number(world.all_max(mx.array(seconds["skew"])))}
    if "pp" in state.groups:
        row["pp/bubble_pct"] = bubble_pct(model)
    if usual_compute:
        usual = sum(usual_compute) / len(usual_compute)
        row["comm/exposed_pct"] = 100.0 * min(1.0, max(0.0, usual - seconds["local"]) / usual)
    messages = [fusion for fusion in state.fusions if fusion.group.size > 1]
    if messages:
        num_bytes = sum(fusion.message_bytes for fusion in messages)
        share = 2.0 * (messages[0].group.size - 1) / messages[0].group.size
        row |= {
            "comm/allreduce_s": seconds["reduce"],
            "comm/bytes_per_step": num_bytes,
            "comm/bus_gb_per_s": share * num_bytes / seconds["reduce"] / 1e9,
        }
    return row
