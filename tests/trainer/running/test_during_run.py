"""What happens beside the steps of a run: early stopping, the watchdog, checkpoints on request, traces, full disks."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import comm
from tiny_recipes import run_apart, tiny_recipe, write_rows
from trainer.bench.baseline import read_baseline, write_baseline
from trainer.checkpoint.folder import open_checkpoint
from trainer.machine import limits
from trainer.metrics.records import read_records
from trainer.recipe.config import LimitsConfig
from trainer.recipe.load import to_yaml
from trainer.results.opened import recipe_of
from trainer.running import run
from trainer.training.progress import Progress, StopRules
from trainer.training.requests import Stop
from trainer.verbs.export import open_run
from training import train

ROOT = Path(__file__).parents[3]
# Validation loss after each step: best at step 3, and no better in the three validations after it.
LOSSES = {0: 9.0, 1: 5.0, 2: 4.0, 3: 2.0, 4: 3.0, 5: float("nan"), 6: 2.0, 7: 1.0, 8: 0.5}


class StopAfter(Stop):
    """Dies, or is stopped by a signal, after a number of steps of this start of the run."""

    def __init__(self, step, number=0):
        super().__init__()
        self.step, self.sent, self.asked = step, number, 0

    def requested(self):
        """Asked once after every step."""
        self.asked += 1
        if self.asked < self.step:
            return 0
        if not self.sent:
            raise KeyboardInterrupt
        return self.sent


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows for all runs."""
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture
def scripted(monkeypatch):
    """Validations that measure what `LOSSES` says."""

    def evaluation(parts, metrics, callbacks):
        def evaluate(step):
            metrics.log({"train/global_step": step, "eval/loss": LOSSES[step]})
            return {"eval/loss": LOSSES[step]}

        return evaluate

    monkeypatch.setattr(run, "_evaluation", evaluation)


def patient(rows, output_dir, **changes):
    """A run that validates after every step and loses its patience after step 6."""
    shape = {"max_steps": 8, "eval": {"every": 1, "patience": 3}, "checkpoint": {"every": 2, "keep_last": 1}}
    return tiny_recipe(rows, output_dir, **(shape | changes))


