"""The parts of `--exhaustive`: each test in exactly one, and about as many in each."""

import argparse
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

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


TESTS = """
import pytest

def test_default(): pass

def test_wide(exhaustive): pass

@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_sizes(size): pass
"""


def test_a_part_holds_no_default_test_and_a_wrong_one_is_a_usage_error(tmp_path: Path) -> None:
    """Catches default tests that run in every part, and a mistyped part that runs nothing and succeeds."""
    (tmp_path / "test_some.py").write_text(TESTS)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "helpers")))}
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-v", "-p", "no:cacheprovider", "test_some.py"]

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *options], cwd=tmp_path, env=env, capture_output=True, text=True)

    ways = {
        "bare": run("--exhaustive"),
        "second": run("--exhaustive=2/2"),
        "wrong": run("--exhaustive=3/2"),
    }
    ran = {way: re.findall(r"::(\S+) PASSED", done.stdout) for way, done in ways.items()}
    assert ran["bare"] == ["test_default", "test_wide", "test_sizes[1]", "test_sizes[2]"], ways["bare"].stdout
    assert ran["second"] == ["test_sizes[2]"], ways["second"].stdout
    assert ways["wrong"].returncode == pytest.ExitCode.USAGE_ERROR
    assert "'3/2' is not PART/PARTS" in ways["wrong"].stderr, ways["wrong"].stderr
