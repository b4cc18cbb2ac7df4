"""Tokenised rows on disk: hit, miss, torn, raced for."""

import json
import multiprocessing

import numpy as np
import pytest

from data_support import config, small_tokenizer, write_rows
from trainer.data import load_splits, splits as splits_module
from trainer.data.cache import cached_store, tokenizer_digest
from trainer.data.encode import EncodedRow
from trainer.data.rows import TokenStore

ROWS = [{"prompt": f"p{number}", "completion": f"c{number}"} for number in range(5)]


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture
def num_encoded(monkeypatch):
    """Counts the rows that are tokenised."""
    counted = []
    encode = splits_module.encode_documents
    monkeypatch.setattr(
        splits_module, "encode_documents", lambda documents, *rest, **options: (
            counted.append(len(documents)), encode(documents, *rest, **options))[1])
    return lambda: sum(counted)


def test_second_run_tokenises_nothing(tmp_path, tokenizer, num_encoded):
    """Catches a key that is never met again, and cached rows that differ from fresh ones."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    fresh = load_splits(config(train=str(path)), tokenizer, 0).train
    cached = load_splits(config(train=str(path)), tokenizer, 0).train
    assert num_encoded() == 5
    assert fresh.digest == cached.digest
    assert [cached.prompt(i)[1] for i in range(5)] == [fresh.prompt(i)[1] for i in range(5)] == [
        row["completion"] for row in ROWS]


@pytest.mark.parametrize("change", ["content", "max_seq_len", "loss_on", "tokenizer", "template"])
def test_whatever_matters_is_in_the_key(tmp_path, num_encoded, change):
    """Catches rows of another tokenizer, mask or file served from the cache."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    tokenizer, options = small_tokenizer(), {"train": str(path)}
    load_splits(config(**options), tokenizer, 0)
    if change == "content":
        write_rows(path, ROWS[::-1])
    elif change == "tokenizer":
        tokenizer.add_tokens(["p1"])
    elif change == "template":
        tokenizer.chat_template = "{{ messages }}"
    else:
        options[change] = {"max_seq_len": 7, "loss_on": "all"}[change]
    load_splits(config(**options), tokenizer, 0)
    assert num_encoded() == 10


def test_damaged_entry_is_made_again(tmp_path, tokenizer, cache_folder, num_encoded):
    """Catches a half-written entry trusted for ever, or one that blocks its own repair."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    digest = load_splits(config(train=str(path)), tokenizer, 0).train.digest
    for entry in (cache_folder / "rows").iterdir():
        (entry / "tokens.npy").write_bytes(b"torn")
    for _ in range(2):
        assert load_splits(config(train=str(path)), tokenizer, 0).train.digest == digest
    assert num_encoded() == 10


def test_cache_that_cannot_be_written_only_costs_a_notice(tmp_path, tokenizer):
    """Catches a run that ends because of a full or read-only disk."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    blocked = tmp_path / "a file"
    blocked.write_text("")
    told = []
    rows = load_splits(config(train=str(path)), tokenizer, 0, cache_dir=blocked, notice=told.append).train
    assert len(rows) == 5
    assert "not cached" in told[0]


def store_of(number: int) -> TokenStore:
    row = EncodedRow(np.full(1000, number, np.int32), np.ones(1000, np.bool_), -1, -1, False)
    return TokenStore.from_rows([row] * 50)


def race(folder, start, results):
    start.wait()
    for number in range(20):
        store = cached_store(folder, f"key{number}", lambda number=number: store_of(number), print)
        results.put((number, int(store.tokens[0]), int(store.tokens[-1]), len(store)))


def test_processes_may_race(tmp_path):
    """Catches a reader that meets half of an entry, and a loser of the race that fails."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=race, args=(tmp_path, start, results)) for _ in range(2)]
    for process in processes:
        process.start()
    seen = [results.get(timeout=60) for _ in range(40)]
    for process in processes:
        process.join(timeout=60)
    assert sorted(seen) == sorted([(number, number, number, 50) for number in range(20)] * 2)
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []
    assert all(json.loads((tmp_path / f"key{number}/counts.json").read_text())["skipped"] == 0 for number in range(20))


def test_tokenizer_digest_survives_saving(tmp_path, tokenizer):
    """Catches a cache that misses for the same tokenizer opened from another folder."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path / "a")
    first = AutoTokenizer.from_pretrained(tmp_path / "a")
    first.save_pretrained(tmp_path / "b")
    assert tokenizer_digest(first) == tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path / "b"))