def content(folder):
    """Every file's bytes, but those that hold times or the folder's name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    named = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    measured = ("metrics.jsonl", "baseline.json", "recipe.yaml")
    return {name: data for name, data in named.items() if name not in measured}


def equal(left, right):
    """Whether two dicts of tensors are the same bit for bit."""
    return left.keys() == right.keys() and all(mx.array_equal(left[name], right[name]) for name in left)


def test_patience_ends_the_run_with_the_best_weights(rows, tmp_path, scripted, capsys):
    """Catches a best checkpoint that is pruned, a result of overfitted weights, and a second start that trains on."""
    assert train(patient(rows, tmp_path), comm.solo(), Stop(), []) == 0
    checkpoints = tmp_path / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["best", "step-0000003", "step-0000006"]
    best = open_checkpoint(checkpoints / "best")
    assert best.step == 3
    assert equal(mx.load(str(tmp_path / "adapters.safetensors")), best.tensors("weights"))
    facts = json.loads((tmp_path / "result.json").read_text())
    assert facts == {"run": 1, "step": 6, "weights_step": 3, "eval_loss": 2.0}
    shown = " ".join(capsys.readouterr().out.split())
    assert "Stopped early after step 6" in shown and "the weights of step 3 (best validation loss, 2.0000)" in shown
    before = (tmp_path / "adapters.safetensors").read_bytes()
    assert train(patient(rows, tmp_path), comm.solo(), Stop(), []) == 0
    assert "is finished (6 steps, no better validation loss" in capsys.readouterr().out
    assert (tmp_path / "adapters.safetensors").read_bytes() == before
    assert read_records(tmp_path / "metrics.jsonl")[-1]["train/global_step"] == 6


def test_best_checkpoint_is_a_checkpoint_for_every_verb(rows, tmp_path, scripted):
    """Catches `checkpoints/best` that only some commands understand."""
    assert train(patient(rows, tmp_path / "run"), comm.solo(), Stop(), []) == 0
    target = str(tmp_path / "run" / "checkpoints" / "best")
    opened = dict(tree_flatten(open_run(target, recipe_of(target, [])).model.trainable_parameters()))
    assert equal(opened, mx.load(str(tmp_path / "run" / "checkpoints" / "step-0000003" / "weights.safetensors")))
    again = patient(rows, tmp_path / "again", checkpoint={"every": 0, "resume": target}, eval={"every": 0}, max_steps=4)
    assert train(again, comm.solo(), Stop(), []) == 0
    assert read_records(tmp_path / "again" / "metrics.jsonl")[0]["train/global_step"] == 4


@pytest.mark.parametrize("killed_at", [3, 5])
def test_patience_survives_a_restart_bit_for_bit(rows, tmp_path, scripted, killed_at):
    """Catches a restart that counts bad validations anew, or forgets which step was the best."""
    assert train(patient(rows, tmp_path / "whole"), comm.solo(), Stop(), []) == 0
    with pytest.raises(KeyboardInterrupt):
        train(patient(rows, tmp_path / "killed"), comm.solo(), StopAfter(killed_at), [])
    assert train(patient(rows, tmp_path / "killed"), comm.solo(), Stop(), []) == 0
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_best_that_is_gone_is_chosen_anew(rows, tmp_path, scripted):
    """Catches a run that stops because of a best step whose weights nobody has any more."""
    with pytest.raises(KeyboardInterrupt):
        train(patient(rows, tmp_path), comm.solo(), StopAfter(5), [])
    shutil.rmtree(tmp_path / "checkpoints" / "step-0000003")
    assert train(patient(rows, tmp_path), comm.solo(), Stop(), []) == 0
    assert json.loads((tmp_path / "result.json").read_text()) == {"run": 1, "step": 8, "weights_step": 8, "eval_loss": 0.5}


def test_loss_that_stays_high_ends_the_run(rows, tmp_path, capsys):
    """Catches a watchdog that does nothing, that one bad row sets off, or that prunes what was good."""
    changes = {"limits": {"loss_watchdog": 0.01}, "checkpoint": {"every": 1, "keep_last": 1}}
    assert train(tiny_recipe(rows, tmp_path, **changes), comm.solo(), Stop(), []) == 1
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and "above limits.loss_watchdog = 0.01" in error and "after step 3" in error
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-0000002", "step-0000003"]
    assert not (tmp_path / "adapters.safetensors").exists()
    assert train(tiny_recipe(rows, tmp_path), comm.solo(), Stop(), []) == 0


def test_watchdog_counts_rows_one_after_the_other():
    """Catches high rows that are added up over the run, and rows without any finite loss that pass for good."""
    rules, progress = StopRules(highest_loss=1.0), Progress()
    for loss in (2.0, 3.0, 0.5, 1.5, None):
        rules.note_row(progress, loss)
        assert not rules.is_given_up(progress)
    rules.note_row(progress, float("nan"))
    assert rules.is_given_up(progress)
    assert not rules.is_given_up(Progress.resumed(progress.as_dict()))


def test_trigger_file_brings_a_checkpoint(rows, tmp_path):
    """Catches a request that is not seen, or that is never done with."""
    (tmp_path / "checkpoint.now").touch()
    code = train(tiny_recipe(rows, tmp_path), comm.solo(), StopAfter(3, signal.SIGTERM), [])
    assert code == 143
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-0000001", "step-0000003"]
    assert not (tmp_path / "checkpoint.now").exists()


def test_profile_writes_a_trace(rows, tmp_path):
    """Catches a trace that no viewer opens, lacks a phase, or changes what is trained."""
    assert train(tiny_recipe(rows, tmp_path / "plain"), comm.solo(), Stop(), []) == 0
    assert train(tiny_recipe(rows, tmp_path / "traced", profile={"start": 2, "steps": 2}), comm.solo(), Stop(), []) == 0
    check_trace(tmp_path / "traced", num_ranks=1, steps=[2, 3])
    results = [(tmp_path / name / "adapters.safetensors").read_bytes() for name in ("plain", "traced")]
    assert results[0] == results[1]


def check_trace(folder, num_ranks, steps):
    """Complete events of every phase and step on every rank, inner phases within the outer ones."""
    events = json.loads((folder / "profile" / "trace.json").read_text())["traceEvents"]
    assert [event["pid"] for event in events if event["ph"] == "M"] == list(range(num_ranks))
    for rank in range(num_ranks):
        for step in steps:
            found = {e["name"]: e for e in events if e["ph"] == "X" and e["pid"] == rank and e["args"]["step"] == step}
            assert list(found) == [
                "data",
                "gradients",
                "optimizer",
                "forward and backward",
                "wait for other ranks",
                "communication",
            ]
            assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in found.values())
            outer, inner = found["gradients"], found["communication"]
            assert outer["ts"] <= inner["ts"]
            assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 1e-3
    assert {event["args"]["step"] for event in events if event["ph"] == "X"} == set(steps)


def test_two_ranks_act_on_requests_together(rows, tmp_path):
    """Catches ranks of which one saves, traces or gives up while the other goes on, and waits for ever; and a baseline
    of one device that several devices do not find."""
    assert train(tiny_recipe(rows, tmp_path / "one"), comm.solo(), Stop(), []) == 0
    (tmp_path / "one" / "baseline.json").rename(tmp_path / "baseline.json")
    (tmp_path / "checkpoint.now").touch()
    changes = {"limits": {"loss_watchdog": 0.01}, "profile": {"start": 2, "steps": 5}}
    results = run_apart(tiny_recipe(rows, tmp_path, **changes), 2, check=False)
    assert [result.result for result in results] == [1, 1]
    assert "".join(result.stderr for result in results).count("error:") == 1
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-0000001", "step-0000003"]
    check_trace(tmp_path, num_ranks=2, steps=[2, 3])
    (baseline,) = json.loads((tmp_path / "baseline.json").read_text()).values()
    for row in read_records(tmp_path / "metrics.jsonl")[:3]:
        expected = 100 * row["throughput/tokens_per_sec_per_device"] / baseline["tokens_per_sec"]
        assert row["throughput/scaling_efficiency_pct"] == pytest.approx(expected)


def test_baseline_is_of_the_same_recipe(tmp_path):
    """Catches an efficiency against another model's or batch's speed, and a run that replaces a careful measurement."""
    facts, other = {"model": "a", "batch": 4}, {"model": "a", "batch": 8}
    assert read_baseline(tmp_path / "none", facts) is None
    write_baseline(tmp_path / "new", facts, 100.0, "run")
    write_baseline(tmp_path / "new", facts, 200.0, "bench")
    write_baseline(tmp_path / "new", facts, 150.0, "run")
    assert read_baseline(tmp_path / "new", facts) == 200.0
    assert read_baseline(tmp_path / "new", other) is None
    write_baseline(tmp_path / "new", other, 50.0, "run")
    assert (read_baseline(tmp_path / "new", facts), read_baseline(tmp_path / "new", other)) == (200.0, 50.0)


def test_unwritable_wandb_folder_is_a_notice(rows, tmp_path, capsys, monkeypatch):
    """Catches a run that does not start because W&B cannot."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (tmp_path / "wandb").write_text("in the way")
    settings = tiny_recipe(rows, tmp_path, max_steps=1, logging={"wandb": {"project": "p", "mode": "offline"}})
    assert train(settings, comm.solo(), Stop(), []) == 0
    assert "W&B is off: File exists" in capsys.readouterr().out


