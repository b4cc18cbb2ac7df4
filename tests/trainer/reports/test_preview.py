"""`python -m trainer data`: that what is shown is what is trained."""

import io
import json
import re
from html import unescape
from pathlib import Path

import numpy as np
from rich.console import Console

from data_support import write_rows
from trainer.__main__ import main
from trainer.model.shapes import open_shapes
from trainer.opening import open_recipe
from trainer.recipe.load import recipe_from
from trainer.recipe.rules import resolve_mesh
from trainer.reports.preview import Preview, preview
from trainer.verbs.data import LEARNED, OTHER, document_text, show

CONFIG = {
    "model_type": "qwen3", "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
CHAT = [
    {"role": "user", "content": "Hi <script>alert(1)</script>"},
    {"role": "assistant", "content": "Hello, é世界 😀!"},
    {"role": "user", "content": "And \x1b[31m?"},
    {"role": "assistant", "content": "Second answer."},
]


def recipe(rows: Path, **data):
    return recipe_from({
        "model": {"config": CONFIG, "tokenizer": "bpe:258"},
        "data": {"train": str(rows), "max_seq_len": 96, **data},
        "batch_size_per_device": 2,
        "method": "full",
    })  # fmt: skip


def shown(path: Path, rows: list, num_rows: int = 9, split: str = "train", **data) -> Preview:
    return preview(recipe(write_rows(path / "rows.jsonl", rows), **data), "mine", split, num_rows, world=1)


def learned(pieces) -> list[str]:
    """The stretches of text that are learned."""
    marked = "".join(f"\x00{piece.text}\x01" if piece.is_target else piece.text for piece in pieces)
    return re.findall("\x00([^\x00\x01]*)\x01", marked.replace("\x01\x00", ""))


def test_learned_tokens_of_each_format(tmp_path):
    """A prompt shown as learned, an assistant turn that is not, a text with a character lost between two tokens."""
    row = {"prompt": "one plus one? ", "completion": "two"}
    (document,) = shown(tmp_path / "a", [row]).lines[0].documents
    assert "".join(piece.text for piece in document.pieces) == "one plus one? two<|endoftext|>"
    assert learned(document.pieces) == ["two<|endoftext|>"]
    (document,) = shown(tmp_path / "b", [{"messages": CHAT}], max_seq_len=400).lines[0].documents
    assert learned(document.pieces) == ["Hello, é世界 😀!<|endoftext|>", "Second answer.<|endoftext|>"]
    (document,) = shown(tmp_path / "c", [{"text": "née 😀"}]).lines[0].documents
    assert document.num_targets == document.num_tokens - 1 == 9  # single bytes: é has two, 😀 four
    assert learned(document.pieces) == ["ée 😀<|endoftext|>"] and document.pieces[0].text == "n"


def test_figures_are_those_of_the_plan(tmp_path):
    """Packing, padding, shapes or steps that a run would not have; rows of a packed line in one piece."""
    rows = [{"text": "x" * length} for length in (5, 9, 20, 31, 40, 40, 52, 60, 75, 90, 200)]
    found = shown(tmp_path, rows, packing=True, val_fraction=0.1)
    facts = dict(found.facts)
    made = recipe(tmp_path / "rows.jsonl", packing=True, val_fraction=0.1)
    opened = open_recipe(made, resolve_mesh(made.parallel, 1), lambda line: None, open_shapes)
    train = opened.splits.train
    plan = opened.plan(train, 2, made.seed, 0)
    slots = sum(2 * batch.length for batch in plan)
    assert facts["rows"] == "10" and facts["steps per epoch"] == str(len(plan))
    assert facts["padding"] == f"{100 * (1 - train.lengths.sum() / slots):.1f} % of {slots:,} positions"
    assert facts["shapes"] == "1: 2 x 96" and facts["rows cut to data.max_seq_len"] == "1"
    documents = [document for line in found.lines for document in line.documents]
    assert [document.row for document in documents] == plan[0].rows.tolist()
    for line in found.lines:
        assert sum(document.num_tokens for document in line.documents) + line.num_padding == 96
    for document in documents:
        text = "".join(piece.text for piece in document.pieces)
        assert text == opened.tokenizer.decode(train.tokens(document.row).tolist())
    assert sum(count for _, _, count in found.histogram) == 10
    assert [document.row for document in found.longest] == np.argsort(-train.lengths, kind="stable")[:5].tolist()
    valid = preview(made, "mine", "valid", 9, world=1)
    assert dict(valid.facts)["rows"] == "1" and valid.lines[0].documents[0].num_tokens == 96


def test_needs_no_weights(tmp_path):
    """Weights that are read, of a model for which only config and tokenizer are there; a lost first space."""
    source = Path(__file__).parents[2] / "reference" / "data" / "qwen3"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "to be or not to be"}])
    made = recipe_from({"model": {"path": str(tmp_path)}, "data": {"train": str(rows), "max_seq_len": 64}})
    (document,) = preview(made, "mine", "train", 1, world=1).lines[0].documents
    assert "".join(piece.text for piece in document.pieces).startswith("to be or not to be")


