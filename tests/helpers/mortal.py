"""Runs a command that ends when its parent does, also where that is killed: `mortal.py PARENT COMMAND...`.

A program of its own, as code between fork and exec may hang where the parent has threads. Linux only; elsewhere it runs
the command, and nothing more. Needs no site-packages.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit("the parent is gone")  # it ended before it could be known
    os.execvp(command[0], command)
