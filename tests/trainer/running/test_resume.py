"""A run that was killed and started again is, bit for bit, the run that was never killed."""

import json
import shutil
from dataclasses import asdict

import pytest

import comm
from tiny_recipes import run_apart, tiny_recipe, write_rows
from trainer.files.storage import file_record
from trainer.metrics.records import read_records
from trainer.training.requests import Stop
from training import train

STEPS, SAVED_EVERY, KILLED_AT = 8, 3, 5
CASES = {
    "lora": {"method": "lora", "lora": {"dropout": 0.2}},
    "full": {"method": "full", "data": {"group_by_length": False}},
}


def recipe(rows, output_dir, name, **changes):
    """One of `CASES` writing to `output_dir`."""
    shape = {"max_steps": STEPS, "checkpoint": {"every": SAVED_EVERY}, "logging": {"every": 2}}
    return tiny_recipe(rows, output_dir, **(CASES[name] | shape | changes))


def run_here(settings):
    """Train in this process; returns the exit code."""
    return train(settings, comm.solo(), Stop(), [])


def curve(folder):
    """(step, loss, norm, tokens) of every row of metrics."""
    keys = ("train/global_step", "train/loss", "train/grad_norm", "train/num_tokens", "eval/loss")
    return [tuple(row.get(key, 0.0) for key in keys) for row in read_records(folder / "metrics.jsonl")]


