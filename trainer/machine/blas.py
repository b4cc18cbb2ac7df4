"""A fast BLAS for MLX's CPU backend on Linux.

MLX's Linux CPU wheel brings the reference BLAS (about 3 GFLOP/s). Symbols of a library that was loaded globally
before MLX win over it, so the system's OpenBLAS, where installed, makes float32 about 50 times faster. Macs use
Accelerate and GPUs their own libraries; there is nothing to do there. This module must not import MLX.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAMES = ("libopenblas.so.0", "libopenblas.so")
HINT = (
    "CPU matrix products would be about 50 times faster with OpenBLAS: "
    "apt-get install libopenblas0 (Debian, Ubuntu) or dnf install openblas (Fedora)."
)


def load_fast_blas() -> bool:
    """Load the system's OpenBLAS for MLX's CPU backend. Call it before anything imports MLX.

    Returns:
        Whether it is loaded; always False on other systems than Linux.
    """
    if sys.platform != "linux":
        return False
    if "OPENBLAS_CORETYPE" not in os.environ and _has_avx512():
        os.environ["OPENBLAS_CORETYPE"] = "SkylakeX"
    return any(_load(name, ctypes.RTLD_GLOBAL) for name in NAMES)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Within it each matrix product of a loaded OpenBLAS stays in the thread that asks for it; no effect on others."""
    library = next((found for name in NAMES if (found := _load(name, os.RTLD_NOLOAD))), None)
    if library is None:
        yield
        return
    before = library.openblas_get_num_threads()
    library.openblas_set_num_threads(1)
    try:
        yield
    finally:
        library.openblas_set_num_threads(before)


def blas_hint() -> str | None:
    """What to install when this Linux process has no fast BLAS, else None; it matters to MLX's CPU device only."""
    if sys.platform != "linux" or any(_load(name, os.RTLD_NOLOAD) for name in NAMES):
        return None
    return HINT


def _has_avx512() -> bool:
    """OpenBLAS 0.3.21 (Debian 12) does not know newer x86 processors and takes kernels 5 times slower for them."""
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return False
    return {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(flags)


def _load(name: str, mode: int) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name, mode=mode)
    except OSError:
        return None