def test_texts_are_continued_at_every_validation(rows, tmp_path):
    """Catches samples that plain text never gets, or that are of other rows each time."""
    shape = {"data": {"val_fraction": 0.2}, "eval": {"every": 1, "generate": 2, "max_new_tokens": 4}, "max_steps": 2}
    assert train(tiny_recipe(rows, tmp_path, **shape), comm.solo(), Stop(), []) == 0
    lines = read_records(tmp_path / "samples.jsonl")
    assert [line["train/global_step"] for line in lines] == [0, 1, 2]
    prompts = [[sample["prompt"] for sample in line["samples"]] for line in lines]
    assert len(prompts[0]) == 2 and prompts[0] == prompts[1] == prompts[2]
    assert all(sample["expected"] is None for line in lines for sample in line["samples"])


def test_large_cache_is_given_back(monkeypatch):
    """Catches freed memory that stays with MLX until the machine swaps, and a cache that is cleared for nothing."""
    cleared = []
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(True))
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 2**30)
    assert not limits.clear_large_cache(LimitsConfig(memory_gib=5.0)) and not cleared
    assert limits.clear_large_cache(LimitsConfig(memory_gib=3.9)) and cleared


def test_full_disk_under_a_checkpoint(rows, tmp_path):
    """Catches ranks that wait for the one whose disk is full, a torn checkpoint, and a run that cannot go on."""
    mesh = {"parallel": {"pp": 2, "dp_replicate": 1}, "method": "full", "grad_accumulation_steps": 2}
    settings = tiny_recipe(rows, tmp_path, checkpoint={"every": 2}, max_steps=5, **mesh)
    results = run_apart(settings, 2, check=False, full_after=3)
    for result in results:
        assert result.returncode == 1
        assert "The checkpoint of step 4 could not be written" in result.stderr
        assert "Earlier checkpoints are kept: step-0000002" in result.stderr
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-0000002"]
    again = tiny_recipe(rows, tmp_path, checkpoint={"every": 2}, max_steps=5, method="full", grad_accumulation_steps=2)
    assert train(again, comm.solo(), Stop(), []) == 0
    steps = [row["train/global_step"] for row in read_records(tmp_path / "metrics.jsonl") if "train/loss" in row]
    assert steps == [1, 2, 3, 4, 5]


