"""Token ids against the model's embedding, which reads beyond its memory where an id is too large."""

import mlx.nn as nn
import numpy as np
import pytest

from trainer.data.encode import EncodedRow
from trainer.data.rows import TokenizedRows, TokenStore
from trainer.model.loading import num_embeddings


def rows_of(*ids: list[int]) -> TokenizedRows:
    encoded = [EncodedRow(np.array(row, np.int32), np.ones(len(row), np.bool_), -1, -1, False) for row in ids]
    return TokenizedRows([TokenStore.from_rows(encoded)], np.zeros(len(ids)), np.arange(len(ids)), None)


def test_a_token_that_the_embedding_does_not_have() -> None:
    """Catches a segmentation fault, or a row of whatever lies behind the embedding."""
    rows = rows_of([1, 2, 3], [4, 9, 5], [0])
    rows.require_ids_below(10)
    with pytest.raises(ValueError, match="Row 2 has the token id 9, but the model's embedding has 9 rows"):
        rows.require_ids_below(9)


def test_the_largest_embedding_counts() -> None:
    """Catches a healthy model that is refused, as a smaller table stands beside its vocabulary; quantized ones too."""
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 128), nn.Embedding(16, 32))
    assert num_embeddings(model) == 64
    nn.quantize(model, group_size=32, bits=4)
    assert num_embeddings(model) == 64
    assert num_embeddings(nn.Linear(2, 2)) > 2**40
