"""Where the assistant's turns lie in a rendered chat, found by asking the tokenizer's own chat template.

Templates rewrite earlier turns (Qwen3 drops their thinking), trim text or merge messages, so the conversation up
to a turn need not be a prefix of the whole. Instead a probe character is put into one message of the whole chat:
what follows it in that render must also end the real one, which fixes where the message ends *in place*.
A turn runs from the end of the generation prompt to its end-of-turn token. Where that cannot be shown to hold,
`ChatTemplateError` is raised; nothing is guessed.
"""

from typing import Any

PROBE = "\ue000"  # private use: no chat contains it, no template treats it as white space


class ChatTemplateError(ValueError):
    """The template cannot render a chat, or its turns cannot be found in the text."""


def render_chat(tokenizer: Any, messages: list[dict], tools: list | None, generate: bool = False) -> str:
    """The chat as text.

    Args:
        tokenizer: a transformers tokenizer or mlx-lm's wrapper of one.
        messages, tools: as chat templates take them.
        generate: end with the prompt for the assistant's next turn.

    Raises:
        ChatTemplateError: when the tokenizer has no chat template, or the template refuses the chat.
    """
    if getattr(tokenizer, "chat_template", None) is None and not getattr(tokenizer, "has_chat_template", False):
        raise ChatTemplateError("the tokenizer has no chat template")
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=generate)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise ChatTemplateError(f"the chat template refuses it: {error}") from error


def assistant_turns(
    tokenizer: Any, messages: list[dict], tools: list | None, text: str
) -> list[tuple[int, int, int]]:
    """Every assistant turn of `text = render_chat(tokenizer, messages, tools)`.

    Returns:
        `(start, answer_stop, stop)` per assistant message, in characters: `start` follows the generation prompt,
        `answer_stop` ends what the assistant says (tool calls included), `stop` ends its end-of-turn token.

    Raises:
        ChatTemplateError: when a turn's place cannot be shown.
    """
    tokens = special_tokens(tokenizer)
    turns: list[tuple[int, int, int]] = []
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _turn_start(tokenizer, messages, tools, text, position)
        answer_stop, stop = _turn_stop(tokenizer, tokens, messages, tools, text, position)
        if not start < answer_stop <= stop or (turns and start < turns[-1][2]):
            raise _cannot_find(position)
        turns.append((start, answer_stop, stop))
    return turns


def _turn_start(tokenizer: Any, messages: list[dict], tools: list | None, text: str, position: int) -> int:
    """Where the generation prompt ends, or the part of it that this turn has.

    An earlier turn may have less of it than a fresh prompt (Qwen3.5 opens its thinking only in the last one), so
    the prompt is matched as far as it goes, and never into the turn's own words.
    """
    own_words = _common_prefix(text, render_chat(tokenizer, _replaced(messages, position), tools))
    if position == 0:
        return own_words
    before = position - 1
    stop_before = len(text) - len(_after_message(tokenizer, messages, tools, text, before))
    history = messages[:position]
    prompt = render_chat(tokenizer, history, tools, generate=True)
    header = _after_message(tokenizer, history, tools, prompt, before, generate=True)
    num_matched = _common_prefix(text[stop_before:], header)
    if header[num_matched:].strip() and stop_before + num_matched < own_words:
        raise _cannot_find(position)  # something stands before the turn's words that the prompt has not
    return min(stop_before + num_matched, own_words)


def _turn_stop(
    tokenizer: Any, tokens: set[str], messages: list[dict], tools: list | None, text: str, position: int
) -> tuple[int, int]:
    """Where the assistant's words end, and where the token that ends the turn does."""
    after = _after_message(tokenizer, messages, tools, text, position)
    answer_stop = len(text) - len(after)
    alone = messages[: position + 1]
    is_last = len(alone) == len(messages)
    closing = after if is_last else _after_message(
        tokenizer, alone, tools, render_chat(tokenizer, alone, tools), position
    )
    token_start = min((closing.index(token) for token in tokens if token in closing), default=-1)
    if token_start < 0:
        return answer_stop, answer_stop + _common_prefix(closing, after)
    # The last turn of a chat may end with another token than the earlier ones (gpt-oss: <|return|> and <|end|>).
    ends = [len(token) for token in tokens if after.startswith(token, token_start)]
    if after[:token_start] != closing[:token_start] or not ends:
        raise _cannot_find(position)
    return answer_stop, answer_stop + token_start + max(ends)


def special_tokens(tokenizer: Any) -> set[str]:
    """The strings of the tokenizer's added and special tokens."""
    added = {str(token) for token in tokenizer.get_added_vocab()}
    return {token for token in added | set(tokenizer.all_special_tokens) if token.strip()}


def _after_message(
    tokenizer: Any, messages: list[dict], tools: list | None, text: str, position: int, generate: bool = False
) -> str:
    """The part of `text` that follows message `position`."""
    probed = render_chat(tokenizer, _extended(messages, position), tools, generate)
    _, found, after = probed.partition(PROBE)
    if not found or PROBE in after or not text.endswith(after):
        raise _cannot_find(position)
    return after


def _extended(messages: list[dict], position: int) -> list[dict]:
    """The messages with the probe at the end of one; its tool calls go, as they are rendered after the words."""
    message = {key: value for key, value in messages[position].items() if key != "tool_calls"}
    return [*messages[:position], message | {"content": (message["content"] or "") + PROBE}, *messages[position + 1 :]]


def _replaced(messages: list[dict], position: int) -> list[dict]:
    probe = {"role": messages[position]["role"], "content": PROBE}
    return [*messages[:position], probe, *messages[position + 1 :]]


def _common_prefix(first: str, second: str) -> int:
    for index, (one, other) in enumerate(zip(first, second)):
        if one != other:
            return index
    return min(len(first), len(second))


def _cannot_find(position: int) -> ChatTemplateError:
    return ChatTemplateError(
        f"the chat template does not show where message {position} lies in the rendered chat, "
        "so its targets are unknown; `loss_on: all` trains on the whole chat"
    )