def fill_disk(*arguments):
    """Stands for a write on a disk without room."""
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_under_the_result(rows, tmp_path, monkeypatch):
    """Catches a run that is lost, or called finished, because its result did not fit."""
    settings = tiny_recipe(rows, tmp_path, max_steps=2)
    monkeypatch.setattr("trainer.results.mlx_lm_format.write_tensor_file", fill_disk)
    with pytest.raises(OSError, match="The result could not be written.*No space left on device.*step 2 is there"):
        train(settings, comm.solo(), Stop(), [])
    monkeypatch.undo()
    assert train(settings, comm.solo(), Stop(), []) == 0
    assert (tmp_path / "adapters.safetensors").is_file()
    assert (tmp_path / "result.json").is_file()


def test_result_that_one_rank_cannot_write(rows, tmp_path, exhaustive):
    """Catches ranks that wait in a gather for the one that failed to write the model."""
    mesh = {"parallel": {"pp": 2, "dp_replicate": 1}, "method": "full", "grad_accumulation_steps": 2}
    (tmp_path / "model.tmp").write_text("in the way")
    for result in run_apart(tiny_recipe(rows, tmp_path, max_steps=1, **mesh), 2, check=False):
        assert result.returncode == 1
        assert "The result could not be written" in result.stderr


def write_recipe(rows, output_dir, **changes):
    """The file of a tiny recipe."""
    path = output_dir.with_suffix(".yaml")
    path.write_text(to_yaml(tiny_recipe(rows, output_dir, **changes)))
    return path


@pytest.mark.parametrize("place", ["no reader", "full disk"])
def test_output_that_cannot_be_written(rows, tmp_path, place):
    """Catches a run behind `| head` that ends without its checkpoint and without a word, and one that a full disk of
    its log ends.
    """
    if place == "full disk" and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    command = [sys.executable, "-m", "trainer", str(write_recipe(rows, tmp_path / "run"))]
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as closed, open("/dev/full", "wb") if place == "full disk" else nullcontext(closed) as out:
        done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.PIPE, text=True, timeout=120)
    code, saved = (141, "step-0000001") if place == "no reader" else (0, "step-0000006")
    assert done.returncode == code, done.stderr
    assert done.stderr.count("Nothing can be written to the output any more") == 1 and "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [saved]


@pytest.mark.parametrize("again", [signal.SIGHUP, signal.SIGTERM])
def test_the_terminal_goes_away(rows, tmp_path, again):
    """Catches a run that a second signal ends before its checkpoint, where the first was only a closed terminal."""
    path = write_recipe(rows, tmp_path / "run", max_steps=100_000)
    command = [sys.executable, "-m", "trainer", str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run_:
        assert any(line.startswith("step 3/") for line in run_.stdout)
        run_.send_signal(signal.SIGHUP)
        run_.send_signal(again)
        _, errors = run_.communicate(timeout=60)
    assert run_.returncode in (128 + signal.SIGHUP, 128 + again), errors
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert open_checkpoint(saved).step >= 3
