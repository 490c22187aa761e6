"""What the experiment begins with: reviews to learn, prefixes of them to continue, a tokenizer and a model's shape.

Two sources: the grammar of film reviews that the package brings, and the IMDb reviews of Maas et al. 2011 as files.
With a network, prefixes of the reviews on the hub for a model of your own, by its tokenizer::

    python experiments/sentiment/prepare.py MODEL OUT
"""

from __future__ import annotations

import json
import lzma
import random
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoTokenizer, GPT2Config, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpo_lightning.data.sources import HubDataset
from dpo_lightning.paths import resolve
from dpo_lightning.quickstart.grammar import beginnings, corpus, is_held_out, review

PREFIX_TOKENS = (2, 8)  # DPO (arXiv:2305.18290), appendix C.1
END, PAD = "<|end|>", "<|pad|>"


def grammar(out: Path, num_reviews: int, num_prompts: int, num_held_out: int) -> None:
    """Everything from the package's grammar and the shape of its tiny model; nothing of what that model has learnt."""
    folder = resolve("package:quickstart/model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rng = random.Random(1)
    held_out = [beginning for beginning in beginnings() if is_held_out(beginning)]
    write_texts(out / "reviews.jsonl", corpus(num_reviews, seed=2))
    write_texts(out / "reviews_held_out.jsonl", [review(rng.choice(held_out), rng) for _ in range(500)])
    texts = list(corpus(2 * num_prompts + 5_000, seed=3))
    write_prompts(out, texts, texts, tokenizer, num_prompts, num_held_out)
    save_blank(out / "blank", tokenizer, AutoConfig.from_pretrained(folder))


def imdb(folder: Path, out: Path, width: int, depth: int, num_prompts: int, num_held_out: int) -> None:
    """The same from ``train.jsonl.xz`` and ``test.jsonl.xz``: a tokenizer learnt on them, and a model like GPT-2."""
    train, test = (list(reviews(folder / f"{name}.jsonl.xz")) for name in ("train", "test"))
    random.Random(1).shuffle(train)
    random.Random(2).shuffle(test)
    tokenizer = learn_tokenizer(train, vocab_size=8192)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=width, n_layer=depth, n_head=width // 64, bos_token_id=1,
        eos_token_id=1, pad_token_id=0, activation_function="gelu_pytorch_tanh",  # GPT-2's own function, in one kernel
    )  # fmt: skip
    write_texts(out / "reviews.jsonl", train)
    write_texts(out / "reviews_held_out.jsonl", test[:500])
    write_prompts(out, train, test[500:], tokenizer, num_prompts, num_held_out)
    save_blank(out / "blank", tokenizer, config)


def from_hub(model: str, out: Path, num_prompts: int = 25_000, num_held_out: int = 256) -> None:
    """Prefixes of the reviews on the hub."""
    train, test = ([row["text"] for row in HubDataset(name="stanfordnlp/imdb", split=s)] for s in ("train", "test"))
    write_prompts(out, train, test, AutoTokenizer.from_pretrained(model), num_prompts, num_held_out)


def reviews(path: Path) -> Iterator[str]:
    """Texts of a file of reviews, their line breaks as spaces."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield " ".join(json.loads(line)["text"].replace("<br />", " ").split())


def learn_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; the end token also begins a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=END, eos_token=END)


def write_prompts(
    out: Path,
    train: Iterable[str],
    held_out: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    num_prompts: int,
    num_held_out: int,
) -> None:
    """Prefixes to sample from, and others, each but once, to measure on; no prefix is in both files."""
    seen = (text for text in prefixes(train, tokenizer, seed=4) if not is_held_out(text))
    new = dict.fromkeys(text for text in prefixes(held_out, tokenizer, seed=5) if is_held_out(text))
    write(out / "prompts.jsonl", ({"prompt": text} for text in islice(seen, num_prompts)))
    write(out / "prompts_held_out.jsonl", ({"prompt": text} for text in islice(new, num_held_out)))


def prefixes(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[str]:
    """The beginning of each text, 2 to 8 tokens of it."""
    rng = random.Random(seed)
    for text in texts:
        yield str(tokenizer.decode(tokenizer(text)["input_ids"][: rng.randint(*PREFIX_TOKENS)]))


def save_blank(folder: Path, tokenizer: PreTrainedTokenizerBase, config: GPT2Config) -> None:
    """A tokenizer and the shape of a model without weights."""
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)


def write_texts(path: Path, texts: Iterable[str]) -> None:
    """One review a line."""
    write(path, ({"text": text} for text in texts))


def write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    from_hub(sys.argv[1], Path(sys.argv[2]))
