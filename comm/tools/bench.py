"""`python -m comm bench`: what the connection between the ranks gives.

Latency and bus bandwidth of every collective over message sizes, the fitted line of all_sum, and
fused gradients against the alternatives on the gradient tree of a 9 B model's LoRA. Run it under
a launcher; started alone it launches `-n` local ranks itself. Bus bandwidth counts what crosses
one link (as NCCL's tests do), so it is comparable between collectives and numbers of ranks.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.utils import average_gradients
from mlx.utils import tree_map

from comm.backend import init
from comm.fusion import GradientFusion
from comm.group import Group
from comm.link import fit_link
from comm.typed import named_arrays, number

# A layer of a 9 B model with hidden size 4096: the (input, output) of q with its gate, k, v, o,
# gate, up and down; 32 layers, adapters of rank 8 on each.
LAYER = ((4096, 8192), (4096, 1024), (4096, 1024), (4096, 4096),
         (4096, 12288), (4096, 12288), (12288, 4096))  # fmt: skip
NUM_LAYERS, LORA_RANK = 32, 8
ROUNDS_SECONDS = 20.0  # ranks that outnumber the cores can take half a minute for one case


def main(options: argparse.Namespace) -> int:
    """Measures, prints a table or JSON on rank 0, and draws the plot if asked to.

    Raises:
        ValueError: The plot cannot be drawn, or the ranks cannot be started.
    """
    if options.plot:
        check_plot(options.plot)
    if "MLX_RANK" not in os.environ and "OMPI_COMM_WORLD_SIZE" not in os.environ:
        return _launch_itself(options)
    group = init(options.backend)
    report = measure(group, options.max_mib << 20, options.repeats)
    if group.rank == 0:
        print(json.dumps(report) if options.json else as_table(report), flush=True)
        if options.plot:
            draw(report, options.plot)
    group.barrier()
    return 0


def measure(group: Group, max_bytes: int, num_repeats: int) -> dict[str, Any]:
    """Everything the bench reports, as one JSON-able object; every rank must call it."""
    sizes = [1 << power for power in range(12, 40, 3) if 1 << power <= max_bytes]
    rows: list[dict[str, Any]] = [
        {"collective": name, "bytes": size, **_time(group, call, factor, size, num_repeats)}
        for name, (call, factor) in collectives(group).items()
        for size in sizes
    ]
    sums = [row for row in rows if row["collective"] == "all_sum"]
    fit = fit_link([row["bytes"] for row in sums], [row["seconds"] for row in sums])
    return {
        "backend": group.backend,
        "num_ranks": group.size,
        "collectives": rows,
        "latency_us": fit.latency_seconds * 1e6,
        "gb_per_s": 1e-9 / fit.seconds_per_byte if fit.seconds_per_byte else None,
        "fusion": [compare_fusion(group, mixed, num_repeats) for mixed in (False, True)],
    }


def collectives(group: Group) -> dict[str, tuple[Callable[[mx.array], mx.array], float]]:
    """Each collective as a call on one message, and the share of its bytes that one link carries."""
    n = group.size
    calls: dict[str, tuple[Callable[[mx.array], mx.array], float]] = {
        "all_sum": (group.all_sum, 2 * (n - 1) / n),
        "all_gather": (lambda x: group.all_gather(x[: x.size // n]), (n - 1) / n),
        "reduce_scatter": (lambda x: group.reduce_scatter(x[: x.size // n * n]), (n - 1) / n),
        "broadcast": (group.broadcast, 1.0),
    }
    if group.capabilities.point_to_point != "none":
        calls["send"] = (lambda x: _pass_on(group, x), 1.0)
    return calls


def compare_fusion(group: Group, mixed: bool, num_repeats: int) -> dict[str, Any]:
    """Fused sums against one all_sum, one per array, and `nn.average_gradients`.

    All at the same wire dtypes, in turn within each round; the ratios are medians over rounds of
    the other's time by the fused one's, so above 1 is faster than the other.
    """
    tree = lora_tree(mixed)
    mx.eval(tree)
    arrays = [array for _, array in named_arrays(tree)]
    flats = [mx.zeros((n,), dtype=dtype) for dtype, n in _sizes(arrays).items()]
    fusion = GradientFusion(group, wire_dtype=None)
    native, stream = group._native, group.stream
    cases = {
        "fused": lambda: fusion.all_sum(tree),
        "one all_sum": lambda: [group.all_sum(flat) for flat in flats],
        "nn.average_gradients": lambda: average_gradients(
            tree, group=native, communication_stream=stream
        ),
        "one per array": lambda: tree_map(group.all_sum, tree),
    }
    times = _rounds(group, cases, num_repeats)
    return {
        "dtypes": sorted({str(array.dtype).split(".")[-1] for array in arrays}),
        "num_arrays": len(arrays),
        "mib": sum(array.nbytes for array in arrays) / 2**20,
        "bucket_mib": (fusion.bucket_bytes or 0) / 2**20,
        "seconds": {name: statistics.median(each) for name, each in times.items()},
        "ratio_to_fused": {
            name: statistics.median(a / b for a, b in zip(each, times["fused"], strict=True))
            for name, each in times.items()
        },
    }


def lora_tree(mixed: bool) -> dict[str, Any]:
    """Gradients as a rank-8 LoRA on every linear of a 9 B model has them, zero-filled.

    Args:
        mixed: The first factor in bfloat16, the second in float32; otherwise all in float32.
    """
    first = mx.bfloat16 if mixed else mx.float32
    layers = [
        [
            {"lora_a": mx.zeros((rows, LORA_RANK), dtype=first), "lora_b": mx.zeros((LORA_RANK, cols))}
            for rows, cols in LAYER
        ]
        for _ in range(NUM_LAYERS)
    ]
    return {"layers": layers}


def as_table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"{report['num_ranks']} ranks over {report['backend']}", ""]
    lines.append(f"{'collective':<16}{'KiB':>10}{'ms':>12}{'bus GB/s':>12}")
    for row in report["collectives"]:
        cells = f"{row['bytes'] / 1024:>10.0f}{row['seconds'] * 1e3:>12.3f}{row['bus_gb_per_s']:>12.3f}"
        lines.append(f"{row['collective']:<16}{cells}")
    speed = f"{report['gb_per_s']:.2f}" if report["gb_per_s"] else "unmeasured"
    lines += ["", f"all_sum: {report['latency_us']:.0f} us plus {speed} GB/s", ""]
    for case in report["fusion"]:
        what = f"{case['num_arrays']} arrays, {case['mib']:.0f} MiB of {' and '.join(case['dtypes'])}"
        lines.append(f"{what}, buckets of {case['bucket_mib']:.1f} MiB")
        for name, seconds in case["seconds"].items():
            ratio = case["ratio_to_fused"][name]
            lines.append(f"  {name:<24}{seconds * 1e3:>9.1f} ms{ratio:>8.2f} x the fused time")
    return "\n".join(lines)


def check_plot(path: str) -> None:
    """Before anything is measured: can the plot be drawn and written?

    Raises:
        ValueError: Matplotlib is not installed, or there is no such folder.
    """
    if not find_spec("matplotlib"):
        raise ValueError("--plot needs matplotlib: pip install -e '.[report]'")
    if not Path(path).resolve().parent.is_dir():
        raise ValueError(f"--plot {path}: there is no folder {Path(path).resolve().parent}.")


def draw(report: dict[str, Any], path: str) -> None:
    """Draws time and bus bandwidth over the message size as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in dict.fromkeys(row["collective"] for row in report["collectives"]):
        rows = [row for row in report["collectives"] if row["collective"] == name]
        sizes = [row["bytes"] for row in rows]
        left.loglog(sizes, [row["seconds"] for row in rows], marker="o", label=name)
        right.semilogx(sizes, [row["bus_gb_per_s"] for row in rows], marker="o", label=name)
    left.set(xlabel="bytes", ylabel="seconds")
    right.set(xlabel="bytes", ylabel="bus GB/s")
    left.legend()
    figure.suptitle(f"{report['num_ranks']} ranks over {report['backend']}")
    figure.savefig(Path(path), format="png")
    pyplot.close(figure)


