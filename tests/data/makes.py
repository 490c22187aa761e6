"""Tokenizers of every make that a causal language model comes with, small enough to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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
        spell: Tokens to the text that they stand for, the space before it included that some put there.
        keeps: What a text is for the tokenizer.
    """

    tokenizer: PreTrainedTokenizerFast
    adds_begin: bool
    adds_end: bool
    spell: Callable[[list[str]], str]
    keeps: Callable[[str], str] = str

    def spelled(self, ids: list[int]) -> str:
        """The text of some tokens, special ones left out."""
        ids = [token for token in ids if token not in self.tokenizer.all_special_ids]
        return self.spell(self.tokenizer.convert_ids_to_tokens(ids))


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


SPELL_BYTES = decoders.ByteLevel().decode
SPELL_SPACES = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]).decode
NAMES = {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD}


def llama() -> Make:
    """Byte-level, a begin token before every text, as in Llama 3."""
    return Make(byte_level(f"{BEGIN} $A", **NAMES), adds_begin=True, adds_end=False, spell=SPELL_BYTES)


def gpt2() -> Make:
    """Byte-level, nothing around a text, one special token for begin, end and padding."""
    names = {"bos_token": END, "eos_token": END, "pad_token": END}
    return Make(byte_level(None, **names), adds_begin=False, adds_end=False, spell=SPELL_BYTES)


def closing() -> Make:
    """Byte-level, begin and end token around every text, as with ``add_eos_token``."""
    return Make(byte_level(f"{BEGIN} $A {END}", **NAMES), adds_begin=True, adds_end=True, spell=SPELL_BYTES)


def qwen() -> Make:
    """Byte-level, without a begin token."""
    names = {"eos_token": END, "pad_token": PAD}
    return Make(byte_level(None, **names), adds_begin=False, adds_end=False, spell=SPELL_BYTES)


def spaces(scheme: str) -> Make:
    tokenizer = bpe(["▁", *LETTERS], [*MERGES, ("▁", "a")], [BEGIN, END, PAD])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    add_around(tokenizer, f"{BEGIN} $A", [BEGIN])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMES)
    return Make(fast, adds_begin=True, adds_end=False, spell=SPELL_SPACES)


def sentencepiece() -> Make:
    """Spaces as letters and one before every text, a begin token; decoding drops that space."""
    return spaces("first")


def always() -> Make:
    """The same, but a space also behind every special token."""
    return spaces("always")


def legacy() -> Make:
    """The same by normalising, as in Llama 2, and unknown characters as bytes."""
    tokens = [BEGIN, END, PAD, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS.strip()]
    merges = [*MERGES, ("▁", "a")]
    vocab = {token: place for place, token in enumerate([*tokens, *map("".join, merges)])}
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = SPELL_SPACES.__self__
    add_around(tokenizer, f"{BEGIN} $A", [BEGIN])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMES, unk_token="<unk>")
    return Make(fast, adds_begin=True, adds_end=False, spell=SPELL_SPACES)


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
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    return Make(fast, True, True, spell=spell_pieces, keeps=lambda text: "".join(text.lower().split()))


def spell_pieces(tokens: list[str]) -> str:
    return "".join(token.removeprefix("##") for token in tokens)


MAKERS = (llama, gpt2, closing, qwen, sentencepiece, always, legacy, wordpiece)
MAKES = {maker.__name__: maker for maker in MAKERS}
