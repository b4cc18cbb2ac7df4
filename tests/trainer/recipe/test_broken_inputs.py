"""Models, rows, adapters and output folders that are not what a recipe says: one sentence and exit code 2."""

import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from ranks import run_ranks
from trainer.__main__ import main
from trainer.metrics.streams import harmless

DATA = Path(__file__).parents[2] / "reference" / "data"
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


def with_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "model" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def with_template(template: str, **columns: Any) -> Callable[[Path], None]:
    """Chat rows with these further columns, the second with a tool call, and a tokenizer with this chat template."""

    def change(folder: Path) -> None:
        (folder / "model" / "chat_template.jinja").unlink(missing_ok=True)
        file = folder / "model" / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
        (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": chat} | columns) + "\n" for chat in CHATS))

    return change


def of_type(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "model" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": name}))

    return change


CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "a"}}}
TOOL = {"type": "function", "function": {"name": "find", "description": "find it", "parameters": {"type": "object"}}}
CHATS = [
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [CALL]}],
]
PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a + b %}{% endfor %}{% endfor %}"
NESTED = b"[" * 100_000

BROKEN = {
    "rows nested": (with_file("rows.jsonl", NESTED), "rows.jsonl:1.*not JSON"),
    "half a character": (with_file("rows.jsonl", b'{"text": "a\\ud800"}\n'), "rows.jsonl:1.*half a character"),
    "config nested": (with_file("model/config.json", NESTED), "config.json is not JSON"),
    "config a list": (with_file("model/config.json", b"[]"), "config.json must hold an object"),
    "layers a word": (with_config(num_hidden_layers="two"), "'num_hidden_layers' expected int, got str"),
    "hidden size 0": (with_config(hidden_size=0), "cannot be opened|fails with this model"),
    "layers without end": (with_config(num_hidden_layers=10**6, layer_types=None), "num_hidden_layers=1000000; .* 1 to 10,000"),
    "vocabulary of -1": (with_config(vocab_size=-1), "vocab_size=-1; it must be a whole number from 1"),
    "heads 0": (with_config(num_attention_heads=0), "cannot be opened|fails with this model"),
    "vocabulary a word": (with_config(vocab_size="many"), "'vocab_size' expected int, got str"),
    "rope theta a list": (with_config(rope_theta=[10000.0], rope_parameters=None), "cannot be opened|fails with this model"),
    "tokenizer nested": (with_file("model/tokenizer.json", NESTED), "no tokenizer can be read"),
    "tokenizer a list": (with_file("model/tokenizer.json", b"[]"), "no tokenizer can be read"),
    "tokenizer config a list": (with_file("model/tokenizer_config.json", b"[]"), "no tokenizer can be read"),
    "template divides by 0": (with_template("{{ 1 // 0 }}"), "rows.jsonl:1.*template refuses it.*zero"),
    "template recurses": (with_template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), "template refuses it.*recursion"),
    "template without end": (with_template(LOOP), "rows.jsonl:1.*it took more than"),
    "template builds too much": (with_template("{{ 'a' * 30000000 }}"), "makes 30,000,000 characters"),
    "template drops tool calls": (with_template(PLAIN), "rows.jsonl:2.*leaves out the tool calls of message 1"),
    "template takes gigabytes": (with_template("{{ ('a' * 99999999999) | length }}"), "rows.jsonl:1.*more than 4 GiB of memory"),
    "template drops tools": (with_template(PLAIN, tools=[TOOL]), "rows.jsonl:1.*leaves out the row's tools"),
    "no folder": (lambda folder: shutil.rmtree(folder / "model"), "model.path = .*: there is no such file or folder"),
    "no config": (without("config.json"), "has no config.json"),
    "config torn": (with_file("model/config.json", TORN), "config.json is not JSON"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "holds no tokenizer files"),
    "no weights": (without("model.safetensors"), "No safetensors found"),
    "weights torn": (with_file("model/model.safetensors", TORN * 100), "download it again"),
    "architecture": (of_type("qwen99"), "qwen99 not supported"),
    "no rows": (with_file("rows.jsonl", b"\n"), "rows.jsonl has no rows to use.$"),
    "other columns": (with_file("rows.jsonl", b'{"foo": "a"}\n'), "No data format fits the columns 'foo'"),
    "output a file": (with_file("output", b"x"), "output_dir = .*output is a file"),
}


