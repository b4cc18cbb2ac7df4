"""Turns MLX's compiling on in tests; `MLX_DISABLE_COMPILE` has it off, as it would call a C++ compiler per kernel."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

# mlx/compile.h: CompileMode. Without fusion functions are traced and their graphs simplified, and no compiler runs.
WITHOUT_FUSION, WITH_FUSION = 2, 3


@contextmanager
def compiling(mode: int = WITHOUT_FUSION) -> Iterator[None]:
    """Within this context `mx.compile` works; MLX offers Python the modes on and off only."""
    [library] = (Path(mx.__file__).parent / "lib").glob("libmlx.*")
    ctypes.CDLL(str(library))["_ZN3mlx4core16set_compile_modeENS0_11CompileModeE"](mode)
    try:
        yield
    finally:
        mx.disable_compile()
