"""Settings of every test: a fast BLAS where the system has one, and no just-in-time compiling.

Tests of several ranks start real processes through `ranks.run_ranks`.
"""

import os
import sys
from pathlib import Path

from trainer.blas import load_fast_blas

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
sys.path.insert(0, str(Path(__file__).parent))

load_fast_blas()
