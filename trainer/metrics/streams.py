"""What is written to standard output: its reader may have gone, as behind `| head`, and text of models and rows may
steer a terminal. Nothing here imports MLX or rich."""

import os
import sys


def turn_off_stdout() -> None:
    """Let what is still written to standard output go nowhere; else Python's own last flush would fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def harmless(text: str) -> str:
    """Text with a dot for every character, but for new lines and tabs, that would steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text)
