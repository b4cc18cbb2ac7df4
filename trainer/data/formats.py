"""What a row means: text, completion, chat or alpaca, told apart by its columns.

A row becomes a `Document`: the text the model sees and the character spans that are targets. Rows that cannot
be read raise `BadRow` with the reason; where the row came from is the caller's to add.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from trainer.nearest import nearest

from .chat import ChatTemplateError, assistant_turns, render_chat, require_tools

FORMATS = {
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
LOSS_ON = {
    "text": ("all",),
    "completion": ("completion", "all"),
    "alpaca": ("completion", "all"),
    "chat": ("assistant", "completion", "all"),
}


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Span:
    """Characters `[start, stop)` of a document are a target; the answer proper ends at `answer_stop`."""

    start: int
    answer_stop: int
    stop: int


@dataclass(frozen=True)
class Document:
    """One row, rendered.

    `prompt` is the leading part that is given, in completion and alpaca rows. `spans` are the assistant's turns
    of a chat. `is_chat`: the chat template has written every special token, nothing is added.
    """

    text: str
    prompt: str | None = None
    spans: tuple[Span, ...] = ()
    is_chat: bool = False


def detect_format(row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """The format whose columns the row has: chat, then completion, alpaca, text.

    Args:
        row: The first row of a source.
        columns: Our column name -> the name it has in this source.

    Raises:
        ValueError: No format fits; the text has the row's columns and what each format needs.
    """
    for name, needed in FORMATS.items():
        if all(columns.get(column, column) in row for column in needed):
            return name
    known = [column for needed in FORMATS.values() for column in needed]
    near = [f"{column!r} is near {match!r}" for column in row
            if (match := nearest(column, known))]
    allowed = "; ".join(f"{name}: {' + '.join(needed)}" for name, needed in FORMATS.items())
    raise ValueError(
        f"No data format fits the columns {', '.join(map(repr, row)) or '(none)'}; needed are {allowed}."
        f"{' ' + ', '.join(near) + '.' if near else ''} Other names can be mapped with `columns`."
    )


def resolve_loss_on(loss_on: str, format: str) -> str:
    """What `auto` means for a format; refuses what the format has no spans for.

    Raises:
        ValueError: The format cannot serve this choice.
    """
    if loss_on == "auto":
        return LOSS_ON[format][0]
    if loss_on not in LOSS_ON[format]:
        raise ValueError(
            f"loss_on: {loss_on} does not fit {format} rows; allowed there: auto, {', '.join(LOSS_ON[format])}."
        )
    return loss_on


def render(row: Mapping[str, Any], format: str, columns: Mapping[str, str], tokenizer: Any, spans: bool) -> Document:
    """The document that a row stands for.

    Args:
        row: The row, column -> value.
        format: A key of `FORMATS`.
        columns: Our column name -> the source's name.
        tokenizer: The tokenizer whose chat template renders chat rows.
        spans: Whether a chat's assistant turns must be found; without, a template that hides them is accepted.

    Raises:
        BadRow: The row cannot be used; the text says why.
    """

    def text_of(column: str, *, default: str | None = None) -> str:
        name = columns.get(column, column)
        value = row.get(name, default)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            problem = f"must be text, not {type(value).__name__}" if name in row else "is missing"
            raise BadRow(f"column {name!r} {problem}")
        return value

    if format == "chat":
        return _whole(_render_chat(row, columns, tokenizer, spans))
    if format == "text":
        return _whole(Document(_not_empty(text_of("text"), columns.get("text", "text"))))
    if format == "completion":
        prompt, answer, name = text_of("prompt"), text_of("completion"), columns.get("completion", "completion")
    else:
        prompt = _alpaca_prompt(text_of("instruction"), text_of("input", default=""))
        answer, name = text_of("output"), columns.get("output", "output")
    return _whole(Document(prompt + _not_empty(answer, name), prompt))


def _whole(document: Document) -> Document:
    """The document, if its text is one: JSON can hold half a character, which no tokenizer takes."""
    try:
        document.text.encode()
    except UnicodeEncodeError as error:
        half = ascii(document.text[error.start])
        raise BadRow(f"the text holds {half}, half a character") from error
    return document


def _not_empty(text: str, name: str) -> str:
    if not text.strip():
        raise BadRow(f"column {name!r} is empty")
    return text


def _alpaca_prompt(instruction: str, extra_input: str) -> str:
    """Alpaca's section headers, without its opening sentence."""
    sections = [("Instruction", instruction), ("Input", extra_input)]
    return "".join(f"### {name}:\n{text}\n\n" for name, text in sections if text) + "### Response:\n"


def _render_chat(
    row: Mapping[str, Any], columns: Mapping[str, str], tokenizer: Any, spans: bool
) -> Document:
    messages = _from_json(row.get(columns.get("messages", "messages")), "messages")
    tools = _from_json(row.get(columns.get("tools", "tools")), "tools") or None
    _check_messages(messages, columns.get("messages", "messages"))
    messages = [_without_none(message) | {"content": message.get("content")} for message in messages]
    try:
        text = render_chat(tokenizer, messages, tools)
        require_tools(tokenizer, messages, tools)
    except ChatTemplateError as error:
        raise BadRow(str(error)) from error
    try:
        found = assistant_turns(tokenizer, messages, tools, text)
    except ChatTemplateError as error:
        if spans:
            raise BadRow(str(error)) from error
        return Document(text, is_chat=True)
    spans_found = [Span(*turn) for turn in found]
    if spans_found and spans_found[-1].answer_stop == len(text):
        # Left open by the template (GLM ends a turn with the next speaker's token): the EOS closes the row.
        spans_found[-1] = replace(spans_found[-1], stop=len(text) + len(tokenizer.eos_token))
        text += tokenizer.eos_token
    return Document(text, spans=tuple(spans_found), is_chat=True)


def _from_json(value: Any, name: str) -> Any:
    """Nested columns are often stored as JSON text in tables."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"column {name!r} is text but not JSON ({error})") from error


def _check_messages(messages: Any, name: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise BadRow(f"column {name!r} must be a list of at least one message")
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadRow(f"{name}[{position}] must be an object with a text 'role'")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            kind = type(content).__name__
            raise BadRow(f"{name}[{position}] ({message['role']}): 'content' must be text, not {kind}")


def _without_none(value: Any) -> Any:
    """Arrow tables give every object the keys of all objects, filled with None; templates must not see those."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


