"""`eval` and `generate` on meshes: the figures and the tokens of one process."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import comm
from ranks import run_ranks
from tiny_recipes import WORDS, tiny_recipe
from trainer.__main__ import main
from trainer.training.requests import Stop
from training import train

MESHES = {
    "dp_shard2": ["parallel.dp_replicate=1", "parallel.dp_shard=2"],
    "pp2": ["parallel.pp=2"],
    "pp2 x tp2": ["parallel.pp=2", "parallel.tp=2"],
    "dp_replicate2 x dp_shard2": ["parallel.dp_replicate=2", "parallel.dp_shard=2"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of one process, on rows with prompts and answers."""
    folder, chooser = tmp_path_factory.mktemp("run"), random.Random(0)
    rows = [
        {
            "prompt": " ".join(chooser.choices(WORDS, k=chooser.randint(2, 9))),
            "completion": " ".join(chooser.choices(WORDS, k=3)),
        }
        for _ in range(30)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"val_fraction": 0.3, "loss_on": "all"}
    recipe = tiny_recipe(
        folder / "rows.jsonl", folder / "output", "qwen3_5", method="full", max_steps=4, data=data, batch_size_per_device=2
    )
    assert train(recipe, comm.solo(), Stop(), []) == 0
    return folder / "output"


def commands(run: Path, mesh: list[str]) -> dict[str, list[str]]:
    """The validation loss; three rows of different lengths before and after training."""
    rows = ["--rows", "3", "--max-new-tokens", "4"]
    return {"eval": ["eval", str(run), *mesh], "rows": ["generate", str(run), *mesh, *rows]}


def more_commands(run: Path, mesh: list[str]) -> dict[str, list[str]]:
    """Also a prompt, and all rows for the share of exact answers."""
    exact = ["eval.exact_match=true", "eval.max_new_tokens=4"]
    prompt = ["generate", str(run), *mesh, "--prompt", "alpha beta", "--max-new-tokens", "4"]
    return commands(run, mesh) | {"eval": ["eval", str(run), *mesh, *exact], "prompt": prompt}


def assert_same(run: Path, commands: Callable, meshes: list[str], num_ranks: int, capsys: Any) -> None:
    """Each mesh prints on rank 0 what one process prints, and nothing on the others."""
    alone = {}
    for name, arguments in commands(run, []).items():
        assert main(arguments) == 0
        alone[name] = capsys.readouterr().out
    jobs = {f"{mesh} {name}": job for mesh in meshes for name, job in commands(run, MESHES[mesh]).items()}
    worker = Path(__file__).parent / "workers" / "verbs.py"
    first, *others = [r.result for r in run_ranks(worker, num_ranks, args=[json.dumps(jobs)], timeout=240)]
    assert not any(text for rank in others for text in rank.values())
    assert re.search(r"tuned +\S", alone["rows"]), "the run's answers are empty"
    for mesh in meshes:
        for name, right in alone.items():
            found = first[f"{mesh} {name}"]
            if name == "eval":
                assert figures(found) == pytest.approx(figures(right), rel=1e-5), mesh
            else:
                assert found == right, mesh


def figures(printed: str) -> dict[str, float]:
    """The metrics that `eval` prints."""
    return {name: float(value) for name, value in re.findall(r"(eval/\w+) +([\d.]+)", printed)}


def test_two_ranks(run, capsys):
    """Catches ranks that answer different rows although they need each other's weights, batches through stages
    whose caches cannot hold several rows, and a loss that one rank alone knows."""
    assert_same(run, commands, ["dp_shard2", "pp2"], 2, capsys)


def test_four_ranks(exhaustive, run, capsys):
    """As above where two axes meet: each group must do the same in the same order."""
    assert_same(run, more_commands, ["pp2 x tp2", "dp_replicate2 x dp_shard2"], 4, capsys)
