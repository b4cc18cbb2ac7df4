"""The command line: `python -m trainer RECIPE [key=value ...]` and `python -m trainer VERB ...`.

Finds the verb, parses its arguments and calls it. The one place where an exception becomes a message and
an exit code: 0 done, 2 what the user wrote is wrong, 1 anything else, 130 and 143 stopped by a signal.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from trainer.blas import load_fast_blas
from trainer.problems import RecipeError, nearest
from trainer.verbs import VERBS

# Set by mlx.launch and `python -m comm launch`, by JACCL, and by two families of mpirun.
_RANK_VARIABLES = ("MLX_RANK", "JACCL_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after ``python -m trainer``; default those of this process.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    name = words.pop(0) if words[0] in VERBS else "run"
    if name == "run" and words and (verb := _misspelt(words[0])):
        print(f"error: there is no verb {words[0]}; did you mean {verb}?", file=sys.stderr)
        return 2
    parser = VERBS[name].parser(name)
    arguments = parser.parse_intermixed_args(words)
    try:
        return VERBS[name].main(arguments)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return _report(error, show_traceback=arguments.traceback)


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


def _misspelt(word: str) -> str:
    """The verb that was probably meant by a first word that is neither a verb nor a recipe."""
    is_recipe = (
        word.startswith("-") or os.sep in word or word.endswith((".yaml", ".yml")) or os.path.exists(word)
    )
    return "" if is_recipe else nearest(word, VERBS)


def _report(error: Exception, show_traceback: bool) -> int:
    """Print what went wrong and return the exit code.

    A RecipeError is the same on every rank, so only rank 0 lists its problems. Any other error may be one
    rank's alone and is printed by each rank that has it, with its number.
    """
    rank = _rank()
    code = 2 if isinstance(error, (ValueError, FileNotFoundError, NotADirectoryError, PermissionError)) else 1
    is_expected = code == 2 or isinstance(error, (OSError, ImportError))
    prefix = f"rank {rank}: " if rank is not None else ""
    if show_traceback or not is_expected:
        text = prefix + "".join(traceback.format_exception(error)).rstrip()
    elif isinstance(error, RecipeError):
        text = f"error: {error}" if not rank else f"{prefix}{error.headline}"
    else:
        text = f"{prefix}error: {_sentence(error)}"
    print(text, file=sys.stderr, flush=True)
    return code


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error) or type(error).__name__


def _rank() -> int | None:
    """This process's rank as its launcher set it, without importing MLX; None when none did."""
    values = (os.environ.get(name, "") for name in _RANK_VARIABLES)
    return next((int(value) for value in values if value.isdigit()), None)


if __name__ == "__main__":
    load_fast_blas()
    exit_code = main()
    if exit_code and _rank() is not None and "comm" in sys.modules:
        # Other ranks may be waiting in a collective: a normal exit would wait for them in turn.
        sys.modules["comm"].leave(exit_code)
    sys.exit(exit_code)
