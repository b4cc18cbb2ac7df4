"""Settings of every test: a fast BLAS where the system has one, and no just-in-time compiling.

Tests of several ranks start real processes through `ranks.run_ranks`.
"""

import ctypes
import os
import sys
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
sys.path.insert(0, str(Path(__file__).parent))

# MLX's CPU wheel brings the reference BLAS; symbols loaded first and globally win (50x faster).
_OPENBLAS = Path("/usr/lib/x86_64-linux-gnu/openblas-pthread/libblas.so.3")
if _OPENBLAS.exists():
    ctypes.CDLL(str(_OPENBLAS), mode=ctypes.RTLD_GLOBAL)
