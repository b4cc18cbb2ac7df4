"""Runs that meet trouble: signals, numbers that are not finite, ranks that disagree, separate disks."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import comm
from ranks import slowness
from tiny_recipes import MODELS, run_apart, tiny_recipe, write_rows
from trainer.__main__ import main
from trainer.metrics.records import read_records
from trainer.recipe.load import to_yaml
from trainer.training.requests import Stop
from training import train


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows for all runs."""
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_finishes_the_step_saves_and_leaves(rows, tmp_path, number, code):
    """Catches a lost run on Ctrl-C or SIGTERM, and a wrong exit code, through the real command."""
    recipe = tiny_recipe(rows, tmp_path / "run", max_steps=100000, data={"group_by_length": False})
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe))
    command = [sys.executable, "-m", "trainer", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60 * slowness()
    while len(read_records(tmp_path / "run" / "metrics.jsonl")) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    shown, errors = process.communicate(timeout=60 * slowness())
    assert process.returncode == code, shown + errors
    steps = read_records(tmp_path / "run" / "metrics.jsonl")[-1]["train/global_step"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:07d}" / "manifest.json").is_file()
    assert "the same command goes on from there" in shown


def test_signal_to_one_rank_stops_all_at_the_same_step(rows, tmp_path):
    """Catches a rank that leaves while the others wait for it."""
    recipe = tiny_recipe(rows, tmp_path / "run", max_steps=50)
    results = run_apart(recipe, 2, step=3, sent=signal.SIGTERM, ranks=[1])
    assert [result.result for result in results] == [143, 143]
    assert (tmp_path / "run" / "checkpoints" / "step-0000003").is_dir()


def test_steps_that_are_not_finite_are_skipped_and_counted(rows, tmp_path):
    """Catches a model that one bad step has filled with NaN."""
    recipe = tiny_recipe(
        rows, tmp_path, method="full", optimizer={"name": "sgd", "lr": 1e30}, schedule={"name": "constant"}, max_steps=4
    )
    assert train(recipe, comm.solo(), Stop(), []) == 0
    last = read_records(tmp_path / "metrics.jsonl")[-1]
    assert last["train/skipped_steps"] == 3
    assert last["train/global_step"] == 4


def test_ranks_need_no_common_disk(rows, tmp_path):
    """Catches files that a rank other than 0 writes or expects, in a run that is killed and continued."""
    recipe = tiny_recipe(rows, "run", max_steps=4, checkpoint={"every": 2}, data={"val_fraction": 0.2})
    run_apart(recipe, 2, step=3, folder=tmp_path)
    run_apart(recipe, 2, folder=tmp_path)
    assert (tmp_path / "0" / "run" / "adapters.safetensors").is_file()
    assert os.listdir(tmp_path / "1") == []
    steps = [row["train/global_step"] for row in read_records(tmp_path / "0" / "run" / "metrics.jsonl") if "train/loss" in row]
    assert steps == [1, 2, 3, 4]


def test_ranks_with_other_data_are_refused(tmp_path):
    """Catches hosts that train on different files without anybody noticing."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        write_rows(tmp_path / str(rank), 16 + rank)
    recipe = tiny_recipe("rows.jsonl", "run")
    results = run_apart(recipe, 2, step=99, folder=tmp_path)
    for result in results:
        assert result.returncode != 0
        assert "the training data differs (rank 0 on" in result.stderr


def test_error_of_one_rank_is_every_rank_s(rows, tmp_path):
    """Catches ranks that wait for ever for one that has failed alone."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    shutil.copytree(MODELS / "qwen3", tmp_path / "0" / "model")
    recipe = tiny_recipe(rows, "run", model={"path": "./model"})
    results = run_apart(recipe, 2, step=99, folder=tmp_path)
    for result in results:
        assert result.returncode != 0
        assert "rank 1 on" in result.stderr and "model" in result.stderr


def test_launched_as_one_rank(rows, tmp_path):
    """Catches mlx.launch -n 1, whose empty host file MLX's own init does not read."""
    recipe = tiny_recipe(rows, tmp_path / "run", max_steps=1)
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe))
    launcher = os.path.join(os.path.dirname(sys.executable), "mlx.launch")
    command = [launcher, "-n", "1", "--", sys.executable, "-m", "trainer", str(path)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=90 * slowness())
    assert (tmp_path / "run" / "adapters.safetensors").is_file(), shown.stdout + shown.stderr


def test_nothing_trainable_is_refused(rows, tmp_path):
    """Catches a run that trains nothing, and a target name that is misspelt."""
    with pytest.raises(ValueError, match=r"match no module.*Did you mean 'q_proj'"):
        train(tiny_recipe(rows, tmp_path, lora={"targets": ["q_prj"]}), comm.solo(), Stop(), [])


def test_dropout_outside_the_layers_is_refused(rows, tmp_path):
    """Catches a failed assertion in the first step, where rows of the output head are no rows of the batch."""
    lora = {"targets": ["q_proj", "embed_tokens"], "dropout": 0.1}
    with pytest.raises(ValueError, match="embed_tokens needs lora.dropout=0"):
        train(tiny_recipe(rows, tmp_path, lora=lora), comm.solo(), Stop(), [])


def test_adapter_of_mlx_lm_is_taken_up(rows, tmp_path):
    """Catches lora.init_from that ignores the stored values, rank or scale."""
    train(tiny_recipe(rows, tmp_path / "first", lora={"rank": 4, "alpha": 12}), comm.solo(), Stop(), [])
    second = tiny_recipe(rows, tmp_path / "second", lora={"init_from": str(tmp_path / "first")}, max_steps=1)
    train(second, comm.solo(), Stop(), [])
    config = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == 4 and config["lora_parameters"]["scale"] == 3.0
    first_loss = read_records(tmp_path / "first" / "metrics.jsonl")[0]["train/loss"]
    assert read_records(tmp_path / "second" / "metrics.jsonl")[0]["train/loss"] < first_loss


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"method": "dora"}, "method: dora leaves the 6 expert layers as they are; method: lora adapts them too"),
        ({"lora": {"dropout": 0.1}}, "lora.dropout=0.1 is not applied inside the 6 adapted expert layers"),
        ({}, None),
    ],
)
def test_what_does_not_reach_experts_is_said(rows, tmp_path, changes, said):
    """Catches settings that silently do nothing inside expert layers, and notices where nothing is left out."""
    notices = []
    assert train(tiny_recipe(rows, tmp_path, "qwen3_moe", max_steps=1, **changes), comm.solo(), Stop(), notices) == 0
    assert [line for line in notices if "expert" in line] == ([said] if said else [])


def test_folder_of_a_living_run_is_refused(rows, tmp_path):
    """Catches two runs that write one folder, a lock that outlives a killed run, and a rank that is not told."""
    recipe = tiny_recipe(rows, tmp_path / "run", max_steps=2)
    ready = "import comm, pathlib, sys, time; from trainer.checkpoint.lock import sole_run\n"
    hold = ready + "with sole_run(comm.solo(), pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold, recipe.output_dir], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        said = f"in use by process {holder.pid} on {socket.gethostname()}"
        with pytest.raises(ValueError, match=said):
            train(recipe, comm.solo(), Stop(), [])
        path = tmp_path / "recipe.yaml"
        path.write_text(to_yaml(recipe))
        command = [sys.executable, "-m", "comm", "launch", "-n", "2", "--", sys.executable, "-m", "trainer", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * slowness())
        assert done.returncode == 2 and said in done.stderr
    finally:
        holder.kill()
        holder.communicate()
    assert (tmp_path / "run" / ".lock").exists()
    assert train(recipe, comm.solo(), Stop(), []) == 0
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_run_folder_may_be_moved(rows, tmp_path, monkeypatch, capsys):
    """Catches a result that only the folder it was made in can evaluate."""
    for folder in ("work", "elsewhere"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    shutil.copy(rows, "rows.jsonl")
    settings = tiny_recipe(Path("rows.jsonl"), Path("run"), max_steps=1, data={"valid": "rows.jsonl"})
    assert train(settings, comm.solo(), Stop(), []) == 0
    shutil.move("run", tmp_path / "elsewhere" / "run")
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    assert main(["eval", "run"]) == 0
    assert "eval/loss" in capsys.readouterr().out