WITH_SETTINGS = {
    "vocabulary too large": (lambda folder: None, ["model.path=null", "model.config={model_type: llama}",
        "model.tokenizer=bpe:999999999999"], "model.tokenizer = bpe:999999999999"),
    "NUL in a path": (lambda folder: None, ['data.train="a\\0.jsonl"'], "data.train = a.*no path"),
    "path too long": (lambda folder: None, [f"output_dir={'a' * 300}"], "output_dir = a.*no path"),
    "quote never closed": (with_file("rows.csv", b'text\na\n"b\nc\nd\n'), ["data.train={folder}/rows.csv"],
        "rows.csv:3.*never closed"),
    "parquet torn": (with_file("rows.parquet", b"PAR1" + b"x" * 100 + b"PAR1"), ["data.train={folder}/rows.parquet"],
        "rows.parquet:row 1.*not parquet"),
    "tool calls dropped, all tokens learned": (with_template(PLAIN), ["data.loss_on=all"], "leaves out the tool calls"),
}  # fmt: skip


@pytest.mark.parametrize("case", WITH_SETTINGS)
def test_run_says_what_is_wrong_with_a_setting(tmp_path: Path, recipe: str, capsys, monkeypatch, case: str) -> None:
    """Catches a traceback, a crash, or rows that are learned without a part of them."""
    monkeypatch.setenv("MLX_TRAINER_CACHE", str(tmp_path / "cache"))
    damage, settings, message = WITH_SETTINGS[case]
    damage(tmp_path)
    assert main([recipe, *(setting.replace("{folder}", str(tmp_path)) for setting in settings)]) == 2
    told = capsys.readouterr().err
    assert re.search(message, told, re.DOTALL) and "Traceback" not in told, told


def test_rows_that_call_tools_are_taken_where_the_template_writes_the_calls(tmp_path: Path, recipe: str, monkeypatch) -> None:
    """Catches a refusal of every chat with a tool call."""
    monkeypatch.setenv("MLX_TRAINER_CACHE", str(tmp_path / "cache"))
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
    with_template(PLAIN.replace("{{ m.content }}", "{{ m.content }}" + calls))(tmp_path)
    assert main(["data", recipe, "data.loss_on=all"]) == 0


