"""One line of the self-test."""

import contextlib
import io
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What one check found.

    Attributes:
        section: The part of the report it belongs to.
        name: What was checked.
        error: The largest distance from what is right, in units of `bound`'s; None where it raised, or measures only.
        bound: The largest distance allowed; None where it measures only.
        seconds: How long it took.
        figure: A measured value in words, such as a time or a bandwidth; "" where there is none.
        reason: Why it failed, where it raised; "" elsewhere.
    """

    section: str
    name: str
    error: float | None = None
    bound: float | None = None
    seconds: float = 0.0
    figure: str = ""
    reason: str = ""

    @property
    def is_passed(self) -> bool:
        """Nothing was raised, and the error is a number within the bound."""
        if self.reason:
            return False
        return self.bound is None or (self.error is not None and math.isfinite(self.error) and self.error <= self.bound)


@dataclass(frozen=True)
class Check:
    """Something to check.

    Attributes:
        section, name: See `Outcome`.
        bound: The largest distance allowed; None where it measures only.
        run: Does the work; returns the distance, and a measured value in words.
    """

    section: str
    name: str
    bound: float | None
    run: Callable[[], tuple[float | None, str]]


def outcomes(checks: list[Check]) -> Iterator[Outcome]:
    """Every check's outcome, as it comes; a check that raises has failed, and the others go on."""
    for check in checks:
        began = time.perf_counter()
        error, figure, reason = None, "", ""
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # other packages speak there
                error, figure = check.run()
        except Exception as raised:  # on an unknown device anything may fail, and the report is to say what
            reason = f"{type(raised).__name__}: {raised}".splitlines()[0]
        seconds = time.perf_counter() - began
        yield Outcome(check.section, check.name, error, check.bound, seconds, figure, reason)
