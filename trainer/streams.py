"""Standard output whose reader may have gone, as behind `| head`. Nothing here imports MLX or rich."""

import os
import sys


def turn_off_stdout() -> None:
    """Let what is still written to standard output go nowhere; else Python's own last flush would fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