def _time(
    group: Group, call: Callable[[mx.array], mx.array], factor: float, size: int, repeats: int
) -> dict[str, float]:
    x = mx.zeros((size // 4,), dtype=mx.float32)
    mx.eval(x)
    seconds = statistics.median(_rounds(group, {"": lambda: call(x)}, repeats)[""])
    return {"seconds": seconds, "bus_gb_per_s": size * factor / seconds * 1e-9}


def _rounds(
    group: Group, cases: dict[str, Callable[[], Any]], num_repeats: int
) -> dict[str, list[float]]:
    """Seconds of each case in `num_repeats` rounds, or as many as fit ROUNDS_SECONDS, but one.

    The cases take turns, so that a change of the machine's load meets all of them; a round
    before the first warms up.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    start = time.perf_counter()
    for turn in range(num_repeats + 1):
        for name, case in cases.items():
            seconds = _timed(group, case)
            times[name] += [seconds] if turn else []
        spent = number(group.all_max(mx.array(time.perf_counter() - start)))
        if turn and spent > ROUNDS_SECONDS:
            break
    return times


def _timed(group: Group, call: Callable[[], Any]) -> float:
    group.barrier()
    start = time.perf_counter()
    mx.eval(call())
    return time.perf_counter() - start


def _pass_on(group: Group, x: mx.array) -> mx.array:
    """Rank 0 sends to rank 1; the others have nothing to do."""
    if group.rank == 0:
        return group.send(x, 1)
    return group.recv_like(x, 0) if group.rank == 1 else x


def _sizes(arrays: list[mx.array]) -> dict[mx.Dtype, int]:
    sizes: dict[mx.Dtype, int] = {}
    for array in arrays:
        sizes[array.dtype] = sizes.get(array.dtype, 0) + array.size
    return sizes


def _launch_itself(options: argparse.Namespace) -> int:
    from comm.launcher.job import Job, make_hosts, mpi_job
    from comm.launcher.launch import launch

    backend = "ring" if options.backend == "any" else options.backend
    flags = [f"--max-mib={options.max_mib}", f"--repeats={options.repeats}"]
    flags += ["--json"] if options.json else []
    flags += [f"--plot={options.plot}"] if options.plot else []
    command = (sys.executable, "-m", "comm", "bench", *flags)
    hosts = make_hosts(options.num_ranks, None, None, backend)
    job = Job(command, hosts, backend, cwd=str(Path.cwd()), prefix=False)
    return launch(mpi_job(job) if backend == "mpi" else job)
