"""Token rows of these tests are cached in a folder of their own."""

import pytest


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("MLX_TRAINER_CACHE", str(folder))
    return folder