ADAPTERS = {
    "empty": {},
    "a list": [],
    "rank 0": {"r": 0, "lora_alpha": 16},
    "rank a word": {"r": "eight", "lora_alpha": 16},
    "alpha null": {"r": 8, "lora_alpha": None},
}


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_model.safetensors"])
def test_odd_adapter_configs(tmp_path: Path, recipe: str, capsys, monkeypatch, case: str, name: str) -> None:
    """Catches a traceback, or a scale that is not a number."""
    monkeypatch.setenv("MLX_TRAINER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(ADAPTERS[case]))
    mx.save_safetensors(str(tmp_path / "adapter" / name), {"x.lora_a": mx.zeros((2, 2))} if "adapters" in name else {})
    assert main([recipe, f"lora.init_from={tmp_path}/adapter"]) == 2
    told = capsys.readouterr().err
    assert "adapter_config.json" in told and "Traceback" not in told, told


@pytest.mark.parametrize("name", [0.5, ["qwen3"], {}, None])
def test_an_architecture_that_is_no_name(tmp_path: Path, recipe: str, capsys, name: Any) -> None:
    """Catches a traceback of `plan` for a model type that is no text."""
    with_config(model_type=name)(tmp_path)
    assert main(["plan", recipe]) == 2
    told = capsys.readouterr().err
    assert "model_type" in told and "Traceback" not in told, told


@pytest.mark.parametrize("case", BROKEN)
def test_run_says_what_is_broken(tmp_path: Path, recipe: str, capsys, monkeypatch, case: str) -> None:
    """Catches a traceback out of another library, or an error that does not name the file."""
    monkeypatch.setenv("MLX_TRAINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("trainer.data.chat.MAX_SECONDS", 3.0)
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
outcome = run(sys.argv[1 + int(os.environ["MLX_RANK"])].splitlines())  # a line a word
sys.modules["comm"].leave(outcome.code, outcome.error)
"""


def test_two_ranks_tell_it_once_with_one_exit_code(tmp_path: Path, recipe: str) -> None:
    """Catches the same sentence from every rank, and a rank that waits for one that has left."""
    (tmp_path / "model" / "model.safetensors").write_bytes(TORN * 100)
    ranks = run_ranks(RANK, 2, args=[recipe, recipe], check=False)
    assert [rank.returncode for rank in ranks] == [2, 2], ranks
    assert "download it again" in ranks[0].stderr and ranks[0].stderr.count("\n") == 1, ranks[0].stderr
    assert ranks[1].stderr == ""


def test_two_ranks_refuse_a_nan_that_one_of_them_holds(tmp_path: Path, recipe: str, monkeypatch) -> None:
    """Catches a pipeline whose other stage goes on and waits, and the same sentence from every rank."""
    monkeypatch.setenv("MLX_TRAINER_CACHE", str(tmp_path / "cache"))
    assert main([recipe, "max_steps=1"]) == 0
    file = tmp_path / "output" / "adapters.safetensors"
    tensors = dict(mx.load(str(file)))
    last = max(name for name in tensors if name.endswith("lora_b"))
    tensors[last] = tensors[last] * float("nan")
    mx.eval(tensors)
    mx.save_safetensors(str(file), tensors)
    words = "\n".join(["eval", f"{tmp_path}/output", f"data.valid={tmp_path}/rows.jsonl", "parallel.pp=2"])
    ranks = run_ranks(RANK, 2, args=[words, words], check=False)
    assert [rank.returncode for rank in ranks] == [2, 2], ranks
    assert f"not finite: {last}." in ranks[0].stderr and ranks[1].stderr == "", ranks


def test_one_rank_without_the_recipe_is_named(tmp_path: Path, recipe: str) -> None:
    """Catches a host that lacks a file and leaves the others waiting, or an error that does not name the host."""
    ranks = run_ranks(RANK, 2, args=[recipe, str(tmp_path / "other.yaml")], check=False)
    assert [rank.returncode for rank in ranks] == [2, 2], ranks
    assert "rank 1 on " in ranks[0].stderr and "There is no recipe" in ranks[0].stderr, ranks[0].stderr


def test_a_tokenizer_of_another_model(tmp_path: Path, recipe: str, capsys, monkeypatch) -> None:
    """Catches a token id that reads beyond the embedding's memory, where the config says more than the weights have."""
    monkeypatch.setenv("MLX_TRAINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("trainer.opening.num_embeddings", lambda model: 3)
    assert main([recipe]) == 2
    assert "the tokenizer does not belong to this model" in capsys.readouterr().err


RESULTS = {"a list": "[]", "null": "null", "other keys": "{}", "words": '{"run": "x", "step": "y"}', "nested": "[" * 100_000}


@pytest.mark.parametrize("case", RESULTS)
def test_a_result_of_another_shape(tmp_path: Path, recipe: str, capsys, monkeypatch, case: str) -> None:
    """Catches a traceback for a result file that somebody has changed; the run has ended and writes it anew."""
    monkeypatch.setenv("MLX_TRAINER_CACHE", str(tmp_path / "cache"))
    assert main([recipe, "max_steps=1"]) == 0
    result = tmp_path / "output" / "result.json"
    written = result.read_text()
    result.write_text(RESULTS[case])
    for name in ("samples.jsonl", "metrics.jsonl"):
        with open(tmp_path / "output" / name, "a", encoding="utf-8") as file:
            file.write(RESULTS[case] + "\n")
    assert main([recipe, "max_steps=1"]) == 0
    assert main(["report", f"{tmp_path}/output", "--out", f"{tmp_path}/report.html"]) == 0
    assert result.read_text() == written and "Traceback" not in capsys.readouterr().err


def test_answers_cannot_steer_the_terminal() -> None:
    """Catches escape sequences of a row or an answer that move the cursor or rename the window."""
    assert harmless("a\x1b]0;owned\x07\n\tb\u202e") == "a·]0;owned·\n\tb·"


@pytest.mark.parametrize("key", ["lora.rank", "batch_size_per_device"])
def test_plan_says_that_a_shape_is_too_large(recipe: str, capsys, key: str) -> None:
    """Catches MLX's error of a dimension that 32 bits do not hold."""
    assert main(["plan", recipe, f"{key}=3000000000"]) == 2
    told = capsys.readouterr().err
    assert "does not fit in memory" in told and "Traceback" not in told, told


@pytest.mark.parametrize("value", [0, -1, 10**6, 10**30, "x", 0.5, True])
def test_plan_names_a_number_of_layers_that_no_model_has(tmp_path: Path, recipe: str, capsys, value: Any) -> None:
    """Catches a plan that makes layers without end, or none."""
    with_config(num_hidden_layers=value)(tmp_path)
    assert main(["plan", recipe]) == 2
    assert "num_hidden_layers=" in capsys.readouterr().err
