"""Which tokens are targets, format by format, seen through the text that they spell."""

import pytest

from data_support import config, small_tokenizer, write_rows
from trainer.data import load_splits

EOS = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture
def load(tmp_path, tokenizer):
    def load(rows, **changes):
        path = write_rows(tmp_path / "rows.jsonl", rows)
        return load_splits(config(train=str(path), max_seq_len=512, **changes), tokenizer, 0).train
    return load


@pytest.fixture
def targets(load, tokenizer):
    """The decoded targets of the first row, and the whole row."""
    def targets(row, **changes):
        rows = load([row], **changes)
        return (tokenizer.decode(rows.tokens(0)[rows.mask(0)].tolist()), tokenizer.decode(rows.tokens(0).tolist()))
    return targets


def test_text(targets):
    """Catches a missing EOS, a doubled one, and a first token counted as a target."""
    assert targets({"text": "Xhello"}) == ("hello" + EOS, "Xhello" + EOS)
    assert targets({"text": "Xhello" + EOS}) == ("hello" + EOS, "Xhello" + EOS)


def test_completion(targets):
    """Catches prompts that are trained on, or an answer that loses its first or last token."""
    row = {"prompt": "Q: who?\nA:", "completion": " Ann"}
    assert targets(row) == (" Ann" + EOS, "Q: who?\nA: Ann" + EOS)
    assert targets(row, loss_on="all") == (": who?\nA: Ann" + EOS, "Q: who?\nA: Ann" + EOS)
    assert targets({"prompt": "", "completion": "Xy"}) == ("y" + EOS, "Xy" + EOS)


def test_prompt_is_a_prefix_of_the_row_even_where_a_token_would_straddle(tokenizer, load):
    """Catches tokens merged over the border: generation would start from tokens that training never saw."""
    word = max((token for token in tokenizer.get_vocab() if token.isascii() and token.isalpha()), key=len)
    assert len(tokenizer(word)["input_ids"]) == 1, "the test needs a word that is one token"
    rows = load([{"prompt": word[:1], "completion": word[1:] + " 7"}])
    prompt, answer = rows.prompt(0)
    assert prompt.tolist() == tokenizer(word[:1])["input_ids"] == rows.tokens(0)[: len(prompt)].tolist()
    assert answer == word[1:] + " 7"


def test_tokenizer_that_adds_tokens_by_itself(tmp_path):
    """Catches a BOS that is lost, and a tokenizer's own EOS left between prompt and answer."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = small_tokenizer(("<s>",))
    bos, eos = tokenizer.convert_tokens_to_ids(["<s>", EOS])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"<s> $A {EOS}", special_tokens=[("<s>", bos), (EOS, eos)])
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Q", "completion": "A"}])
    rows = load_splits(config(train=str(path)), tokenizer, 0).train
    assert tokenizer.decode(rows.tokens(0).tolist()) == f"<s>QA{EOS}"
    assert rows.mask(0).tolist() == [False, False, True, True]


def test_alpaca(targets, load):
    """Catches a missing input section and targets outside the response."""
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    target, whole = targets(row)
    assert target == "3" + EOS
    assert whole == "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3" + EOS
    assert "Input" not in targets({"instruction": "Hi", "output": "Ho"})[1]
    assert load([row]).prompt(0)[1] == "3"


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Go"}, {"role": "assistant", "content": "Gone"}]


def test_chat(targets, load, tokenizer):
    """Catches masks of the last turn only (what others do), and turns without their end token."""
    whole = f"user:\nHi{EOS}\nassistant:\nHello{EOS}\nuser:\nGo{EOS}\nassistant:\nGone{EOS}\n"
    assert targets({"messages": CHAT}) == (f"Hello{EOS}Gone{EOS}", whole)
    assert targets({"messages": CHAT}, loss_on="completion") == (f"Gone{EOS}", whole)
    assert targets({"messages": CHAT}, loss_on="all")[0] == whole[1:]
    prompt, answer = load([{"messages": CHAT}]).prompt(0)
    assert (tokenizer.decode(prompt.tolist()), answer) == (whole[: whole.rindex("Gone")], "Gone")


def test_format_is_found_by_columns(load, targets):
    """Catches a wrong guess, and a guess that silently trains on the wrong column."""
    both = {"prompt": "a", "completion": "b", "text": "c"}
    assert targets(both)[1] == "ab" + EOS
    assert targets(both, format="text")[1] == "c" + EOS
    with pytest.raises(ValueError, match="No data format fits the columns 'promt', 'answer'.*'promt' is near 'prompt'"):
        load([{"promt": "a", "answer": "b"}])


@pytest.mark.parametrize(
    ("row", "loss_on"),
    [({"text": "a"}, "completion"), ({"text": "a"}, "assistant"), ({"prompt": "a", "completion": "b"}, "assistant")],
)
def test_loss_on_must_fit_the_format(load, row, loss_on):
    """Catches a mask setting that has no meaning for the rows and is ignored."""
    with pytest.raises(ValueError, match=f"loss_on: {loss_on} does not fit .* allowed there: auto, "):
        load([row], loss_on=loss_on)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("[]", "at least one message"),
        ("{broken", "text but not JSON"),
        ([{"content": "no role"}], r"messages\[0\] must be an object with a text 'role'"),
        ([{"role": "user", "content": 3}], r"messages\[0\] \(user\): 'content' must be text, not int"),
        ([{"role": "user", "content": "only a question"}], "no target tokens"),
    ],
)
def test_malformed_chats(load, messages, reason):
    """Catches malformed messages that reach the template and fail there with its words."""
    with pytest.raises(ValueError, match=reason):
        load([{"messages": messages}])


def test_no_eos(tokenizer, tmp_path):
    """Catches rows without an end for want of an EOS token."""
    tokenizer = small_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        load_splits(config(train=str(write_rows(tmp_path / "rows.jsonl", [{"text": "a"}]))), tokenizer, 0)
