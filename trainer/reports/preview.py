"""What a model will see of a recipe's rows: lines of tokens with their targets, and figures of the batch plan.

Made of the very arrays of training (`Opened.plan`, `collate`), with the model's config in place of its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from trainer.data import BadRows, PlannedBatch, TokenizedRows, collate, load_splits
from trainer.data.encode import plain_tokenizer
from trainer.model.loading import pad_token
from trainer.model.shapes import open_shapes
from trainer.opening import Opened, open_recipe
from trainer.recipe.config import Recipe
from trainer.recipe.rules import resolve_mesh

NUM_EXTREMES = 5
NUM_BINS = 16
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to that are only part of a character


@dataclass(frozen=True)
class Piece:
    """One token, or a few that only together are whole characters.

    Attributes:
        text: What it decodes to.
        is_target: Whether it is learned.
    """

    text: str
    is_target: bool


@dataclass(frozen=True)
class Document:
    """One row.

    Attributes:
        row: Its number among the rows, from 0.
        num_tokens, num_targets: How many tokens it has, and how many of them are learned.
        pieces: Its text, piece by piece.
    """

    row: int
    num_tokens: int
    num_targets: int
    pieces: list[Piece]


@dataclass(frozen=True)
class Line:
    """One line of a batch: its documents in order, then padding up to `length` tokens."""

    documents: list[Document]
    length: int
    num_padding: int


@dataclass(frozen=True)
class Preview:
    """What is shown of one split.

    Attributes:
        title: Recipe and split.
        notices: What was cut, skipped, or decided about packing.
        facts: (name, value) in the order shown.
        histogram: (shortest, longest, rows) of each bin of lengths.
        lines: The first lines of the first batch.
        longest, fewest: The rows with most tokens, and with the fewest targets.
        skipped: Places of rows that are empty or unreadable, with the reason; the first ten.
    """

    title: str
    notices: list[str]
    facts: list[tuple[str, str]]
    histogram: list[tuple[int, int, int]]
    lines: list[Line]
    longest: list[Document]
    fewest: list[Document]
    skipped: list[str]


def preview(recipe: Recipe, title: str, split: str, num_rows: int, world: int) -> Preview:
    """Read, tokenise and plan a recipe's rows.

    Args:
        recipe: A checked recipe.
        title: Names the recipe.
        split: "train" or "valid".
        num_rows: Rows to show of the first batch.
        world: Ranks that the recipe is for; batches and steps depend on it.

    Raises:
        ValueError: The rows, the tokenizer or the config cannot be used, or there are no validation rows.
    """
    notices: list[str] = []
    opened = open_recipe(recipe, resolve_mesh(recipe.parallel, world), notices.append, open_shapes)
    rows, plan, size = _planned(opened, split)
    tokenizer = plain_tokenizer(opened.tokenizer)
    by_length = np.argsort(-rows.lengths, kind="stable")[:NUM_EXTREMES]
    by_targets = np.argsort(rows.num_targets, kind="stable")[:NUM_EXTREMES]
    return Preview(
        title=f"{title}, {split} rows",
        notices=notices,
        facts=_facts(opened, rows, plan, size),
        histogram=_histogram(rows.lengths),
        lines=list(_lines(rows, plan[0], num_rows, pad_token(opened.tokenizer), tokenizer)),
        longest=[_document(int(row), rows.tokens(row), rows.mask(row), tokenizer) for row in by_length],
        fewest=[_document(int(row), rows.tokens(row), rows.mask(row), tokenizer) for row in by_targets],
        skipped=_skipped(opened) if rows.skipped else [],
    )


def visible(text: str) -> str:
    """Text whose line breaks and control characters can be seen."""
    codes = {char: char.encode("unicode_escape").decode() for char in text if not char.isprintable()} | {"\n": "↵\n"}
    return "".join(codes.get(char, char) for char in text)


def _planned(opened: Opened, split: str) -> tuple[TokenizedRows, list[PlannedBatch], int]:
    """A split's rows, the batches of its first pass as a run makes them, and lines per batch."""
    if split == "train":
        size = opened.batch.global_size
        return opened.splits.train, opened.plan(opened.splits.train, size, opened.recipe.seed, 0), size
    if opened.splits.valid is None:
        raise ValueError("There is no validation split: data.valid is null, none was found and val_fraction is 0.")
    size = opened.batch.dp * opened.batch.per_device
    return opened.splits.valid, opened.plan(opened.splits.valid, size, seed=0, epoch=0, shuffle=False), size


