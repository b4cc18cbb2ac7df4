"""The command line as its users meet it: exit codes, messages, and how soon it answers."""

import dataclasses
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainer.__main__ import main
from trainer.machine.errors import next_setting
from trainer.recipe.load import load_recipe
from trainer.verbs.shipped import recipes_folder
from trainer.verbs.table import VERBS

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def recipe(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {{path: owner/name}}\ndata: {{train: {rows}}}\n")
    return str(path)


def python(*words: str, **env: str) -> subprocess.CompletedProcess:
    """Run python in a fresh process, at the top of the project."""
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=60
    )


def test_validate_shows_the_resolved_recipe_and_its_meaning(recipe, capsys):
    """Defaults or the scaled batch that stay hidden until the run."""
    assert main(["validate", recipe, "batch_size_per_device=3", "--world", "4"]) == 0
    out = capsys.readouterr().out
    assert "wire_dtype: float32" in out
    assert "3 rows * 4 data-parallel rank(s) * 1 accumulation step(s) = 12 rows" in out
    assert "not looked up: owner/name" in out


def test_validate_prints_warnings(recipe, capsys):
    """A setting without effect that validate passes over."""
    assert main(["validate", recipe, "max_steps=5", "epochs=2"]) == 0
    assert "warning: epochs = 2 has no effect because max_steps is set" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["validate", "{recipe}", "lora.rnk=4"], "did you mean lora.rank?"),
        (["validate", "{recipe}", "parallel.tp=3", "--world", "4"], "but the world has 4 ranks"),
        (
            ["validate", "{recipe}", "data.valid=./no-such-folder"],
            "data.valid = ./no-such-folder: there is no such file",
        ),
        (["validate", "{recipe}", "lora.init_from=/no/such/adapter"], "lora.init_from = /no/such/adapter"),
        (["validate", "no-such-recipe.yaml"], "There is no recipe no-such-recipe.yaml"),
        (["valdate", "{recipe}"], "there is no verb valdate; did you mean validate?"),
        (["evaluate", "runs/x"], "there is no verb evaluate; did you mean eval?"),
        (["train", "{recipe}"], "there is no verb train; did you mean run?"),
        (["frobnicate"], "frobnicate is neither a recipe file nor a verb; verbs are run, "),
        (["quickstart"], "quickstart is a recipe that comes along; give its file: "),
        (["cp", "qwen-lora"], "did you mean qwen-9b-lora?"),
        (["ls", "nothing-like-it"], "nothing-like-it"),
    ],
)
def test_a_user_s_mistake_is_one_message_and_exit_code_2(recipe, capsys, words, message):
    """A traceback, or the exit code of a crash, for what the user wrote."""
    assert main([word.format(recipe=recipe) for word in words]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_a_recipe_alone_is_short_for_run(monkeypatch):
    """The shortest command sent to another verb, or its overrides lost."""
    seen = []
    fake = SimpleNamespace(main=lambda arguments: seen.append(arguments) or 7)
    monkeypatch.setitem(sys.modules, "fake_run", fake)
    monkeypatch.setitem(VERBS, "run", dataclasses.replace(VERBS["run"], function="fake_run:main"))
    assert main(["my.yaml", "seed=1", "--traceback", "lora.rank=2"]) == 7
    assert main(["run", "my.yaml"]) == 7
    assert [(arguments.recipe, arguments.overrides) for arguments in seen] == [
        ("my.yaml", ["seed=1", "lora.rank=2"]),
        ("my.yaml", []),
    ]


def test_recipe_problems_are_listed_by_rank_0_only(recipe, capsys, monkeypatch):
    """The same list printed once per rank."""
    monkeypatch.setenv("MLX_RANK", "1")
    assert main(["validate", recipe, "seed=x"]) == 2
    assert capsys.readouterr().err == f"rank 1: {recipe}: 1 problem\n"
    monkeypatch.setenv("MLX_RANK", "0")
    assert main(["validate", recipe, "seed=x"]) == 2
    assert "seed = x: not allowed" in capsys.readouterr().err


def test_words_that_every_rank_got_are_corrected_by_rank_0_only(capsys, monkeypatch):
    """The usage text once per rank, or an exit code that differs between ranks."""
    monkeypatch.setenv("MLX_RANK", "1")
    assert main(["exprot", "runs/x"]) == 2
    with pytest.raises(SystemExit) as caught:
        main(["run", "my.yaml", "--nope"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == ""


def test_files_are_written_by_rank_0_only(tmp_path, monkeypatch):
    """Two ranks that write the same export, each into the other's unfinished folder."""
    monkeypatch.setenv("MLX_RANK", "1")
    assert main(["cp", "quickstart", str(tmp_path)]) == 0
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, code, shown",
    [
        (
            "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBuffer"
            "CallbackErrorOutOfMemory)",
            2,
            "Next: batch_size_per_device=2 grad_accumulation_steps=2",
        ),
        ("[malloc] Unable to allocate 9000000000 bytes.", 2, "Next: batch_size_per_device=2"),
        ("[metal::malloc] Resource limit (499000) exceeded.", 2, "Next: limits.cache_gib=2"),
        (
            "[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002:kIOGPUCommandBuffer"
            "CallbackErrorTimeout)",
            1,
            "a rank waited for a late one",
        ),
        ("[matmul] shapes do not fit", 1, "Traceback"),
    ],
)
def test_errors_of_the_device_name_the_next_setting(recipe, capsys, monkeypatch, text, code, shown):
    """Metal's own words, after which a newcomer does not know what to change; or advice for another error."""

    def fail(arguments):
        raise RuntimeError(text)

    monkeypatch.setattr("trainer.verbs.validate.main", fail)
    assert main(["validate", recipe, "batch_size_per_device=4"]) == code
    err = capsys.readouterr().err
    assert shown in err and ("Traceback" in err) == (shown == "Traceback")


def test_memory_is_saved_by_the_cheapest_setting_first(recipe):
    """Advice that was followed already, or that changes the global batch."""
    lora, small = ["batch_size_per_device=1", "gradient_checkpointing=true"], ["model.quantize={bits: 4}"]
    cases = [
        (["batch_size_per_device=6"], "batch_size_per_device=3 grad_accumulation_steps=2 (the global batch stays)"),
        (["batch_size_per_device=3"], "batch_size_per_device=1 grad_accumulation_steps=3 (the global batch stays)"),
        (["batch_size_per_device=4", "global_batch_size=4"], "batch_size_per_device=2 (the global batch stays)"),
        (["batch_size_per_device=1"], "gradient_checkpointing=true"),
        ([*lora, "method=full"], "method=lora"),
        (lora, "model.quantize="),
        ([*lora, *small, "data.max_seq_len=1024"], "data.max_seq_len=512"),
        ([*lora, *small, "data.max_seq_len=256"], "more ranks"),
    ]
    for overrides, advice in cases:
        found = next_setting(load_recipe(recipe, overrides))
        assert found.startswith(advice), f"{overrides}: {found}"


@pytest.mark.parametrize(
    "error, code, shown",
    [
        (ValueError("what is allowed"), 2, "error: what is allowed"),
        (
            FileNotFoundError(2, "No such file or directory", "x.json"),
            2,
            "error: No such file or directory: x.json",
        ),
        (OSError(28, "No space left on device", "out"), 1, "error: No space left on device: out"),
        (IsADirectoryError(21, "Is a directory", "out"), 2, "error: Is a directory: out"),
        (RuntimeError("our mistake"), 1, "Traceback"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(recipe, capsys, monkeypatch, error, code, shown):
    """A crash that looks like a user's mistake, or the other way round."""

    def fail(arguments):
        raise error

    monkeypatch.setattr("trainer.verbs.validate.main", fail)
    assert main(["validate", recipe]) == code
    assert shown in capsys.readouterr().err


def test_traceback_on_request(recipe, capsys):
    """No way to see where a message came from."""
    assert main(["validate", recipe, "seed=x", "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb, capsys):
    """A verb that a newcomer cannot find out about, or a help text that imports a model library."""
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert f"example: python -m trainer {verb} " in capsys.readouterr().out.replace("\n", " ") + " "


def test_overview_names_every_verb(capsys):
    """A verb missing from the overview."""
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {verb} " in out for verb in VERBS)


def test_cp_writes_a_recipe_that_validates(tmp_path, capsys):
    """A copy that lacks its schema, or that writes over the user's own recipe."""
    assert main(["cp", "qwen-9b-lora", str(tmp_path)]) == 0
    copy = tmp_path / "qwen-9b-lora.yaml"
    assert copy.read_text() == (recipes_folder() / copy.name).read_text()
    assert (tmp_path / "recipe.schema.json").is_file()
    copy.write_text("mine")
    assert main(["cp", "qwen-9b-lora", str(copy)]) == 2
    assert copy.read_text() == "mine"
    assert main(["cp", "qwen-9b-lora", str(copy), "--force"]) == 0
    assert load_recipe(copy).model.path == "Qwen/Qwen3.5-9B"
    capsys.readouterr()


def test_ls_shows_each_recipe_with_its_headline(capsys):
    """A recipe without a first line that says what it is."""
    assert main(["ls", "qwen-9b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3 and all(line.split(maxsplit=1)[1].endswith(".") for line in lines)


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["validate", "recipes/qwen-9b-lora.yaml"]])
def test_answers_at_once_without_heavy_imports(words):
    """An import of MLX, a tokenizer library or W&B that makes the command line wait."""
    heavy = ("mlx", "mlx_lm", "datasets", "transformers", "wandb", "numpy", "comm.group", "parallel")
    code = (
        "import sys; from trainer.__main__ import main\n"
        f"try: main({words!r})\nexcept SystemExit: pass\n"
        f"print(sorted(set({heavy!r}) & set(sys.modules)))"
    )
    result = python("-c", code)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_help_and_validate_take_less_than_0_7_seconds():
    """A slow start. Counted in processor time, because the machine may have other work."""
    for words in (["--help"], ["validate", "recipes/qwen-9b-lora.yaml"]):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert python("-m", "trainer", *words).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert seconds < 0.7, f"{words} took {seconds:.2f} s"
