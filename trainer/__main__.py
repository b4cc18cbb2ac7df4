"""The command line: `python -m trainer RECIPE [key=value ...]` and `python -m trainer VERB ...`.

Finds the verb, parses its arguments and calls it. The one place where an exception becomes a message and
an exit code: 0 done, 2 what the user wrote is wrong, 1 anything else, 130 and 143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.machine.blas import load_fast_blas
from trainer.machine.errors import translated
from trainer.metrics.streams import turn_off_stdout
from trainer.nearest import nearest
from trainer.recipe.problems import (
    USER_ERRORS,
    AgreedError,
    RecipeError,
    listing,
    sentence,
)
from trainer.verbs.shipped import recipes_folder
from trainer.verbs.table import VERBS

# Set by mlx.launch and `python -m comm launch`, by JACCL, and by two families of mpirun.
_RANK_VARIABLES = ("MLX_RANK", "JACCL_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
# What people write for a verb whose name is not alike.
_SYNONYMS = {"train": "run", "fuse": "export", "chat": "generate", "convert": "export"}


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, and the error of this rank alone that the others must hear of."""

    code: int
    error: Exception | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after `python -m trainer`; default those of this process.

    Returns:
        The exit code.
    """
    return run(list(sys.argv[1:] if argv is None else argv)).code


def run(words: list[str]) -> Outcome:
    """Run the command of these words, and tell what went wrong."""
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return Outcome(0 if words else 2)
    # Every rank got the same words: rank 0 alone says what is wrong with them.
    with contextlib.redirect_stderr(io.StringIO()) if _rank() else contextlib.nullcontext():
        if problem := _unknown(words[0]):
            print(f"error: {problem}", file=sys.stderr)
            return Outcome(2)
        name = words[0] if words[0] in VERBS else "run"
        arguments = VERBS[name].parser(name).parse_intermixed_args(words[1:] if words[0] in VERBS else words)
    if _rank() and VERBS[name].rank_0_alone:
        return Outcome(0)
    try:
        code = VERBS[name].main(arguments)
        sys.stdout.flush()
        return Outcome(code)
    except KeyboardInterrupt:
        return Outcome(130)
    except BrokenPipeError as error:
        # The reader of `... | head` has seen enough.
        turn_off_stdout()
        return Outcome(128 + signal.SIGPIPE, error)
    except Exception as error:
        return _report(error, arguments)


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    return (
        "usage: python -m trainer RECIPE [key=value ...]\n"
        "       python -m trainer VERB [arguments]\n\n"
        "Fine-tunes a language model as a YAML recipe says; the first form is short for the verb run.\n\n"
        f"verbs:\n{verbs}\n\n"
        "`python -m trainer VERB --help` explains one verb.\n"
        f"example: {VERBS['run'].example}"
    )


def _unknown(word: str) -> str:
    """What is wrong with a first word that is neither a verb nor a recipe; empty where it is one of them."""
    is_path = word.startswith("-") or os.sep in word or word.endswith((".yaml", ".yml")) or os.path.exists(word)
    if word in VERBS or is_path:
        return ""
    alike = (verb for verb in VERBS if word.startswith(verb) or verb.startswith(word))
    if verb := _SYNONYMS.get(word) or next(alike, "") or nearest(word, VERBS):
        return f"there is no verb {word}; did you mean {verb}?"
    if (shipped := recipes_folder() / f"{word}.yaml").is_file():
        return f"{word} is a recipe that comes along; give its file: python -m trainer {shipped}"
    return f"{word} is neither a recipe file nor a verb; verbs are {listing(VERBS)}."


def _report(error: Exception, arguments: argparse.Namespace) -> Outcome:
    """Print what went wrong.

    A RecipeError is the same on every rank, so only rank 0 lists its problems, and an AgreedError is told by rank 0
    alone. Any other error may be one rank's alone and is printed by each rank that has it, with its number.
    """
    rank, told = _rank(), translated(error, arguments)
    code = 2 if isinstance(told, USER_ERRORS) else 1
    # A rank that lost another one has nothing to tell: the watchdog names the one that is gone.
    is_lost_peer = _has_ranks() and sys.modules["comm"].is_lost_peer(error)
    is_expected = code == 2 or is_lost_peer or isinstance(told, (OSError, ImportError))
    prefix = f"rank {rank}: " if rank is not None else ""
    if arguments.traceback or not is_expected:
        text = prefix + "".join(traceback.format_exception(error)).rstrip()
    elif isinstance(told, AgreedError):
        text = "" if rank else f"error: {told}"
    elif isinstance(told, RecipeError):
        text = f"error: {told}" if not rank else f"{prefix}{told.headline}"
    else:
        text = f"{prefix}error: {sentence(told)}"
    if text:
        print(text, file=sys.stderr, flush=True)
    return Outcome(code, None if isinstance(told, AgreedError) else error)


def _rank() -> int | None:
    """This process's rank as its launcher set it, without importing MLX; None when none did."""
    values = (os.environ.get(name, "") for name in _RANK_VARIABLES)
    return next((int(value) for value in values if value.isdigit()), None)


def _has_ranks() -> bool:
    """Whether ranks may have been connected. Jupyter's package `comm` never does, where that is the one imported."""
    return "comm.backend" in sys.modules


if __name__ == "__main__":
    load_fast_blas()
    outcome = run(sys.argv[1:])
    if outcome.code and _rank() is not None and _has_ranks():
        # Other ranks may be waiting in a collective: a normal exit would wait for them in turn.
        sys.modules["comm"].leave(outcome.code, outcome.error)
    sys.exit(outcome.code)
