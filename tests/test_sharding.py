"""The parts of `--exhaustive`: each test in exactly one, and about as many in each."""

import argparse
import subprocess
import sys
from collections import Counter

import pytest

from ranks import ROOT
from sharding import parts_of, shard_of


@pytest.mark.parametrize("text", ["0/5", "6/5", "2", "/", "2/", "-1/5", "a/b", "2/5/7", "1/0", "tests/comm"])
def test_what_is_no_part_is_refused(text: str) -> None:
    """Catches a part that is silently empty."""
    with pytest.raises(argparse.ArgumentTypeError, match="is not PART/PARTS, such as 2/5"):
        shard_of(text)


def test_parts_are_even_and_keep_neighbours_together() -> None:
    """Catches a file whose long tests all meet in one part, one-test files that do, and launches made in every part."""
    assert shard_of("2/5") == (2, 5)
    assert parts_of(["a"] * 10, 5) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert parts_of(["a", "b", "c", "d"], 3) == [1, 2, 3, 1]
    files = [file for number in range(20) for file in [f"file {number}"] * (1 + number * number % 13)]
    assert max(Counter(parts_of(files, 5)).values()) - min(Counter(parts_of(files, 5)).values()) <= 5


def test_a_part_holds_no_default_test_and_a_wrong_one_is_a_usage_error() -> None:
    """Catches default tests that run in every part, and a mistyped part that runs nothing and succeeds."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/desk/test_desk.py"]
    bare, part, wrong = (
        subprocess.run([*command, option], cwd=ROOT, capture_output=True, text=True)
        for option in ("--exhaustive", "--exhaustive=1/1", "--exhaustive=3/2")
    )
    collected = [[line for line in one.stdout.splitlines() if "::" in line] for one in (bare, part)]
    wide = "tests/desk/test_desk.py::test_a_cable_that_is_pulled_out"
    default = "tests/desk/test_desk.py::test_a_machine_that_vanishes"
    assert {wide, default} <= set(collected[0]), bare.stdout
    assert wide in collected[1] and default not in collected[1], part.stdout
    assert wrong.returncode == pytest.ExitCode.USAGE_ERROR and "'3/2' is not PART/PARTS" in wrong.stderr, wrong.stderr
