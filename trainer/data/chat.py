"""Where the assistant's turns lie in a rendered chat, found by asking the tokenizer's own chat template.

Templates rewrite earlier turns (Qwen3 drops their thinking), trim text or merge messages, so the conversation up
to a turn need not be a prefix of the whole. Instead a probe character is put into the messages of the whole chat:
what stands around it in that render must also stand in the real one, which fixes where a message ends *in place*.
A turn runs from the end of the generation prompt to its end-of-turn token. Where that cannot be shown to hold,
`ChatTemplateError` is raised; nothing is guessed.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROBES = [chr(code) for code in range(0xE000, 0xF900)]  # private use: in no chat, and not white space to a template

# What one chat may take: real ones take milliseconds and thousands of characters.
MAX_SECONDS = 10.0
MAX_CHARACTERS = 1 << 24
MAX_BYTES = 1 << 32


class ChatTemplateError(ValueError):
    """The template cannot render a chat, or its turns cannot be found in the text."""


def render_chat(tokenizer: Any, messages: list[dict], tools: list | None, generate: bool = False) -> str:
    """The chat as text.

    Args:
        tokenizer: A transformers tokenizer or mlx-lm's wrapper of one.
        messages, tools: The chat and its tools, as chat templates take them.
        generate: End with the prompt for the assistant's next turn.

    Raises:
        ChatTemplateError: The tokenizer has no chat template, or the template refuses the chat.
    """
    if getattr(tokenizer, "chat_template", None) is None and not getattr(tokenizer, "has_chat_template", False):
        raise ChatTemplateError("the tokenizer has no chat template")
    try:
        with _time_limit(MAX_SECONDS), _memory_limit(MAX_BYTES):
            text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=generate)
    except MemoryError as error:
        raise ChatTemplateError(f"the chat template takes more than {MAX_BYTES >> 30} GiB of memory for it") from error
    except Exception as error:  # a template is somebody else's program, and may fail in any way
        reason = str(error) or type(error).__name__
        raise ChatTemplateError(f"the chat template refuses it: {reason}") from error
    if len(text) > MAX_CHARACTERS:
        raise ChatTemplateError(f"the chat template makes {len(text):,} characters of it, more than {MAX_CHARACTERS:,}")
    return text


def require_tools(tokenizer: Any, messages: list[dict], tools: list | None) -> None:
    """Refuse a chat whose tools or tool calls the template leaves out: the model would learn to answer without them.

    Raises:
        ChatTemplateError: The template leaves out the tools, or a tool call; the text names the message.
    """
    if tools and (marked_tools := _marked(tools)) != tools and not _writes(tokenizer, messages, marked_tools):
        raise ChatTemplateError(
            "the chat template leaves out the row's tools; take a tokenizer whose template writes them, or leave such "
            "rows out"
        )
    for position, message in enumerate(messages):
        if not message.get("tool_calls"):
            continue
        marked = [*messages[:position], message | {"tool_calls": _marked(message["tool_calls"])}, *messages[position + 1 :]]
        if marked[position] == message:
            continue  # not calls as templates know them
        if not _writes(tokenizer, marked, tools):
            raise ChatTemplateError(
                f"the chat template leaves out the tool calls of message {position}; take a tokenizer whose template "
                "writes them, or leave such rows out"
            )


def _writes(tokenizer: Any, messages: list[dict], tools: list | None) -> bool:
    """Whether the probe in a chat stands in its text; taken for granted where the template looks into what is probed."""
    try:
        return PROBES[0] in render_chat(tokenizer, messages, tools)
    except ChatTemplateError:
        return True


def _marked(calls: Any) -> Any:
    """Tools or tool calls with the probe in their functions' names."""
    if isinstance(calls, Mapping):
        return {key: PROBES[0] if key == "name" else _marked(value) for key, value in calls.items()}
    return [_marked(call) for call in calls] if isinstance(calls, list) else calls


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError where the block takes longer. Only the main thread can be interrupted; others run on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise TimeoutError(f"it took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _memory_limit(num_bytes: int) -> Iterator[None]:
    """Raise MemoryError where the block takes so much more than there is; on Linux, as macOS keeps to no such limit."""
    if sys.platform != "linux":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    own = [limit for limit in (in_use + num_bytes, *before) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(own), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def assistant_turns(
    tokenizer: Any, messages: list[dict], tools: list | None, text: str
) -> list[tuple[int, int, int]]:
    """Every assistant turn of `text = render_chat(tokenizer, messages, tools)`.

    Returns:
        `(start, answer_stop, stop)` per assistant message, in characters: `start` follows the generation prompt,
        `answer_stop` ends what the assistant says (tool calls included), `stop` ends its end-of-turn token.

    Raises:
        ChatTemplateError: A turn's place cannot be shown.
    """
    ends = _message_ends(tokenizer, messages, tools, text)
    tokens = special_tokens(tokenizer)
    turns: list[tuple[int, int, int]] = []
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if min(ends[max(position - 1, 0) : position + 1]) < 0:
            raise _cannot_find(position)
        start = _turn_start(tokenizer, messages, tools, text, position, ends)
        stop = _turn_stop(tokenizer, tokens, messages, tools, text, position, ends)
        if not start < ends[position] <= stop or (turns and start < turns[-1][2]):
            raise _cannot_find(position)
        turns.append((start, ends[position], stop))
    return turns


def _turn_start(
    tokenizer: Any, messages: list[dict], tools: list | None, text: str, position: int, ends: list[int]
) -> int:
    """Where the generation prompt ends, or the part of it that this turn has.

    An earlier turn may have less of it than a fresh prompt (Qwen3.5 opens its thinking only in the last one), so
    the prompt is matched as far as it goes, and then never into the turn's own words.
    """
    header, matched, before = "", 0, 0
    if position > 0:
        before = ends[position - 1]
        header = _after_probe(tokenizer, messages[:position], tools, generate=True)
        matched = _common_prefix(text[before : before + len(header)], header)
        if matched == len(header):
            return before + matched
    other_words = [*messages[:position], {"role": "assistant", "content": PROBES[0]}, *messages[position + 1 :]]
    own_words = _common_prefix(text, render_chat(tokenizer, other_words, tools))
    if header[matched:].strip() and before + matched < own_words:
        raise _cannot_find(position)  # something stands before the turn's words that the prompt has not
    return min(before + matched, own_words) if position > 0 else own_words


def _turn_stop(
    tokenizer: Any,
    tokens: set[str],
    messages: list[dict],
    tools: list | None,
    text: str,
    position: int,
    ends: list[int],
) -> int:
    """Where the token that ends the turn does, or what the template writes after a turn where there is none."""
    after = text[ends[position] :]
    is_last = position == len(messages) - 1
    closing = after if is_last else _after_probe(tokenizer, messages[: position + 1], tools)
    token_start = min((closing.index(token) for token in tokens if token in closing), default=-1)
    if token_start < 0:
        return ends[position] + _common_prefix(closing, after)
    # The last turn of a chat may end with another token than the earlier ones (gpt-oss: <|return|> and <|end|>).
    token_lengths = [len(token) for token in tokens if after.startswith(token, token_start)]
    if after[:token_start] != closing[:token_start] or not token_lengths:
        raise _cannot_find(position)
    return ends[position] + token_start + max(token_lengths)


def special_tokens(tokenizer: Any) -> set[str]:
    """The strings of the tokenizer's added and special tokens."""
    added = {str(token) for token in tokenizer.get_added_vocab()}
    return {token for token in added | set(tokenizer.all_special_tokens) if token.strip()}


def _message_ends(tokenizer: Any, messages: list[dict], tools: list | None, text: str) -> list[int]:
    """Where each message ends in `text`, -1 where that cannot be shown.

    One render with a probe in every message is tried first. Where it is not the text with probes in it (a template
    that trims, tool calls), each message gets a render of its own.
    """
    probed = render_chat(tokenizer, [_probed(*item) for item in zip(messages, PROBES)], tools)
    ends = [probed.find(probe) - number for number, probe in enumerate(PROBES[: len(messages)])]
    pieces = zip([0, *ends], [*ends, len(text)])
    if ends == sorted(ends) and probed == "".join(
        text[start:stop] + probe for (start, stop), probe in zip(pieces, [*PROBES[: len(messages)], ""])
    ):
        return ends
    for position in range(len(messages)):
        try:
            after = _after_probe(tokenizer, messages, tools, position)
        except ChatTemplateError:
            after = None
        ends[position] = len(text) - len(after) if after is not None and text.endswith(after) else -1
    return ends


def _after_probe(
    tokenizer: Any, messages: list[dict], tools: list | None, position: int = -1, generate: bool = False
) -> str:
    """What the template writes after message `position`."""
    position %= len(messages)
    probed = [*messages[:position], _probed(messages[position], PROBES[0]), *messages[position + 1 :]]
    _, found, after = render_chat(tokenizer, probed, tools, generate).partition(PROBES[0])
    if not found:
        raise _cannot_find(position)
    return after


def _probed(message: dict, probe: str) -> dict:
    """The message with the probe at its end; its tool calls go, as they are rendered after the words."""
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return kept | {"content": (message["content"] or "") + probe}


def _common_prefix(first: str, second: str) -> int:
    return len(os.path.commonprefix([first, second]))


def _cannot_find(position: int) -> ChatTemplateError:
    return ChatTemplateError(
        f"the chat template does not show where message {position} lies in the rendered chat, "
        "so its targets are unknown; `loss_on: all` trains on the whole chat"
    )
