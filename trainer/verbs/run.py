"""`python -m trainer run`: trains as a recipe says."""

import argparse

from trainer.running.run import train


def main(arguments: argparse.Namespace) -> int:
    """Run a recipe; returns the exit code: 0 done, 128 + signal when a signal ended it."""
    return train(arguments.recipe, arguments.overrides).code
