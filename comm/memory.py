"""What the C library does with memory that arrays gave back, on Linux.

glibc returns a large block to the system at once and gets the next one as new pages, each of which costs a page
fault. On hosts with several ranks that takes longer than joining and sending gradients: with two ranks on two cores,
joining 78 MiB took 47 ms with new pages and 10 ms with old ones.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
NEVER = -1  # as a size, the largest there is


def keep_freed_memory() -> bool:
    """Freed memory stays with this process, for its next arrays. Returns whether the C library can do that.

    The process's size as the system sees it stays at its peak then; MLX's own figures are not affected.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, NEVER) and mallopt(M_MMAP_MAX, 0))