def _facts(opened: Opened, rows: TokenizedRows, plan: Sequence[PlannedBatch], size: int) -> list[tuple[str, str]]:
    num_tokens, num_targets = int(rows.lengths.sum()), int(rows.num_targets.sum())
    median = np.median(rows.lengths)
    num_slots = sum(size * batch.length for batch in plan)
    shapes = sorted({batch.length for batch in plan})
    num_lines = sum(batch.num_positions for batch in plan)
    return [
        ("rows", f"{len(rows):,}"),
        ("tokens", f"{num_tokens:,}"),
        ("learned tokens", f"{num_targets:,} ({num_targets / num_tokens:.1%})"),
        ("tokens per row", f"mean {rows.lengths.mean():.0f}, median {median:.0f}, longest {rows.lengths.max()}"),
        ("packing", f"on, {len(rows) / num_lines:.2f} rows per line" if opened.packed else "off, one row per line"),
        ("padding", f"{100 * (1 - num_tokens / num_slots):.1f} % of {num_slots:,} positions"),
        ("lines per batch", f"{size} (the last batch has {plan[-1].num_positions})"),
        ("shapes", f"{len(shapes)}: {', '.join(f'{size} x {length}' for length in shapes)}"),
        ("steps per epoch", f"{len(plan):,}"),
        ("rows cut to data.max_seq_len", f"{rows.truncated:,}"),
        ("rows left out, no target after the cut", f"{rows.dropped:,}"),
        ("rows skipped, empty or unreadable", f"{rows.skipped:,}"),
    ]


def _skipped(opened: Opened) -> list[str]:
    """The rows that were passed over, found by reading them again without the leave to do so."""
    try:
        data = replace(opened.recipe.data, on_bad_row="stop")
        load_splits(data, opened.tokenizer, opened.recipe.seed, notice=lambda line: None)
    except BadRows as error:
        return error.lines
    return []


def _histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    shortest = int(lengths.min())
    width = -(-int(lengths.max() - shortest + 1) // NUM_BINS)
    starts = range(shortest, int(lengths.max()) + 1, width)
    counts = np.bincount((lengths - shortest) // width)
    return [(low, low + width - 1, int(count)) for low, count in zip(starts, counts)]


def _lines(rows: TokenizedRows, batch: PlannedBatch, num_rows: int, pad_id: int, tokenizer: Any) -> Iterator[Line]:
    """The first lines of a batch, of which the first `num_rows` documents are shown."""
    arrays = collate(rows, batch, slice(0, batch.num_positions), pad_id)
    numbers = iter(batch.rows[:num_rows].tolist())
    for tokens, mask, segments in zip(arrays["tokens"], arrays["mask"], arrays["segments"]):
        places = (np.flatnonzero(segments == segment) for segment in range(1, segments.max() + 1))
        shown = islice(numbers, int(segments.max()))
        documents = [_document(row, tokens[place], mask[place], tokenizer) for row, place in zip(shown, places)]
        if not documents:
            return
        yield Line(documents, batch.length, int((segments == 0).sum()))


def _document(row: int, tokens: np.ndarray, mask: np.ndarray, tokenizer: Any) -> Document:
    pieces = list(_pieces(tokens.tolist(), mask.tolist(), tokenizer))
    return Document(row, len(tokens), int(mask.sum()), pieces)


def _pieces(tokens: Sequence[int], mask: Sequence[bool], tokenizer: Any) -> Iterator[Piece]:
    """Each token's text as it is after the one before, since some tokenizers drop a first token's space."""

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    before: list[int] = []
    waiting: list[int] = []
    for position, (token, is_target) in enumerate(zip(tokens, mask)):
        waiting.append(token)
        text = decode(before + waiting)[len(decode(before)) :]
        if text.endswith(_UNFINISHED) and position + 1 < len(tokens) and mask[position + 1] == is_target:
            continue
        yield Piece(text, is_target)
        before, waiting = waiting, []
