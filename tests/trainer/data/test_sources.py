"""Where rows come from, and what is said when they do not."""

import csv

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_support import config, small_tokenizer, write_rows
from trainer.data import load_split, load_splits
from trainer.data.hub import HubRows
from trainer.recipe.config import DataSource

ROWS = [{"text": f"row number {number}"} for number in range(10)]


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def texts(rows, tokenizer):
    return [tokenizer.decode(rows.tokens(index)[:-1].tolist()) for index in range(len(rows))]


@pytest.mark.parametrize("name", ["valid", "validation", "val", "dev"])
def test_folder_finds_its_validation_split(tmp_path, tokenizer, name):
    """Catches a hard-coded split name: training would go on without validation."""
    write_rows(tmp_path / "set/train.jsonl", ROWS)
    write_rows(tmp_path / f"set/{name}.jsonl", ROWS[:3])
    splits = load_splits(config(train=str(tmp_path / "set"), val_fraction=0.5), tokenizer, 0)
    assert (len(splits.train), len(splits.valid)) == (10, 3)


def test_file_kinds_agree(tmp_path, tokenizer):
    """Catches a reader that drops or changes rows: the same rows as JSON lines, CSV and parquet."""
    rows = [{"text": 'a, "quoted"\nline'}, {"text": "ünïcode"}, {"text": "plain"}]
    write_rows(tmp_path / "rows.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with open(tmp_path / "rows.csv", "w", newline="") as table:
        writer = csv.DictWriter(table, ["text"])
        writer.writeheader()
        writer.writerows(rows)
    digests = {load_splits(config(train=str(tmp_path / f"rows{suffix}")), tokenizer, 0).train.digest
               for suffix in (".jsonl", ".csv", ".parquet")}
    assert len(digests) == 1


def test_val_fraction_is_the_end_of_the_file(tmp_path, tokenizer):
    """Catches a random or leading split: CONVENTIONS promise the last rows in file order."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    splits = load_splits(config(train=str(path), val_fraction=0.2), tokenizer, 0)
    assert texts(splits.valid, tokenizer) == ["row number 8", "row number 9"]
    assert texts(splits.train, tokenizer) == [row["text"] for row in ROWS[:8]]


def test_single_file_has_no_validation(tmp_path, tokenizer):
    """Catches a validation split made up where the recipe asks for none."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert load_splits(config(train=str(path)), tokenizer, 0).valid is None
    with pytest.raises(ValueError, match="no validation split"):
        load_split(config(train=str(path)), tokenizer, 0, "valid")


def test_given_validation_wins(tmp_path, tokenizer):
    """Catches `data.valid` being ignored for the folder's own split."""
    write_rows(tmp_path / "set/train.jsonl", ROWS)
    write_rows(tmp_path / "set/valid.jsonl", ROWS)
    other = write_rows(tmp_path / "other.jsonl", ROWS[:1])
    assert len(load_splits(config(train=str(tmp_path / "set"), valid=str(other)), tokenizer, 0).valid) == 1


def test_training_on_a_validation_split(tmp_path, tokenizer):
    """Catches validation on the very rows that are trained on."""
    write_rows(tmp_path / "set/valid.jsonl", ROWS)
    splits = load_splits(config(train=[{"path": str(tmp_path / "set"), "split": "valid"}]), tokenizer, 0)
    assert len(splits.train) == 10 and splits.valid is None


def test_test_split_by_name(tmp_path, tokenizer):
    """Catches evaluation on the wrong split."""
    write_rows(tmp_path / "set/train.jsonl", ROWS)
    write_rows(tmp_path / "set/test.jsonl", ROWS[4:5])
    assert texts(load_split(config(train=str(tmp_path / "set")), tokenizer, 0, "test"), tokenizer) == ["row number 4"]
    with pytest.raises(ValueError, match="has no split exam"):
        load_split(config(train=str(tmp_path / "set")), tokenizer, 0, "exam")


def test_weights_and_columns_of_a_list(tmp_path, tokenizer):
    """Catches weights that change which rows are held out, and columns that are not mapped."""
    one = write_rows(tmp_path / "one.jsonl", ROWS)
    two = write_rows(tmp_path / "two.jsonl", [{"question": f"q{i}", "reply": f"a{i}"} for i in range(4)])
    sources = [{"path": str(one), "weight": 1.5},
               {"path": str(two), "weight": 2, "columns": {"prompt": "question", "completion": "reply"}}]
    splits = load_splits(config(train=sources, val_fraction=0.2), tokenizer, 0)
    counts = [texts(splits.train, tokenizer).count(row["text"]) for row in ROWS]
    assert sum(counts) == 12 and set(counts[:8]) == {1, 2} and counts[8:] == [0, 0]
    assert [texts(splits.train, tokenizer).count(f"q{i}a{i}") for i in range(4)] == [2, 2, 2, 0]
    assert len(splits.valid) == 3
    typed = [DataSource(**source) for source in sources]
    again = load_splits(config(train=typed, val_fraction=0.2), tokenizer, 0)
    assert again.train.digest == splits.train.digest


def test_hub_rows_through_datasets(tmp_path, tokenizer, monkeypatch):
    """Catches a wrong use of `datasets`: rows, a slice of a split and a digest that follows the content."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    write_rows(tmp_path / "repo/train.jsonl", ROWS)
    whole, part = HubRows(str(tmp_path / "repo"), "train"), HubRows(str(tmp_path / "repo"), "train[:40%]")
    assert [raw.row for raw in whole] == ROWS
    assert [raw.row for raw in part] == ROWS[:4]
    assert whole.digest() != part.digest()


def test_unknown_paths_name_the_nearest(tmp_path, tokenizer):
    """Catches a bare FileNotFoundError, or a typing error sent to the hub."""
    write_rows(tmp_path / "wikisql/train.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"no file or folder.*wikisq'.*Nearest name: .*wikisql"):
        load_splits(config(train=str(tmp_path / "wikisq")), tokenizer, 0)
    with pytest.raises(ValueError, match="Did you mean synthetic:sql"):
        load_splits(config(train="synthetic:sqll"), tokenizer, 0)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], "empty list"),
        ([{"path": "a", "wieght": 2}], "Did you mean 'weight'"),
        ([{"path": "a", "weight": 0}], "must be above 0"),
        ([{"split": "train"}], "needs a path"),
    ],
)
def test_source_lists_are_checked(train, message, tokenizer):
    """Catches a misspelt key that is silently ignored."""
    with pytest.raises(ValueError, match=message):
        load_splits(config(train=train), tokenizer, 0)


def test_folder_and_file_of_the_wrong_kind(tmp_path, tokenizer):
    """Catches a stack trace where a person pointed at the wrong thing."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no .jsonl"):
        load_splits(config(train=str(tmp_path / "empty")), tokenizer, 0)
    (tmp_path / "rows.txt").write_text("hello")
    with pytest.raises(ValueError, match="rows.txt is not one of the files"):
        load_splits(config(train=str(tmp_path / "rows.txt")), tokenizer, 0)


