"""Assistant turns under templates that rewrite, trim or merge what they are given.

The templates are small ones of this project's own, each with the habit of a family of real ones.
"""

import pytest

from data_support import config, small_tokenizer, write_rows
from trainer.data import load_splits
from trainer.data.chat import ChatTemplateError, assistant_turns, render_chat

SPECIAL = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "[INST]", "[/INST]", "<|return|>", "<|user|>",
           "<|assistant|>", "</s>")

CHATML = """{%- if tools %}{{ '<|im_start|>tools\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif -%}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') }}
{%- for call in m.tool_calls or [] %}{{ '\\n<call>' + call.function | tojson + '</call>' }}{% endfor -%}
{{ '<|im_end|>\\n' }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}"""

# Thinking is kept in the turns after the last question only; LAST opens it there, PROMPT in the generation prompt.
THINKING = """{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- set parts = (m.content or '').split('</think>') %}
{%- if m.role == 'assistant' and loop.index0 > ns.last %}
{{- '<think>\\n' + (parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 else '') + '\\n</think>\\n\\n' }}
{%- endif %}
{{- parts[-1].lstrip('\\n') if m.role == 'assistant' else m.content }}{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\nPROMPT' }}{% endif %}"""

# No header before an answer: the question's own end is the prompt.
INST = """{%- for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}
{%- else %}{{ ' ' + m.content | trim + '</s>' }}{% endif %}{% endfor %}"""

# The last turn ends with a token of its own.
RETURN = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}
{{- '<|return|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Turns have no end token: the next speaker's ends them.
OPEN = """{%- for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

QUESTION, ANSWER = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann"}
PLAIN = [QUESTION, ANSWER, {"role": "user", "content": "Sure? "}, {"role": "assistant", "content": " <b>Yes\n\nsir "}]
THOUGHTS = [QUESTION, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nAnn"}, QUESTION,
            {"role": "assistant", "content": "<think>\nso\n</think>\n\nBob"}]


def turns(template, messages, tools=None):
    tokenizer = small_tokenizer(SPECIAL, template)
    text = render_chat(tokenizer, messages, tools)
    return [text[start:stop] for start, _, stop in assistant_turns(tokenizer, messages, tools, text)]


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (CHATML, PLAIN, ["Ann<|im_end|>", " <b>Yes\n\nsir <|im_end|>"]),
        (CHATML, [QUESTION, ANSWER, ANSWER], ["Ann<|im_end|>", "Ann<|im_end|>"]),
        (CHATML, [{"role": "system", "content": "Ann"}, QUESTION, ANSWER], ["Ann<|im_end|>"]),
        (CHATML, [ANSWER, QUESTION, ANSWER], ["Ann<|im_end|>", "Ann<|im_end|>"]),
        (THINKING.replace("PROMPT", ""), THOUGHTS, ["Ann<|im_end|>", "<think>\nso\n</think>\n\nBob<|im_end|>"]),
        (THINKING.replace("PROMPT", "<think>\\n"), THOUGHTS, ["Ann<|im_end|>", "so\n</think>\n\nBob<|im_end|>"]),
        (THINKING.replace("PROMPT", "<think>\\n"), PLAIN, ["Ann<|im_end|>", "\n</think>\n\n <b>Yes\n\nsir <|im_end|>"]),
        (THINKING.replace("PROMPT", "<think>\\n"), [QUESTION, {"role": "assistant", "content": "<this"}, *PLAIN[2:]],
         ["<this<|im_end|>", "\n</think>\n\n <b>Yes\n\nsir <|im_end|>"]),
        (INST, PLAIN, [" Ann</s>", " <b>Yes\n\nsir</s>"]),
        (RETURN, PLAIN, ["Ann<|im_end|>", " <b>Yes\n\nsir <|return|>"]),
        (OPEN, PLAIN, ["Ann", " <b>Yes\n\nsir "]),
    ],
    ids=["plain", "two in a row", "answer seen before", "opens with an answer", "thinking dropped",
         "thinking opened by the prompt", "empty thinking", "answer like the prompt", "no header", "own last token",
         "no end token"],
)
def test_turns_are_found_where_they_stand(template, messages, expected):
    """Catches prefixes of a shorter chat taken for the whole one's: tokens of the wrong speaker become targets."""
    assert turns(template, messages) == expected


def test_tool_calls_are_targets_and_results_are_not():
    """Catches calls that are never learned, and tool output learned as the model's own words."""
    call = {"type": "function", "function": {"name": "get", "arguments": {"city": "Oslo"}}}
    messages = [QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "rain"}, {"role": "assistant", "content": "Rain."}]
    tools = [{"type": "function", "function": {"name": "get", "parameters": {}}}]
    first, second = turns(CHATML, messages, tools)
    assert first.startswith("\n<call>") and '"city": "Oslo"' in first and first.endswith("</call><|im_end|>")
    assert second == "Rain.<|im_end|>"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}{% endfor %}",
        "{% for m in messages %}{{ m.content + m.content }}{% endfor %}",
        "{{ messages | length }}{% for m in messages %}{{ m.content[:2] }}{% endfor %}",
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|bot|>' }}{% endif %}",
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}{{ 'x' * messages[0].content | length }}",
    ],
    ids=["leaves content out", "says it twice", "cuts it", "another prompt than it renders", "what follows depends"],
)
def test_turns_that_cannot_be_shown_are_refused(template, tmp_path):
    """Catches guessing: where a template hides its turns, the row is refused with what to do instead."""
    with pytest.raises(ChatTemplateError, match="`loss_on: all` trains on the whole chat"):
        turns(template, PLAIN)
    tokenizer = small_tokenizer(SPECIAL, template)
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": PLAIN}])
    with pytest.raises(ValueError, match="rows.jsonl:1: the chat template does not show where message"):
        load_splits(config(train=str(path)), tokenizer, 0)
    assert load_splits(config(train=str(path), loss_on="all"), tokenizer, 0).train.mask(0)[1:].all()


