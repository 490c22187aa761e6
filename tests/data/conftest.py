"""Tokenizers of every make that a causal language model comes with, small enough to read."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BEGIN, END, PAD = "<s>", "</s>", "<pad>"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:!?\n"
# "ab" is a token: a prompt that ends in "a" merges with a response that begins with "b".
MERGES = [("a", "b"), ("x", "y"), ("xy", "z")]


class Make(NamedTuple):
    """A tokenizer and what its maker decided.

    Attributes:
        tokenizer: The tokenizer.
        adds_begin: Whether it puts a begin token before a text.
        adds_end: Whether it puts an end token behind a text.
        exact: Whether decoding gives back the text to the letter.
    """

    tokenizer: PreTrainedTokenizerFast
    adds_begin: bool
    adds_end: bool
    exact: bool


def bpe(alphabet: list[str], merges: list[tuple[str, str]], specials: list[str]) -> Tokenizer:
    tokens = [*specials, *alphabet, *("".join(pair) for pair in merges)]
    return Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(tokens)}, merges=merges))


def add_around(tokenizer: Tokenizer, template: str, specials: list[str]) -> None:
    pairs = [(token, tokenizer.token_to_id(token)) for token in specials]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)


def byte_level(template: str | None, **names: str) -> PreTrainedTokenizerFast:
    tokenizer = bpe(BYTES, [*MERGES, ("Ġ", "a")], sorted(set(names.values())))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if template is not None:
        add_around(tokenizer, template, [BEGIN, END])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def llama() -> Make:
    """Byte-level, a begin token before every text, as in Llama 3."""
    names = {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD}
    return Make(byte_level(f"{BEGIN} $A", **names), adds_begin=True, adds_end=False, exact=True)


def gpt2() -> Make:
    """Byte-level, nothing around a text, one special token for begin, end and padding."""
    names = {"bos_token": END, "eos_token": END, "pad_token": END}
    return Make(byte_level(None, **names), adds_begin=False, adds_end=False, exact=True)


def closing() -> Make:
    """Byte-level, begin and end token around every text, as with ``add_eos_token``."""
    names = {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD}
    return Make(byte_level(f"{BEGIN} $A {END}", **names), adds_begin=True, adds_end=True, exact=True)


def qwen() -> Make:
    """Byte-level, without a begin token."""
    return Make(byte_level(None, eos_token=END, pad_token=PAD), adds_begin=False, adds_end=False, exact=True)


def sentencepiece() -> Make:
    """Spaces as letters and one before every text, a begin token; decoding drops that space."""
    tokenizer = bpe(["▁", *LETTERS], [*MERGES, ("▁", "a")], [BEGIN, END, PAD])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    add_around(tokenizer, f"{BEGIN} $A", [BEGIN])
    names = {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD}
    return Make(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names), True, False, exact=True)


def wordpiece() -> Make:
    """Lower case, word pieces, begin and end token around every text; decoding loses case and spacing."""
    letters = sorted({letter.lower() for letter in LETTERS} - {"\n"})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters), "xyz", "##ab"]
    vocab = {token: place for place, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    add_around(tokenizer, "[CLS] $A [SEP]", ["[CLS]", "[SEP]"])
    names = {"bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    return Make(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names), True, True, exact=False)


MAKES = {maker.__name__: maker for maker in (llama, gpt2, closing, qwen, sentencepiece, wordpiece)}


@pytest.fixture(scope="session")
def makes() -> dict[str, Make]:
    """All tokenizers by name."""
    return {name: maker() for name, maker in MAKES.items()}


@pytest.fixture(scope="session", params=MAKES)
def make(request: pytest.FixtureRequest, makes: dict[str, Make]) -> Make:
    """One tokenizer after the other."""
    return makes[request.param]
