"""Held-out rows answered by the model: greedy, batched, and shared out over the data-parallel ranks."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import mlx.nn as nn
from mlx_lm.generate import batch_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

import comm
from trainer.data import TokenizedRows


@dataclass(frozen=True)
class Answer:
    """One answered row.

    Attributes:
        row: index of the row in its split.
        prompt: what the model was shown, as text.
        expected: the row's own answer.
        given: the model's answer.
    """

    row: int
    prompt: str
    expected: str
    given: str

    @property
    def correct(self) -> bool:
        """Equal up to white space at the ends."""
        return self.given.strip() == self.expected.strip()

    def as_sample(self) -> dict[str, str]:
        """As the metrics' sinks show it."""
        return {"prompt": self.prompt, "expected": self.expected, "generated": self.given}


def answer_rows(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    rows: TokenizedRows,
    indices: Sequence[int],
    max_new_tokens: int,
    group: comm.Group,
) -> list[Answer]:
    """Answer rows greedily; every rank gets all answers.

    Args:
        model: an mlx-lm model, plain or wrapped.
        tokenizer: the model's.
        rows: a split of rows that have an answer.
        indices: rows to answer; those without an answer of their own are left out.
        max_new_tokens: longest answer.
        group: ranks that share the work; each holds the whole model.
    """
    asked = [(i, *rows.prompt(i)) for i in indices[group.rank :: group.size] if rows.prompt(i) is not None]
    was_training = model.training
    model.eval()
    texts = _generate(model, tokenizer, [prompt.tolist() for _, prompt, _ in asked], max_new_tokens)
    model.train(was_training)
    mine = [Answer(i, tokenizer.decode(p.tolist()), e, t) for (i, p, e), t in zip(asked, texts)]
    shared = comm.all_gather_object([asdict(answer) for answer in mine], group)
    return sorted((Answer(**fields) for part in shared for fields in part), key=lambda answer: answer.row)


def _generate(
    model: nn.Module, tokenizer: TokenizerWrapper, prompts: list[list[int]], max_new_tokens: int
) -> list[str]:
    return batch_generate(model, tokenizer, prompts, max_tokens=max_new_tokens).texts if prompts else []
