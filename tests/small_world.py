"""A model over three letters, whose whole distribution over short texts can be listed, and scorers of letters."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo_lightning.scorers import Scorer

LETTERS, END = "abc", 3


@dataclass(frozen=True)
class CountOfA(Scorer):
    """Reward ``weight`` for each a, less so much for each letter."""

    weight: float = 1.0
    less: float = 0.1

    def score(self, prompts, responses):
        return [self.weight * response.count("a") - self.less * len(response) for response in responses]


def write_model(folder: Path, seed: int, scale: float = 2.0) -> str:
    vocabulary = {**{letter: index for index, letter in enumerate(LETTERS)}, "</s>": END, "<pad>": END + 1}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=END + 2, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, eos_token_id=END, pad_token_id=END + 1, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        model.lm_head.weight.data.normal_(std=scale / 4)
        model.save_pretrained(folder)
    return str(folder)


def distribution(folder: str, prompt: str, length: int) -> dict[tuple[int, ...], float]:
    """Log-probability of every sequence of tokens that comes to its end or to so many tokens; pad is a token too."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    start, found = [LETTERS.index(letter) for letter in prompt], {}
    for count in range(1, length + 1):
        for ids in itertools.product(range(END + 2), repeat=count):
            if END in ids[:-1] or (count < length and ids[-1] != END):
                continue
            with torch.no_grad():
                logps = model(torch.tensor([[*start, *ids]])).logits[0].double().log_softmax(-1)
            rows = range(len(start) - 1, len(start) + count - 1)
            found[ids] = sum(logps[row, token].item() for row, token in zip(rows, ids, strict=True))
    return found


def text(ids):
    return "".join(LETTERS[token] for token in ids if token < END)
