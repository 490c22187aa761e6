"""Make the quickstart's data again: tokenizer, tiny model by SFT, preference pairs, held-out prompts.

From the root of the repository, about ten minutes on two cores; the files come out bit for bit as they are::

    python -m dpo_lightning.quickstart.make

The model learns reviews by ``configs/quickstart_sft.yaml``; it has seen no held-out beginning. Then it writes two
continuations of each beginning, and the ground-truth sentiment says which is chosen.
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from dpo_lightning.cli import run
from dpo_lightning.generation import sample
from dpo_lightning.quickstart.grammar import beginnings, corpus, is_held_out, sentiment

HERE = Path(__file__).parent
END, PAD = "<|end|>", "<|pad|>"
NUM_REVIEWS, NUM_VALIDATION, NUM_TRAIN_PAIRS, NUM_VAL_PAIRS = 60_000, 1_000, 6_000, 400


def make(work: Path) -> None:
    """Everything, in order; intermediate files lie in ``work``."""
    work.mkdir(parents=True, exist_ok=True)
    reviews = list(islice(corpus(NUM_REVIEWS + NUM_VALIDATION, seed=0), NUM_REVIEWS + NUM_VALIDATION))
    write(work / "train.jsonl", ({"text": review} for review in reviews[NUM_VALIDATION:]))
    write(work / "val.jsonl", ({"text": review} for review in reviews[:NUM_VALIDATION]))
    blank = work / "blank"
    learn_tokenizer(reviews).save_pretrained(blank)
    tiny_config().save_pretrained(blank)
    run(["fit", "--config", "configs/quickstart_sft.yaml"])
    shutil.copytree(work / "hf", HERE / "model", dirs_exist_ok=True)
    make_pairs(HERE / "model")


def make_pairs(folder: Path) -> None:
    """Two samples a beginning from the model, ranked by sentiment; equal scores are sampled again."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rng = random.Random(0)
    held_out = [beginning for beginning in beginnings() if is_held_out(beginning)]
    seen = [beginning for beginning in beginnings() if not is_held_out(beginning)]
    rng.shuffle(held_out)
    write(HERE / "train.jsonl.gz", pairs(model, tokenizer, seen, NUM_TRAIN_PAIRS, seed=1))
    write(HERE / "val.jsonl.gz", pairs(model, tokenizer, held_out, NUM_VAL_PAIRS, seed=2))
    write(HERE / "held_out.jsonl", ({"prompt": beginning} for beginning in held_out[:200]))


def pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], count: int, seed: int
) -> list[dict[str, str]]:
    """Preference pairs: chosen has the higher ground-truth sentiment."""
    found: list[dict[str, str]] = []
    while len(found) < count:
        first, second = (sample(model, tokenizer, prompts, seed=seed + offset) for offset in (0, 1_000))
        for prompt, one, other in zip(prompts, first, second, strict=True):
            worse, better = sorted((one.text, other.text), key=lambda text: sentiment(prompt + text))
            if sentiment(prompt + worse) < sentiment(prompt + better):
                found.append({"prompt": prompt, "chosen": better, "rejected": worse})
        seed += 1
    return found[:count]


def learn_tokenizer(reviews: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 512 tokens; the end token also begins a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(reviews, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=END, eos_token=END)


def tiny_config() -> LlamaConfig:
    """A Llama of about a quarter of a million parameters."""
    return LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip


def write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """JSON Lines, compressed where the name says so, the same bytes every time."""
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)


if __name__ == "__main__":
    make(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart_sft"))