def test_an_answer_that_changes_what_follows_is_refused():
    """Catches an end taken from a render whose remainder is not the real one's."""
    counting = INST + "{{ 'x' * (messages[1:] | map(attribute='content') | join | length) }}"
    with pytest.raises(ChatTemplateError, match="where message 1 lies"):
        turns(counting, PLAIN[:2])


def test_refusals_of_the_template_name_the_row(tmp_path):
    """Catches a template's exception without the line that caused it, and a tokenizer without a template."""
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": PLAIN}])
    for template, reason in (("{{ raise_exception('roles must alternate') }}", "refuses it: roles must alternate"),
                             (None, "no chat template")):
        tokenizer = small_tokenizer(SPECIAL)
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=f"rows.jsonl:1: .*{reason}"):
            load_splits(config(train=str(path), loss_on="all"), tokenizer, 0)


@pytest.mark.parametrize(
    ("template", "expected"),
    [(CHATML, "Ann<|im_end|><b>Yes<|im_end|>"), (OPEN, "Ann<b>Yes<|endoftext|>"),
     (THINKING.replace("PROMPT", "<think>\\n"), "Ann<|im_end|>\n</think>\n\n<b>Yes<|im_end|>")],
)
def test_token_masks_spell_the_turns(tmp_path, template, expected):
    """Catches spans that are right in characters and wrong in tokens; an open last turn gets the EOS."""
    messages = [*PLAIN[:3], {"role": "assistant", "content": "<b>Yes"}]
    tokenizer = small_tokenizer(SPECIAL, template)
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": messages}])
    rows = load_splits(config(train=str(path), max_seq_len=256), tokenizer, 0).train
    assert tokenizer.decode(rows.tokens(0)[rows.mask(0)].tolist()) == expected
    assert rows.prompt(0)[1].endswith("<b>Yes")


def test_none_from_tables_is_not_shown_to_the_template(tmp_path):
    """Catches Arrow's None-filled keys, which templates print or take for a tool call."""
    tokenizer = small_tokenizer(SPECIAL, "{% for m in messages %}{{ m | tojson }}{% endfor %}{{ tools }}")
    filled = [message | {"tool_calls": None, "name": None} for message in PLAIN]
    paths = [write_rows(tmp_path / f"{number}.jsonl", [{"messages": messages, "tools": tools}])
             for number, (messages, tools) in enumerate(((PLAIN, "[]"), (filled, None)))]
    digests = {load_splits(config(train=str(path), loss_on="all"), tokenizer, 0).train.digest for path in paths}
    assert len(digests) == 1


def test_mlx_lm_wrapper_gives_the_same_rows(tmp_path):
    """Catches calls that mlx-lm's wrapper of a tokenizer does not pass on."""
    from mlx_lm.tokenizer_utils import load

    tokenizer = small_tokenizer(SPECIAL, CHATML)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": PLAIN}])
    digests = {load_splits(config(train=str(path), max_seq_len=256), either, 0).train.digest
               for either in (tokenizer, load(tmp_path / "tokenizer"))}
    assert len(digests) == 1
