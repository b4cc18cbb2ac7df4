"""A tokenizer of the project's own making, for models that start from random weights."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The name that Qwen3.5's tokenizer class expects; under another one it would add a token of its own.
EOS = "<|endoftext|>"
PAD = "<|pad|>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- message['role'] + ':\\n' + message['content'] + '" + EOS + "\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant:\\n' -}}{%- endif -%}"
)


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer trained on these texts.

    The same texts and size give the same tokenizer, down to the files that `save_pretrained` writes. It has an EOS
    and a padding token and a plain chat template (`role:`, a new line, the content, EOS).

    Args:
        texts: What to learn the merges from; prompts and completions alike.
        vocab_size: Size of the vocabulary; smaller when the texts have no more pairs to merge.

    Raises:
        ValueError: `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX

    smallest = 256 + len((EOS, PAD))
    if vocab_size < smallest:
        raise ValueError(f"A byte-level tokenizer needs at least {smallest} entries, not {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    # Qwen3.5's own splitting: beside a config of that model type transformers loads any BPE with it, whatever was saved.
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
