"""`generate` and `eval` of a run on tensor-parallel ranks, through our launcher: the words and the loss of one process."""

import io
import signal
import subprocess
import sys

import pytest

import comm
from ranks import ROOT, slowness
from tiny_recipes import tiny_recipe, write_rows
from trainer.__main__ import main
from trainer.training.requests import Stop
from trainer.verbs.generate import END, _typed_lines
from training import train

TYPED = "alpha beta\n\ngamma delta \xe9\n"
LAUNCH = [sys.executable, "-m", "comm", "launch", "-n", "2", "--", sys.executable, "-m", "trainer"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a small run whose answers are words."""
    folder = tmp_path_factory.mktemp("run")
    settings = {"method": "full", "max_steps": 40, "batch_size_per_device": 8, "optimizer": {"lr": 3e-3}}
    recipe = tiny_recipe(write_rows(folder), folder, data={"val_fraction": 0.2}, eval={"max_new_tokens": 12}, **settings)
    assert train(recipe, comm.solo(), Stop(), []) == 0
    return str(folder)


def start(*words):
    """A command on two ranks."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([*LAUNCH, *words, "parallel.tp=2"], cwd=ROOT, encoding="utf-8", **pipes)


def alone(words, capsys, monkeypatch):
    """What one process prints, without the launcher's rank before each line."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TYPED.encode())))
    assert main(words) == 0
    return capsys.readouterr().out.splitlines()


def test_chat_and_loss_are_those_of_one_process(run, capsys, monkeypatch):
    """Catches typed lines that do not reach rank 0 or the others, other tokens or losses, and an end that one rank misses."""
    commands = ["generate", run], ["eval", run]
    started = [start(*words) for words in commands]
    found = [process.communicate(TYPED, timeout=120 * slowness()) for process in started]
    assert [process.returncode for process in started] == [0, 0], found
    (chat, measured), (one_chat, one_measured) = ([shown for shown, _ in found], [alone(w, capsys, monkeypatch) for w in commands])
    assert any(one_chat) and chat.splitlines() == [f"[0] {line}" for line in one_chat], found
    numbers = [float(line.split()[-1]) for line in one_measured[1:]]
    assert [float(line.split()[-1]) for line in measured.splitlines()[1:]] == pytest.approx(numbers, rel=1e-5)


def test_typing_may_take_long_and_end_with_a_word(monkeypatch):
    """Catches a chat that the watchdog ends while nobody types, and one without an end where mpirun loses it."""
    world = comm.solo()
    phases = []

    class Typed(io.TextIOWrapper):
        def readline(self):
            phases.append(world.progress.phase)
            return super().readline()

    monkeypatch.setattr(sys, "stdin", Typed(io.BytesIO(b"one\n\xff\n" + END.encode() + b"\nnever\n")))
    assert list(_typed_lines(world)) == ["one", "\ufffd"]
    assert phases == ["reading"] * 3 and world.progress.phase == ""


def test_interrupt_ends_the_chat_on_all_ranks(exhaustive, run):
    """Catches a rank that waits in a collective for ever after Ctrl-C."""
    process = start("generate", run)
    for line in process.stderr:
        if "Type a prompt" in line:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20 * slowness())
    assert process.returncode == 130 and "Traceback" not in errors, errors
