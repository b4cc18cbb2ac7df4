"""Freed memory stays with the process."""

import subprocess
import sys

import pytest

PAGES = """
import ctypes
import resource
import mlx.core as mx
from comm.memory import keep_freed_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        mx.eval(mx.concatenate([part, part]))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

mx.set_default_device(mx.cpu)
part = mx.zeros((4 << 20,))
mx.eval(part)
usual, kept = new_pages(), keep_freed_memory()
new_pages()
print(usual, hasattr(ctypes.CDLL(None), "mallopt"), kept, new_pages())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_arrays_get_the_pages_of_those_before():
    """Catches options that malloc takes but that do not keep it from asking for new pages."""
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True)
    usual, can_keep, kept, after = done.stdout.split()
    assert kept == can_keep
    if kept == "False":
        pytest.skip("a C library without mallopt")
    assert int(usual) > 1000
    assert int(after) < int(usual) / 10
