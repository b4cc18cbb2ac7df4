"""The one table of a run's numbers: what each is called, and where and how it is shown.

A new metric is one more row of `METRICS`; `Metrics.log` takes its key, and reports, the W&B workspace, the terminal, the
summary and the model card show it as that row says. A number that a run cannot measure is left out of the record, never
0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

STEP_KEY = "train/global_step"
# Of the W&B workspace, in order.
SECTIONS = ("Throughput", "Loss", "Communication", "Memory", "Pipeline")


def last(values: Sequence[float]) -> float:
    """The newest value."""
    return values[-1]


def median(values: Sequence[float]) -> float:
    """The upper of the middle values."""
    return sorted(values)[len(values) // 2]


@dataclass(frozen=True)
class Figure:
    """One line in a report's table of runs.

    Attributes:
        title: Its words.
        of: Gives the shown value from a run's values.
        better: `min` or `max` where runs are compared by it, else None.
    """

    title: str
    of: Callable[[Sequence[float]], float]
    better: Callable | None = None


@dataclass(frozen=True)
class Metric:
    """One number of a run.

    Attributes:
        key: Its name in records of metrics.jsonl and in W&B.
        section: Section of the W&B workspace; "" where it is the x axis.
        panel: Title of its panel there, with the unit; metrics of one title share a panel.
        chart: Title of its chart in a report, with the unit; "" where it has none of its own.
        log_scale: Values spread over orders of magnitude, and are drawn so where they do.
        better: `min` or `max` where one value is better than another and the best is kept, else None.
        words: Format of its value in the terminal, for a record of training or of an evaluation; "" = not shown.
        columns: Narrowest terminal that has room for it beside the progress bar.
        figure: Its line in a report's table, or None.
        in_card: The model card tells its last value.
    """

    key: str
    section: str = ""
    panel: str = ""
    chart: str = ""
    log_scale: bool = False
    better: Callable | None = None
    words: str = ""
    columns: int = 0
    figure: Figure | None = None
    in_card: bool = False

    @property
    def best_key(self) -> str:
        """Key of the best value in a run's summary, such as `best/eval_loss`."""
        group, _, name = self.key.partition("/")
        return f"best/eval_{name}" if group == "eval" else f"best/{name}"


METRICS = (
    Metric(STEP_KEY, figure=Figure("steps", max), in_card=True),
    Metric("train/num_tokens", "Loss", "Tokens seen", figure=Figure("tokens", max)),
    Metric("train/epoch", "Loss", "Epoch"),
    Metric("train/loss", "Loss", "Loss", words="loss {:.4f}", figure=Figure("last train loss", last, min), in_card=True),
    Metric(
        "train/grad_norm", "Loss", "Gradient norm before clipping", "Gradient norm before clipping", log_scale=True,
        words="grad {:.3g}", columns=115,
    ),
    Metric("train/learning_rate", "Loss", "Learning rate", "Learning rate", words="lr {:.3g}", columns=115),
    Metric(
        "eval/loss", "Loss", "Loss", better=min, words="eval loss {:.4f}", figure=Figure("best eval loss", min, min),
        in_card=True,
    ),
    Metric("eval/ppl", "Loss", "Perplexity", log_scale=True, words="ppl {:.4g}", in_card=True),
    Metric(
        "eval/exact_match", "Loss", "Exact match", "Exact match on held-out rows, fraction", better=max,
        words="exact match {:.1%}", figure=Figure("best exact match", max, max), in_card=True,
    ),
    Metric(
        "throughput/tokens_per_sec", "Throughput", "Tokens per second", "Tokens per second", better=max,
        words="{:,.0f} tokens/s", figure=Figure("median tokens/s", median, max),
    ),
    Metric(
        "throughput/tokens_per_sec_per_device", "Throughput", "Tokens per second and device",
        "Tokens per second and device",
    ),
    Metric("throughput/tflops_per_device", "Throughput", "TFLOP/s per device", "TFLOP/s per device"),
    Metric("throughput/mfu_pct", "Throughput", "Model FLOPs utilisation, %", "Model FLOPs utilisation, %"),
    Metric("throughput/scaling_efficiency_pct", "Throughput", "Scaling efficiency, %", "Scaling efficiency, %"),
    Metric("throughput/samples_per_sec", "Throughput", "Rows per second"),
    Metric("time/step_s", "Throughput", "Step time, s", "Seconds per step"),
    Metric("time/data_s", "Throughput", "Step time, s"),
    Metric("time/compute_s", "Throughput", "Step time, s"),
    Metric("time/optimizer_s", "Throughput", "Step time, s"),
    Metric("throughput/padding_pct", "Throughput", "Padding, % of positions", "Padding, % of positions"),
    Metric(
        "comm/exposed_pct", "Communication", "Not hidden behind compute, % of the step",
        "Communication not hidden behind compute, % of the step",
    ),
    Metric("comm/allreduce_s", "Communication", "Gradient reduction, s", "All-reduce of a sampled step, seconds"),
    Metric("comm/bus_gb_per_s", "Communication", "Bus bandwidth, GB/s", "Bus bandwidth, GB/s"),
    Metric("comm/bytes_per_step", "Communication", "Bytes per step"),
    Metric(
        "comm/rank_skew_s", "Communication", "Slowest rank behind the fastest, s",
        "Slowest rank behind the fastest, seconds",
    ),
    Metric("pp/bubble_pct", "Pipeline", "Bubble, %", "Pipeline bubble, %"),
    Metric(
        "memory/peak_gib", "Memory", "Memory, GiB", "Peak memory, GiB", words="peak {:.3g} GiB", columns=80,
        figure=Figure("peak memory, GiB", max, min),
    ),
    Metric("memory/active_gib", "Memory", "Memory, GiB", "Memory in use, GiB"),
    Metric("memory/cache_gib", "Memory", "Memory, GiB", "Memory cached, GiB"),
    Metric(
        "train/skipped_steps", "Loss", "Skipped steps", "Skipped steps", words="skipped {:d}",
        figure=Figure("skipped steps", max),
    ),
)  # fmt: skip
METRIC_KEYS = frozenset(metric.key for metric in METRICS)
