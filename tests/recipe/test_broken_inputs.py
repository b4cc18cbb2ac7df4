"""Models, rows, adapters and output folders that are not what a recipe says: one sentence and exit code 2."""

import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranks import run_ranks

from trainer.__main__ import main

DATA = Path(__file__).parents[1] / "reference" / "data"
TORN = b"{\"torn\":"


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A run takes over Ctrl-C; the tests' own handler is put back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A tiny recipe, with a copy of the model and of the rows beside it."""
    shutil.copytree(DATA / "qwen3", tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{path: {tmp_path}/model, dtype: float32}}\n"
        f"data: {{train: {tmp_path}/rows.jsonl}}\n"
        f"output_dir: {tmp_path}/output\n"
    )
    return str(path)


def without(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / "model" / name).unlink() for name in names] and None


def with_file(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def of_type(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "model" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": name}))

    return change


BROKEN = {
    "no folder": (lambda folder: shutil.rmtree(folder / "model"), "model.path = .*: there is no such file or folder"),
    "no config": (without("config.json"), "has no config.json"),
    "config torn": (with_file("model/config.json", TORN), "config.json' is not a valid JSON file"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "holds no tokenizer files"),
    "no weights": (without("model.safetensors"), "No safetensors found"),
    "weights torn": (with_file("model/model.safetensors", TORN * 100), "download it again"),
    "architecture": (of_type("qwen99"), "qwen99 not supported"),
    "no rows": (with_file("rows.jsonl", b"\n"), "rows.jsonl has no rows to use.$"),
    "other columns": (with_file("rows.jsonl", b'{"foo": "a"}\n'), "No data format fits the columns 'foo'"),
    "output a file": (with_file("output", b"x"), "output_dir = .*output is a file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_run_says_what_is_broken(tmp_path: Path, recipe: str, capsys, monkeypatch, case: str) -> None:
    """Catches a traceback out of another library, or an error that does not name the file."""
    monkeypatch.setenv("MLX_TRAINER_CACHE", str(tmp_path / "cache"))
    damage, message = BROKEN[case]
    damage(tmp_path)
    assert main([recipe]) == 2
    told = "error: " + capsys.readouterr().err.partition("error: ")[2].strip()
    assert re.search(message, told, re.DOTALL) and "Traceback" not in told, told


@pytest.mark.parametrize("verb", [["eval"], ["generate", "--prompt", "a"], ["export", "--to", "peft"]])
def test_a_torn_result_is_named(tmp_path: Path, recipe: str, capsys, monkeypatch, verb: list[str]) -> None:
    """Catches MLX's RuntimeError for an adapter file that was cut short."""
    monkeypatch.setenv("MLX_TRAINER_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "output"
    run.mkdir()
    shutil.copy(recipe, run / "recipe.yaml")
    (run / "adapters.safetensors").write_bytes(TORN * 10)
    rows = tmp_path / "valid.jsonl"
    rows.write_text('{"text": "a"}\n')
    overrides = [f"data.valid={rows}"] if verb[0] == "eval" else []
    assert main([verb[0], str(run), *overrides, *verb[1:]]) == 2
    err = capsys.readouterr().err
    assert "adapters.safetensors is no whole safetensors file" in err and "Traceback" not in err


RANK = """
import os, sys
from trainer.__main__ import run
outcome = run([sys.argv[1 + int(os.environ["MLX_RANK"])]])
sys.modules["comm"].leave(outcome.code, outcome.error)
"""


def test_two_ranks_tell_it_once_with_one_exit_code(tmp_path: Path, recipe: str) -> None:
    """Catches the same sentence from every rank, and a rank that waits for one that has left."""
    (tmp_path / "model" / "model.safetensors").write_bytes(TORN * 100)
    ranks = run_ranks(RANK, 2, args=[recipe, recipe], check=False)
    assert [rank.returncode for rank in ranks] == [2, 2], ranks
    assert "download it again" in ranks[0].stderr and ranks[0].stderr.count("\n") == 1, ranks[0].stderr
    assert ranks[1].stderr == ""


def test_one_rank_without_the_recipe_is_named(tmp_path: Path, recipe: str) -> None:
    """Catches a host that lacks a file and leaves the others waiting, or an error that does not name the host."""
    ranks = run_ranks(RANK, 2, args=[recipe, str(tmp_path / "other.yaml")], check=False)
    assert [rank.returncode for rank in ranks] == [2, 2], ranks
    assert "rank 1 on " in ranks[0].stderr and "There is no recipe" in ranks[0].stderr, ranks[0].stderr
