"""Documents to token rows with their target masks.

The prompt of a completion row is always a prefix of the row's tokens, so what generation is given is exactly what
training saw: prompt and answer are tokenised together, or apart where a token would straddle their border.
A row's first token is never a target, since nothing predicts it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .formats import Document


class EncodedRow(NamedTuple):
    """`tokens` int32 and `mask` bool of equal length; the reference answer is `tokens[answer_start:answer_stop]`.

    `answer_start` is -1 where a row has no single answer to compare with (text rows, cut answers).
    """

    tokens: np.ndarray
    mask: np.ndarray
    answer_start: int
    answer_stop: int
    truncated: bool


def plain_tokenizer(tokenizer: Any) -> Any:
    """The transformers tokenizer inside mlx-lm's wrapper, which can encode many texts at once."""
    return tokenizer._tokenizer if type(tokenizer).__name__ == "TokenizerWrapper" else tokenizer


def encode_documents(
    documents: Sequence[Document], tokenizer: Any, *, loss_on: str, max_seq_len: int
) -> list[EncodedRow]:
    """Token rows for documents of one format.

    Args:
        documents: The documents, at least one.
        tokenizer: A transformers tokenizer or mlx-lm's wrapper of one, with an EOS token.
        loss_on: "all", "completion" or "assistant", already resolved for the format.
        max_seq_len: Most tokens of a row; longer rows are cut at their end.

    Raises:
        ValueError: The tokenizer has no EOS token, or cannot say where a chat's tokens lie in the text.
    """
    tokenizer = plain_tokenizer(tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no EOS token, so nothing would mark the end of a row.")
    if documents[0].is_chat:
        rows = _encode_chats(documents, tokenizer, loss_on)
    elif documents[0].prompt is not None:
        rows = _encode_completions(documents, tokenizer, loss_on)
    else:
        rows = [_row(_with_eos(ids, tokenizer), 0) for ids in tokenizer([d.text for d in documents])["input_ids"]]
    return [_truncate(row, max_seq_len) for row in rows]


def _with_eos(ids: list[int], tokenizer: Any) -> list[int]:
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def _row(ids: list[int], first_target: int, answer: tuple[int, int] = (-1, -1)) -> EncodedRow:
    mask = np.arange(len(ids)) >= max(first_target, 1)
    return EncodedRow(np.array(ids, np.int32), mask, *answer, False)


def _truncate(row: EncodedRow, max_seq_len: int) -> EncodedRow:
    if len(row.tokens) <= max_seq_len:
        return row
    cut_answer = row.answer_stop > max_seq_len
    return EncodedRow(
        row.tokens[:max_seq_len],
        row.mask[:max_seq_len],
        -1 if cut_answer else row.answer_start,
        -1 if cut_answer else row.answer_stop,
        True,
    )


def _encode_completions(documents: Sequence[Document], tokenizer: Any, loss_on: str) -> list[EncodedRow]:
    texts = [(document.text, document.prompt or "") for document in documents]
    whole = tokenizer([text for text, _ in texts])["input_ids"]
    prompts = tokenizer([start for _, start in texts])["input_ids"]
    rows = []
    for (text, start), ids, prompt in zip(texts, whole, prompts):
        if prompt and prompt[-1] == tokenizer.eos_token_id and not start.endswith(tokenizer.eos_token):
            prompt = prompt[:-1]  # this tokenizer closes every text by itself; the prompt is not closed here
        if ids[: len(prompt)] != prompt or len(ids) == len(prompt):
            ids = prompt + tokenizer(text[len(start) :], add_special_tokens=False)["input_ids"]
        ids = _with_eos(ids, tokenizer)
        first_target = 0 if loss_on == "all" else len(prompt)
        rows.append(_row(ids, first_target, (len(prompt), len(ids) - 1)))
    return rows


def _encode_chats(documents: Sequence[Document], tokenizer: Any, loss_on: str) -> list[EncodedRow]:
    if not tokenizer.is_fast:
        if loss_on != "all":
            raise ValueError(
                f"{type(tokenizer).__name__} does not say where its tokens lie in the text, so a chat's assistant "
                "turns cannot be marked; use loss_on: all."
            )
        encoded = tokenizer([document.text for document in documents], add_special_tokens=False)["input_ids"]
        return [_row(ids, 0) for ids in encoded]
    encoded = tokenizer(
        [document.text for document in documents], add_special_tokens=False, return_offsets_mapping=True
    )
    offsets = encoded["offset_mapping"]
    return [_chat_row(*item, loss_on) for item in zip(documents, encoded["input_ids"], offsets)]


def _chat_row(document: Document, ids: list[int], offsets: list[tuple[int, int]], loss_on: str) -> EncodedRow:
    """A token belongs to the span in which its last character lies."""
    stops = np.array([stop for _, stop in offsets])
    spans = document.spans if loss_on == "assistant" else document.spans[-1:]
    mask = np.zeros(len(ids), np.bool_)
    for span in spans:
        mask |= (stops > span.start) & (stops <= span.stop)
    if loss_on == "all":
        mask[:] = True
    mask[:1] = False
    row = EncodedRow(np.array(ids, np.int32), mask, -1, -1, False)
    if not document.spans:
        return row
    last = document.spans[-1]
    answer_start, answer_stop = np.searchsorted(stops, [last.start, last.answer_stop], side="right")
    return row._replace(answer_start=int(answer_start), answer_stop=int(answer_stop))
