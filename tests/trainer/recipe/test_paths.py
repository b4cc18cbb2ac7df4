"""What is taken for a path of this machine, and which existing path a missing one is near to."""

import pytest

from trainer.recipe.paths import is_local, nearest_path


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("owner/name", False),
        ("name", False),
        ("there", True),
        ("./name", True),
        ("/name", True),
        ("~/name", True),
        ("name.jsonl", True),
        ("name.csv", True),
        ("a/b/c", True),
    ],
)
def test_local_or_hub(tmp_path, monkeypatch, path, local):
    """Catches a typing error in a local path that is sent to the hub, and a repository that is looked for here."""
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_local(path) == local


def test_nearest_path_of_the_first_part_that_is_missing(tmp_path, monkeypatch):
    """Catches a hint from a shared folder name alone, and none where a folder on the way is misspelt."""
    (tmp_path / "wikisql").mkdir()
    (tmp_path / "wikisql" / "train.jsonl").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert nearest_path(f"{tmp_path}/wikisql/trian.jsonl") == f"{tmp_path}/wikisql/train.jsonl"
    assert nearest_path(f"{tmp_path}/wikisq/train.jsonl") == f"{tmp_path}/wikisql"
    assert nearest_path("~/wikisq") == "~/wikisql"
    assert nearest_path(f"{tmp_path}/wikisql/0000.parquet") == ""
    monkeypatch.chdir(tmp_path)
    assert nearest_path("wikisq/train.jsonl") == "wikisql"
