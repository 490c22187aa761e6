"""Sampling continuations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer


class Continuation(NamedTuple):
    """What a model wrote.

    Attributes:
        prompt_ids: What it was given.
        ids: What it added, the end token included where it came to one.
        text: The same as text, special tokens left out.
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
) -> list[Continuation]:
    """One continuation of each prompt; the random state of the caller is left as it was.

    Args:
        model: Model with a language-modelling head; set to evaluation mode for the while.
        tokenizer: Its tokenizer.
        prompts: Texts to continue.
        max_new_tokens: Most tokens to add.
        temperature: 1 samples from the model's own distribution, 0 takes the likeliest token.
        top_p: Sample from the smallest set of tokens that holds this probability.
        seed: Seed of the samples.
        batch_size: Prompts continued at a time.
    """
    encoded = tokenizer(list(prompts), verbose=False)["input_ids"]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompt_ids: list[list[int]] = [ids or begin for ids in encoded]
    end = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (end if end is not None else 0)
    choice = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    if temperature == 0:
        choice = {"do_sample": False}
    training, forked = model.training, [model.device] if model.device.type == "cuda" else []
    model.eval()
    added: list[list[int]] = []
    with torch.random.fork_rng(forked):
        torch.manual_seed(seed)
        for start in range(0, len(prompt_ids), batch_size):
            chunk = prompt_ids[start : start + batch_size]
            width = max(map(len, chunk))
            ids = torch.tensor([[pad] * (width - len(row)) + row for row in chunk], device=model.device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in chunk], device=model.device)
            output = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                eos_token_id=end,
                **choice,
            )
            added += [_until_end(row, end) for row in output[:, width:].tolist()]
    model.train(training)
    texts = tokenizer.batch_decode(added, skip_special_tokens=True)
    return [Continuation(*parts) for parts in zip(prompt_ids, added, texts, strict=True)]


def _until_end(ids: list[int], end: int | None) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids
