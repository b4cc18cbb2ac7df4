"""The rows and the tokenizer that the project makes itself."""

import filecmp
import json

import numpy as np
import pytest

from data_support import config, write_rows
from trainer.data import build_tokenizer, load_splits, synthetic_rows


@pytest.mark.parametrize("name", ["sql", "sql-pipe"])
def test_held_out_rows_are_new(name):
    """Catches a held-out score that is memory: no query of one split may be an answer in another, for any seed."""
    answers = {}
    for split, seed in (("train", 0), ("valid", 0), ("valid", 5), ("test", 0), ("test", 5)):
        rows = synthetic_rows(name, split, seed)
        answers.setdefault(split, set()).update(row["completion"] for row in rows)
        assert len({row["prompt"] for row in rows}) == len(rows)
    assert not answers["train"] & answers["valid"]
    assert not answers["train"] & answers["test"]
    assert not answers["valid"] & answers["test"]


def test_rows_depend_on_the_seed_alone():
    """Catches rows that change from run to run or rank to rank (string hashing, set order)."""
    assert synthetic_rows("sql", "test", 3) == synthetic_rows("sql", "test", 3)
    assert synthetic_rows("sql", "test", 3) != synthetic_rows("sql", "test", 0)
    assert synthetic_rows("sql", "test", 0)[0] == {
        "prompt": "table: players\ncolumns: age, team, score, name\nQ: how many players have name Henry ?\nA:",
        "completion": " SELECT COUNT(*) FROM players WHERE name = 'Henry'",
    }


def test_dialects_ask_the_same_questions():
    """Catches a second task that differs in more than its answers."""
    plain, pipe = synthetic_rows("sql", "valid", 0), synthetic_rows("sql-pipe", "valid", 0)
    assert [row["prompt"] for row in plain] == [row["prompt"] for row in pipe]
    assert all(a["completion"] != b["completion"] for a, b in zip(plain, pipe))


def test_answers_follow_from_prompts():
    """Catches questions with two right answers: the same prompt must never have another answer."""
    rows = synthetic_rows("sql", "train", 0) + synthetic_rows("sql", "valid", 0)
    questions = {}
    for row in rows:
        table, _, question, _ = row["prompt"].split("\n")
        assert questions.setdefault((table, question), row["completion"]) == row["completion"]


def test_unknown_names():
    """Catches a KeyError where a person misspelt a name."""
    with pytest.raises(ValueError, match="Did you mean synthetic:sql-pipe"):
        synthetic_rows("sql-pip", "train", 0)
    with pytest.raises(ValueError, match="allowed: train, valid, test"):
        synthetic_rows("sql", "dev", 0)


@pytest.fixture(scope="module")
def texts():
    return [row["prompt"] + row["completion"] for row in synthetic_rows("sql", "train", 0)[:1500]]


def test_tokenizer_is_lossless_and_deterministic(tmp_path, texts):
    """Catches a tokenizer that loses characters, or files that differ between equal runs and ranks."""
    first, second = build_tokenizer(texts, 600), build_tokenizer(texts, 600)
    for text in [texts[0], "ünïcode 漢字 \n\t tabs", "<|end|> inside"]:
        assert first.decode(first(text)["input_ids"]) == text
    first.save_pretrained(tmp_path / "a")
    second.save_pretrained(tmp_path / "b")
    names = [path.name for path in (tmp_path / "a").iterdir()]
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False) == (names, [], [])


def test_tokenizer_opens_in_transformers_and_mlx_lm(tmp_path, texts):
    """Catches a folder that the usual tools cannot open, or open with another vocabulary or template."""
    from mlx_lm.tokenizer_utils import load

    tokenizer = build_tokenizer(texts, 600)
    tokenizer.save_pretrained(tmp_path)
    opened = load(tmp_path)
    assert len(tokenizer) == opened.vocab_size == 600
    assert opened.encode(texts[0]) == tokenizer(texts[0])["input_ids"]
    assert opened.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    chat = [{"role": "user", "content": "hi"}]
    prompt = opened.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == "user:\nhi<|endoftext|>\nassistant:\n"


def test_tokenizer_too_small():
    """Catches a vocabulary that cannot hold the bytes."""
    with pytest.raises(ValueError, match="at least 258 entries, not 100"):
        build_tokenizer(["a"], 100)


def test_prompts_and_answers_of_the_quickstart(texts, tmp_path):
    """Catches a reference answer or a prompt that is not what the rows say."""
    tokenizer = build_tokenizer(texts, 600)
    train = write_rows(tmp_path / "train.jsonl", [{"text": "unused"}])
    rows = load_splits(config(train=str(train), valid="synthetic:sql", max_seq_len=128), tokenizer, 0).valid
    for index, row in enumerate(synthetic_rows("sql", "valid", 0)):
        prompt, answer = rows.prompt(index)
        assert tokenizer.decode(prompt.tolist()) == row["prompt"]
        assert answer == row["completion"].strip()
        assert np.array_equal(rows.tokens(index)[: len(prompt)], prompt)
        assert rows.mask(index).sum() == len(rows.tokens(index)) - len(prompt)


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_5"])
def test_saved_tokenizer_gives_the_same_ids_beside_any_config(tmp_path, model_type):
    """Catches a tokenizer that transformers rebuilds with other splitting rules because of the model's type."""
    from transformers import AutoTokenizer

    tokenizer = build_tokenizer((row["prompt"] for row in synthetic_rows("sql", "valid", 0)), 400)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    text = "table: staff\ncolumns: name, age\nQ: which name has age above 60 ?\nA:"
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.eos_token_id == tokenizer.eos_token_id