def test_skipped_rows_are_listed(tmp_path):
    """An empty row of which only the count is shown, or one that is listed though nothing was skipped."""
    rows = [{"text": "fine"}, {"text": ""}, {"prompt": "x"}]
    found = shown(tmp_path / "a", rows, on_bad_row="skip")
    assert dict(found.facts)["rows skipped, empty or unreadable"] == "2"
    reasons = [line.partition("rows.jsonl:")[2] for line in found.skipped]
    assert reasons == ["2: column 'text' is empty", "3: column 'text' is missing"]
    assert shown(tmp_path / "b", rows[:1], on_bad_row="skip").skipped == []


def test_terminal_without_colour_marks_what_is_learned(tmp_path):
    """A file or a pipe in which prompt and answer look alike; a row that moves the terminal's cursor."""
    console = Console(width=400, record=True, color_system=None, file=io.StringIO())
    show(shown(tmp_path, [{"messages": CHAT}], max_seq_len=400), console)
    text = console.export_text()
    assert "⟦Hello, é世界 😀!<|endoftext|>⟧" in text and "\x1b" not in text and "\\x1b[31m" in text


def test_terminal_with_colour(tmp_path):
    """Learned tokens in the colour of the others."""
    found = shown(tmp_path, [{"prompt": "ab", "completion": "c"}])
    text = document_text(found.lines[0].documents[0], has_color=True)
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["a"] == styles["b"] == OTHER and styles["c"] == LEARNED and text.style == ""


def test_html_shows_rows_and_runs_none(tmp_path, capsys):
    """A row's own markup that a browser obeys, a file that needs the network, a learned token that is not marked."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": CHAT}])
    path = tmp_path / "recipe.yaml"
    settings = {"model": {"config": CONFIG, "tokenizer": "bpe:258"}, "data": {"train": str(rows)}, "method": "full"}
    path.write_text(json.dumps(settings))  # which is YAML too
    out = tmp_path / "out" / "rows.html"
    assert main(["data", str(path), "--html", str(out), "data.max_seq_len=400", "batch_size_per_device=1"]) == 0
    text = out.read_text()
    assert text.count("<script>") == 1 and "http" not in text and " src=" not in text and "url(" not in text
    first = re.search(r'<pre class="tokens">(.*?)</pre>', text, re.DOTALL)[1]
    assert first.count("<span>&lt;</span>") == 2 and "<span><<" not in first  # a token is a byte here
    assert "Hi <script>alert(1)</script>" in unescape(re.sub(r"</?(span|mark)>", "", first))
    assert "".join(unescape(word) for word in re.findall("<mark>(.*?)</mark>", first)).startswith("Hello, é世界 😀!")
    assert main(["data", str(path), "--split", "valid"]) == 2
    assert "There is no validation split" in capsys.readouterr().err
