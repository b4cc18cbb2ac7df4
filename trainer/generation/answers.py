"""Held-out rows answered by the model: greedy, batched, and shared out over the data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import batch_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

import comm
from trainer.data import TokenizedRows

BEGINNING_TOKENS = 32


@dataclass(frozen=True)
class Answer:
    """One answered row.

    Attributes:
        row: Index of the row in its split.
        prompt: What the model was shown, as text.
        expected: The row's own answer; None for a text row, which the model continues from its beginning.
        given: The model's answer.
    """

    row: int
    prompt: str
    expected: str | None
    given: str

    @property
    def correct(self) -> bool:
        """Equal up to white space at the ends."""
        return self.expected is not None and self.given.strip() == self.expected.strip()

    def as_sample(self) -> dict[str, str | None]:
        """As the metrics' sinks show it."""
        return {"prompt": self.prompt, "expected": self.expected, "generated": self.given}


def answer_rows(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    rows: TokenizedRows,
    indices: Sequence[int],
    max_new_tokens: int,
    group: comm.Group,
    *,
    continue_texts: bool = False,
) -> list[Answer]:
    """Answer rows greedily; every rank gets all answers.

    Args:
        model: An mlx-lm model, plain or wrapped.
        tokenizer: The model's tokenizer.
        rows: The rows of a split.
        indices: Rows to answer.
        max_new_tokens: Longest answer.
        group: Ranks that share the work; none of them needs another for its own rows.
        continue_texts: Continue from the beginning of a row that has no answer of its own; by default it is left out.
    """
    asked = [
        (i, *question)
        for i in indices[group.rank :: group.size]
        if (question := rows.prompt(i) or (_beginning(rows, i) if continue_texts else None)) is not None
    ]
    was_training = model.training
    model.eval()
    prompts = [prompt.tolist() for _, prompt, _ in asked]
    texts = _generate(model, tokenizer, prompts, max_new_tokens, group.progress.report)
    model.train(was_training)
    mine = [Answer(i, tokenizer.decode(p.tolist()), e, t) for (i, p, e), t in zip(asked, texts)]
    shared = comm.all_gather_object([asdict(answer) for answer in mine], group)
    return sorted((Answer(**fields) for part in shared for fields in part), key=lambda answer: answer.row)


def _beginning(rows: TokenizedRows, index: int) -> tuple[np.ndarray, None]:
    """The first half of a row, so that much of it is left to say."""
    tokens = rows.tokens(index)
    return tokens[: max(1, min(BEGINNING_TOKENS, len(tokens) // 2))], None


def _generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: list[list[int]],
    max_new_tokens: int,
    report: Callable[[], None],
) -> list[str]:
    def likeliest(logprobs: mx.array) -> mx.array:
        report()
        return mx.argmax(logprobs, axis=-1)

    if not prompts:
        return []
    return batch_generate(model, tokenizer, prompts, max_tokens=max_new_tokens, sampler=likeliest).texts