def test_empty_dataset(tmp_path, tokenizer):
    """Catches training on nothing."""
    path = write_rows(tmp_path / "rows.jsonl", [])
    with pytest.raises(ValueError, match="has no rows to use"):
        load_splits(config(train=str(path)), tokenizer, 0)
    path = write_rows(tmp_path / "one.jsonl", ROWS[:1])
    with pytest.raises(ValueError, match="leaves no training rows"):
        load_splits(config(train=str(path), val_fraction=0.5), tokenizer, 0)


def test_bad_rows_are_listed_with_their_lines(tmp_path, tokenizer):
    """Catches an error that names no line, and one that stops at the first bad row."""
    path = write_rows(tmp_path / "rows.jsonl", [ROWS[0], "{broken", {"txt": "no"}, [1], {"text": 3}, {"text": " "}])
    with pytest.raises(ValueError) as caught:
        load_splits(config(train=str(path)), tokenizer, 0)
    listed = str(caught.value).splitlines()[1:]
    assert [line.split(":")[1] for line in listed] == ["2", "3", "4", "5", "6"]
    for line, reason in zip(listed, ["not JSON", "'text' is missing", "not list", "not int", "is empty"], strict=True):
        assert reason in line


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b"text\nfine\n\xff\xfe\n", "a.csv:.: not CSV in UTF-8"),
        ("a.csv", b"text,more\none\n", "a.csv:2: the header has 2 cells"),
        ("a.parquet", b"PAR1 this is not one", "a.parquet:row 1: not parquet"),
        ("a.jsonl", b'{"text": "fine"}\n\xff\xfe\n', "a.jsonl:2: not JSON"),
    ],
)
def test_damaged_files_name_the_place(tmp_path, tokenizer, name, content, reason):
    """Catches a decoder's exception without the file's name."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        load_splits(config(train=str(tmp_path / name)), tokenizer, 0)


def test_at_most_ten_bad_rows_are_listed(tmp_path, tokenizer):
    """Catches a screen full of errors from one wrong file."""
    path = write_rows(tmp_path / "rows.jsonl", [ROWS[0]] + [{"no": 1}] * 500)
    with pytest.raises(ValueError) as caught:
        load_splits(config(train=str(path)), tokenizer, 0)
    assert len(str(caught.value).splitlines()) == 11


def test_bad_rows_can_be_skipped(tmp_path, tokenizer):
    """Catches rows that are skipped without being counted or told."""
    path = write_rows(tmp_path / "rows.jsonl", [ROWS[0], *["{broken"] * 25, ROWS[1]])
    told = []
    rows = load_splits(config(train=str(path), on_bad_row="skip"), tokenizer, 0, notice=told.append).train
    assert (len(rows), rows.skipped) == (2, 25)
    assert told == [f"{path}: 25 rows could not be read and were skipped"]


def test_truncation_is_counted(tmp_path, tokenizer):
    """Catches long rows cut without a word, and rows that lose all their targets kept as dead weight."""
    path = write_rows(tmp_path / "rows.jsonl", [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": " the quick brown fox" * 20},
        {"prompt": " the quick brown fox" * 20, "completion": "b"},
    ])
    told = []
    rows = load_splits(config(train=str(path), max_seq_len=16), tokenizer, 0, notice=told.append).train
    assert (len(rows), rows.truncated, rows.lengths.max()) == (2, 2, 16)
    assert "2 rows cut to 16 tokens; 1 of them had no target left" in told[0]
    assert rows.prompt(1) is None


def test_digest_follows_content_and_order(tmp_path, tokenizer):
    """Catches ranks that agree on different data."""
    forward = write_rows(tmp_path / "a.jsonl", ROWS)
    same = write_rows(tmp_path / "elsewhere/b.jsonl", ROWS)
    backward = write_rows(tmp_path / "c.jsonl", ROWS[::-1])
    digests = [load_splits(config(train=str(path)), tokenizer, 0).train.digest for path in (forward, same, backward)]
    assert digests[0] == digests[1] != digests[2]
    assert np.array_equal(load_splits(config(train=str(forward)), tokenizer, 0).train.lengths, [
        len(tokenizer(row["text"])["input_ids"]) + 1 for row in ROWS])
