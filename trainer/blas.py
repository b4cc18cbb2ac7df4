"""A fast BLAS for MLX's CPU backend on Linux.

MLX's Linux CPU wheel brings the reference BLAS (about 3 GFLOP/s). Symbols of a library that was loaded globally
before the first matrix product win over it, so the system's OpenBLAS, where installed, makes float32 about 50 times
faster. Macs use Accelerate and GPUs their own libraries; there is nothing to do there.
"""

import ctypes
import sys

NAMES = ("libopenblas.so.0", "libopenblas.so")
HINT = "CPU matrix products are about 50 times faster with OpenBLAS: apt-get install libopenblas0 (or dnf install openblas)."


def load_fast_blas() -> str | None:
    """Load the system's OpenBLAS for MLX's CPU backend; call it before the first matrix product.

    Returns:
        A hint for the user where a fast BLAS would help and none is installed, else None.
    """
    if sys.platform != "linux":
        return None
    for name in NAMES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            return None
        except OSError:
            continue
    import mlx.core as mx

    return HINT if mx.default_device() == mx.cpu else None