def result(folder):
    """The bytes of the final weights."""
    paths = [*folder.glob("adapters.safetensors"), *folder.glob("model/*.safetensors")]
    return {path.name: path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows for all runs."""
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.mark.parametrize("name", CASES)
def test_killed_run_continues_bit_for_bit(rows, tmp_path, name):
    """Catches state that a checkpoint forgets: moments, dropout keys, plan position, the open row of metrics."""
    assert run_here(recipe(rows, tmp_path / "whole", name)) == 0
    run_apart(recipe(rows, tmp_path / "killed", name), 1, KILLED_AT)
    assert not result(tmp_path / "killed")
    assert run_here(recipe(rows, tmp_path / "killed", name)) == 0
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert result(tmp_path / "killed") == result(tmp_path / "whole")


def test_two_ranks_continue_on_two_and_on_one(rows, tmp_path):
    """Catches ranks that restore different states, and a global batch that follows the number of ranks."""
    whole, killed, fewer = (tmp_path / name for name in ("whole", "killed", "fewer"))
    run_apart(recipe(rows, whole, "lora"), 2)
    run_apart(recipe(rows, killed, "lora"), 2, KILLED_AT)
    shutil.copytree(killed, fewer)
    run_apart(recipe(rows, killed, "lora"), 2)
    assert curve(killed) == curve(whole)
    assert result(killed) == result(whole)
    assert run_here(recipe(rows, fewer, "lora")) == 0
    assert_close(curve(fewer), curve(whole))


def test_one_rank_continues_on_two(rows, tmp_path):
    """Catches a resumed run whose batch grows with the ranks."""
    whole, more = tmp_path / "whole", tmp_path / "more"
    assert run_here(recipe(rows, whole, "lora")) == 0
    run_apart(recipe(rows, more, "lora"), 1, KILLED_AT)
    run_apart(recipe(rows, more, "lora", batch_size_per_device=2), 2)
    assert_close(curve(more), curve(whole))


def assert_close(found, expected):
    """Equal up to float32 rounding."""
    assert len(found) == len(expected)
    for left, right in zip(found, expected):
        assert left == pytest.approx(right, rel=1e-5, nan_ok=False)


def test_finished_run_says_so(rows, tmp_path, capsys):
    """Catches a second start that trains on, or that fails."""
    settings = recipe(rows, tmp_path, "lora", max_steps=2)
    assert run_here(settings) == 0
    before = result(tmp_path)
    assert run_here(settings) == 0
    assert "is finished (2 steps)" in capsys.readouterr().out
    assert run_here(recipe(rows, tmp_path, "lora", max_steps=2, optimizer={"lr": 0.5})) == 0
    told = capsys.readouterr().out
    assert "is finished (2 steps; optimizer.lr: 0.01 then, 0.5 now)" in told and "checkpoint.resume=none" in told
    assert result(tmp_path) == before
    (tmp_path / "adapters.safetensors").unlink()
    assert run_here(settings) == 0
    assert result(tmp_path) == before


def test_result_of_an_earlier_run_is_not_this_one_s(rows, tmp_path, monkeypatch):
    """Catches a run killed before its result that is called finished, with the weights of the run before it."""
    assert run_here(recipe(rows, tmp_path / "whole", "lora", seed=1)) == 0
    folder = tmp_path / "run"
    assert run_here(recipe(rows, folder, "lora")) == 0
    old = (folder / "result.json").read_bytes()
    anew = recipe(rows, folder, "lora", seed=1, checkpoint={"every": SAVED_EVERY, "resume": "none"})
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr("trainer.running.run.finish", kill)
        run_here(anew)
    assert not (folder / "result.json").exists()
    (folder / "result.json").write_bytes(old)  # as of a run that could not take it back
    assert run_here(recipe(rows, folder, "lora", seed=1)) == 0
    assert result(folder) == result(tmp_path / "whole")
    assert json.loads((folder / "result.json").read_text())["run"] == 2


class KilledAfter(Stop):
    """Dies after a number of steps of this start of the run."""

    def __init__(self, num_steps):
        super().__init__()
        self.left = num_steps

    def requested(self):
        """Asked once after every step."""
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return 0


def kill(*arguments):
    """Stands for a run that dies before its result."""
    raise KeyboardInterrupt


def test_restarted_run_goes_on_from_its_own_checkpoints(rows, tmp_path, monkeypatch):
    """Catches resume: none that begins anew at every restart, or takes an earlier run's checkpoint for its own."""
    anew = {"checkpoint": {"every": SAVED_EVERY, "resume": "none"}, "seed": 1}
    assert run_here(recipe(rows, tmp_path / "whole", "lora", seed=1)) == 0
    folder = tmp_path / "run"
    assert run_here(recipe(rows, folder, "lora")) == 0
    settings = recipe(rows, folder, "lora", **anew)
    for restarts, num_steps in enumerate((2, KILLED_AT, 1)):  # before its first checkpoint, after it, and just after that
        monkeypatch.setenv("COMM_RESTARTS", str(restarts))
        with pytest.raises(KeyboardInterrupt):
            train(settings, comm.solo(), KilledAfter(num_steps), [])
    kept = folder / "checkpoints" / "step-0000003" / "manifest.json"
    saved = kept.stat().st_mtime_ns
    monkeypatch.setenv("COMM_RESTARTS", "3")
    assert run_here(settings) == 0
    assert kept.stat().st_mtime_ns == saved, "the run began anew"
    assert result(folder) == result(tmp_path / "whole")
    assert json.loads((folder / "result.json").read_text())["run"] == 2


def test_checkpoints_without_a_run_number_go_on(rows, tmp_path):
    """Catches results and checkpoints of before runs were counted that are refused or written anew."""
    assert run_here(recipe(rows, tmp_path, "lora", max_steps=2)) == 0
    step = tmp_path / "checkpoints" / "step-0000002"
    for path, keys in ((step / "state.json", ("state", "progress")), (tmp_path / "result.json", ())):
        facts = held = json.loads(path.read_text())
        for key in keys:
            held = held[key]
        assert held.pop("run") == 1
        path.write_text(json.dumps(facts))
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"]["state.json"] = asdict(file_record(step / "state.json"))
    (step / "manifest.json").write_text(json.dumps(manifest))
    before = (tmp_path / "result.json").read_bytes()
    assert run_here(recipe(rows, tmp_path, "lora", max_steps=2)) == 0
    assert (tmp_path / "result.json").read_bytes() == before
    assert run_here(recipe(rows, tmp_path, "lora", max_steps=3)) == 0


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"method": "full"}, "method: lora then, full now"),
        ({"batch_size_per_device": 2}, "global_batch_size: 4 then, 2 now"),
        ({"lora": {"rank": 3}}, "(lora.rank: 8 then, 3 now; lora.dropout: 0.2 then, 0.0 now)"),
        ({"model": {"dtype": "float16"}}, "(model.dtype: float32 then, float16 now)"),
    ],
)
def test_changed_run_is_refused(rows, tmp_path, changes, key):
    """Catches a checkpoint continued with another seed, method or batch."""
    assert run_here(recipe(rows, tmp_path, "lora", max_steps=2)) == 0
    with pytest.raises(ValueError, match="belongs to another run") as error:
        run_here(recipe(rows, tmp_path, "lora", max_steps=4, **changes))
    assert key in str(error.value)


def test_torn_checkpoint_is_named_and_passed_over(rows, tmp_path, capsys):
    """Catches a resume from a checkpoint whose bytes are not what was written."""
    assert run_here(recipe(rows, tmp_path / "whole", "lora")) == 0
    run_apart(recipe(rows, tmp_path / "torn", "lora"), 1, 7)
    weights = tmp_path / "torn" / "checkpoints" / "step-0000006" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"oops")
    assert run_here(recipe(rows, tmp_path / "torn", "lora")) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "step-0000006 was changed: the content of weights.safetensors" in shown
    assert result(tmp_path / "torn") == result(tmp_path / "whole")
