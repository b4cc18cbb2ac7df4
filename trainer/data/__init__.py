"""Rows of text to batches of tokens: sources, formats, target masks, the token cache and the batch plan.

`load_splits` gives tokenised rows, `plan_epoch` the rows of every global batch, `collate` the arrays of one
micro-batch. Nothing here uses MLX; arrays are numpy's.
"""

from .bpe import build_tokenizer
from .collate import collate
from .corpus import corpus, training_format
from .encode import EncodedRow
from .packing import plan_packed
from .plan import PlannedBatch, bucket_lengths, plan_epoch
from .rows import TokenizedRows
from .splits import BadRows, RowSequences, Splits, load_split, load_splits
from .synthetic import synthetic_rows
from .targets import TargetBounds

__all__ = [
    "BadRows",
    "EncodedRow",
    "PlannedBatch",
    "RowSequences",
    "Splits",
    "TargetBounds",
    "TokenizedRows",
    "bucket_lengths",
    "build_tokenizer",
    "collate",
    "corpus",
    "load_split",
    "load_splits",
    "plan_epoch",
    "plan_packed",
    "synthetic_rows",
    "training_format",
]
