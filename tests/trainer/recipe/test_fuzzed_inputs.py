"""Inputs that are changed at random: every verb ends with its result or one sentence, without traceback, crash or hang."""

import faulthandler
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from comm.launcher.hostfile import read_hostfile
from trainer.__main__ import main
from training import kept_signals

DATA = Path(__file__).parents[2] / "reference" / "data"
NUM_EXAMPLES = int(os.environ.get("FUZZED_INPUTS", "1000"))
LONGEST_SECONDS = 120  # of one example, on a busy machine
DEPTH = 100_000
ODD = (
    None, True, False, -1, 0, 1, 0.5, 1e308, float("inf"), float("nan"), 10**30, -(10**30), "", "x", "0", "two", "\ud800",
    "a\0b", "\x1b[2J", "-x", "../..", "a" * 300, "bpe:99999999999999", "{{ 1 // 0 }}", [], {}, [None], [[]], {"": None}, [{"x": {}}],
)  # fmt: skip
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ROWS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"messages": [{"role": "system", "content": "c"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
]  # fmt: skip
HOSTS = {
    "backend": "jaccl",
    "envs": ["A=1"],
    "hosts": [
        {"ssh": "a", "ips": ["10.0.0.1"], "rdma": [None, "rdma_en2"]},
        {"ssh": "b", "ips": ["10.0.0.2"], "rdma": ["rdma_en2", None]},
    ],
}


@dataclass(frozen=True)
class Target:
    """A file to change and the commands that then read it; `{}` in them is the example's folder."""

    file: str
    commands: tuple[tuple[str, ...], ...]


RUN = ("run", "{}/recipe.yaml", "max_steps=2")
EVAL, REPORT = ("eval", "{}/output"), ("report", "{}/output", "--out", "{}/report.html")
TARGETS = (
    Target("recipe.yaml", (("validate", "{}/recipe.yaml"), ("data", "{}/recipe.yaml"), ("plan", "{}/recipe.yaml"))),
    Target("rows.jsonl", (("data", "{}/recipe.yaml"), ("data", "{}/recipe.yaml", "data.on_bad_row=skip"))),
    Target("rows.csv", (("data", "{}/recipe.yaml", "data.train={}/rows.csv", "data.valid=null"),)),
    Target("model/config.json", (("plan", "{}/recipe.yaml"), RUN)),
    Target("model/tokenizer.json", (("data", "{}/recipe.yaml"),)),
    Target("model/tokenizer_config.json", (("data", "{}/recipe.yaml"),)),
    Target("model/model.safetensors", (RUN,)),
    Target("output/adapter_config.json", ((*RUN, "output_dir={}/second", "lora.init_from={}/output"), EVAL)),
    Target("output/adapters.safetensors", ((*RUN, "output_dir={}/second", "lora.init_from={}/output"), EVAL)),
    Target("output/result.json", (RUN, EVAL)),
    Target("output/.run", (RUN,)),
    Target("output/recipe.yaml", (EVAL, REPORT)),
    Target("output/machine.json", (REPORT,)),
    Target("output/metrics.jsonl", (REPORT, RUN)),
    Target("output/samples.jsonl", (REPORT, RUN)),
    Target("output/checkpoints/step-0000001/state.json", (RUN, ("eval", "{}/output/checkpoints/step-0000001"))),
    Target("output/checkpoints/step-0000001/manifest.json", (RUN, ("eval", "{}/output/checkpoints/step-0000001"))),
    Target("hosts.json", ()),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a recipe, its model and rows, and the output of one step."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(DATA / "qwen3", folder / "model")
    tokenizer = folder / "model" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"chat_template": TEMPLATE}))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * 4))
    (folder / "rows.csv").write_text('prompt,completion\na,b\n"c\nd",e\n')
    (folder / "hosts.json").write_text(json.dumps(HOSTS))
    (folder / "recipe.yaml").write_text(json.dumps(recipe_in(folder)))
    with kept_signals(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_TRAINER_CACHE", str(folder / "cache"))
        patch.setattr("trainer.data.chat.MAX_SECONDS", 5.0)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        assert main(["run", str(folder / "recipe.yaml"), "max_steps=1"]) == 0
        yield folder


def recipe_in(folder: Path) -> dict[str, Any]:
    return {
        "model": {"path": f"{folder}/model", "dtype": "float32"},
        "data": {"train": f"{folder}/rows.jsonl", "valid": f"{folder}/rows.jsonl", "max_seq_len": 64, "packing": False},
        "lora": {"rank": 2},
        "optimizer": {"lr": 1e-3},
        "eval": {"every": 0, "generate": 1, "max_new_tokens": 4},
        "logging": {"every": 1},
        "output_dir": f"{folder}/output",
    }


def places(tree: Any) -> list[tuple]:
    """The paths of all values in nested objects and lists, the outermost first."""
    found: list[tuple] = [()]
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        found += [(key, *path) for path in places(value)]
    return found


def changed(tree: Any, path: tuple, value: Any) -> Any:
    """A copy of a tree with another value at a path."""
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = changed(tree[path[0]], path[1:], value)
    return copy


def odd_value(draw: Callable, text: bytes) -> bytes:
    """One value of a JSON file, or of one of its lines, replaced."""
    lines = text.splitlines(keepends=True) if draw(st.booleans()) else [text]
    number = draw(st.integers(0, max(len(lines) - 1, 0)))
    try:
        tree = json.loads(lines[number])
    except (ValueError, IndexError):
        return odd_bytes(draw, text)
    spots = places(tree)[:2000]
    value = draw(st.sampled_from(ODD))
    lines[number] = json.dumps(changed(tree, draw(st.sampled_from(spots)), value)).encode() + b"\n"
    return b"".join(lines)


def odd_bytes(draw: Callable, text: bytes) -> bytes:
    """A part cut out, overwritten or repeated, or brackets without end."""
    start = draw(st.integers(0, len(text)))
    kind = draw(st.sampled_from(("cut", "drop", "write", "nest", "empty")))
    if kind == "nest":
        return text[:start] + b"[" * DEPTH + text[start:]
    if kind == "empty":
        return b""
    stop = draw(st.integers(start, min(start + 64, len(text))))
    return {"cut": text[:start], "drop": text[:start] + text[stop:]}.get(
        kind, text[:start] + draw(st.binary(max_size=16)) + text[stop:]
    )


@pytest.mark.usefixtures("exhaustive")
@settings(max_examples=NUM_EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_odd_files_end_in_a_sentence(whole: Path, data: st.DataObject) -> None:
    """Catches a traceback, a crash, a hang or endless memory for a file that is not as it should be."""
    target = data.draw(st.sampled_from(TARGETS), "target")
    change = data.draw(st.sampled_from((odd_value, odd_value, odd_bytes)), "change")
    with tempfile.TemporaryDirectory() as folder:
        copy_of(whole, Path(folder))
        file = Path(folder, target.file)
        text = file.read_bytes() if file.is_file() else b"{}\n"
        file.write_bytes(change(data.draw, text))
        faulthandler.dump_traceback_later(LONGEST_SECONDS, exit=True)
        try:
            for command in target.commands:
                check([word.replace("{}", folder) for word in command])
            if target.file == "hosts.json":
                check_hosts(file)
        finally:
            faulthandler.cancel_dump_traceback_later()


def copy_of(whole: Path, folder: Path) -> None:
    """A copy of the folder, whose recipes name it."""
    shutil.copytree(whole, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("cache"))
    for file in (folder / "recipe.yaml", folder / "output" / "recipe.yaml"):
        file.write_text(file.read_text().replace(str(whole), str(folder)))


def check(words: list[str]) -> None:
    out, errors = StringIO(), StringIO()
    with kept_signals(), redirect_stdout(out), redirect_stderr(errors):
        try:
            code = main(words)
        except SystemExit as ended:  # argparse's
            code = ended.code
    told = errors.getvalue()
    assert code in (0, 2) or (code == 1 and told), (words, code, told)
    assert "Traceback" not in told, (words, told)


def check_hosts(file: Path) -> None:
    try:
        read_hostfile(str(file))
    except ValueError as error:
        assert str(error)
