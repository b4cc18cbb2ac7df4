"""Times and memory of this package's operations beside MLX's own, on the device in use."""

from functools import partial

import mlx.core as mx

from trainer.layers.kernels import OURS, Candidate, candidates, choose, compare
from trainer.selftest.outcome import Check

SECTION = "our operations beside MLX's"
# As in the layers of Qwen3.5-9B on a GPU, a few heads of them; small enough for seconds on a CPU.
HEADS, KEY_HEADS, DIMS = 8, 2, 128
GPU_TOKENS, CPU_TOKENS = 2048, 512
BOUNDS = {mx.float32: 1e-3, mx.bfloat16: 5e-2}


def speed_checks() -> list[Check]:
    """One line for each operation and type: both sides' time and memory, and which is right and faster."""
    return [
        Check(SECTION, f"{name}, {str(dtype).removeprefix('mlx.core.')}", None, partial(_line, name, found, dtype))
        for name, found in candidates(DIMS**-0.5).items()
        for dtype in ((mx.float32, mx.bfloat16) if mx.default_device() == mx.gpu else (mx.float32,))
    ]


def _line(name: str, found: tuple[Candidate, ...], dtype: mx.Dtype) -> tuple[None, str]:
    measured = compare(found, _inputs(name, dtype))
    chosen, note = choose(measured, BOUNDS[dtype])
    sides = [f"{one.name} {1e3 * one.seconds:.1f} ms {one.peak_bytes / 2**20:.0f} MiB" for one in measured if not one.reason]
    return None, f"{', '.join(sides)}: {chosen if chosen == OURS else f'{chosen} is faster'}{f' ({note})' if note else ''}"


def _inputs(name: str, dtype: mx.Dtype) -> list[mx.array]:
    tokens = GPU_TOKENS if mx.default_device() == mx.gpu else CPU_TOKENS
    shapes: list[tuple[int, ...]]
    if name == "attention":
        shapes = [(1, HEADS, tokens, DIMS), (1, KEY_HEADS, tokens, DIMS), (1, KEY_HEADS, tokens, DIMS)]
        drawn = [mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(shapes)]
    else:
        shapes = [(1, tokens, KEY_HEADS, DIMS)] * 2 + [(1, tokens, HEADS, DIMS)] + [(1, tokens, HEADS)] * 2
        q, k, v, gate, beta = (mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(shapes))
        q, k = (x / mx.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
        drawn = [q, k, v, -0.1 * mx.abs(gate), mx.sigmoid(beta)]
    arrays = [x.astype(dtype) for x in drawn]
    mx.eval(arrays)
    return arrays
