"""Sampling continuations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from dpo_lightning.data.tokenize import encode
from dpo_lightning.errors import UsageError


class Continuation(NamedTuple):
    """What a model wrote.

    Attributes:
        prompt_ids: What it was given.
        ids: What it added, the end token included where it came to one.
        text: What the prompt's text goes on with, special tokens left out.
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
    generate: Callable[..., Any] | None = None,
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
        generate: What generates, if not the model by itself, as where its weights are divided among ranks.
    """
    produce: Any = generate or model.generate
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompt_ids = [ids or begin for ids in encode(tokenizer, prompts)]
    if not all(prompt_ids):
        raise UsageError("A prompt is empty, and the tokenizer has no begin token to start from; give it some text.")
    end = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (end if end is not None else 0)
    choice = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    settings = GenerationConfig(max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=end, **choice)
    forked = [model.device] if model.device.type == "cuda" else []
    added: list[list[int]] = []
    with _evaluated(model, settings), torch.random.fork_rng(forked):
        torch.manual_seed(seed)
        for start in range(0, len(prompt_ids), batch_size):
            chunk = prompt_ids[start : start + batch_size]
            width = max(map(len, chunk))
            ids = torch.tensor([[pad] * (width - len(row)) + row for row in chunk], device=model.device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in chunk], device=model.device)
            output = produce(input_ids=ids, attention_mask=mask, generation_config=settings)
            added += [_until_end(row, end) for row in output[:, width:].tolist()]
    return [
        Continuation(prompt, ids, _continued(tokenizer, prompt, ids))
        for prompt, ids in zip(prompt_ids, added, strict=True)
    ]


@contextmanager
def _evaluated(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, and none of the penalties and filters that a model's own generation config may hold."""
    training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = settings
    try:
        yield
    finally:
        model.train(training)
        model.generation_config = own


def _continued(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    """Text of a continuation in its place: some decoders drop the space that a text begins with."""
    before, whole, alone = tokenizer.batch_decode([prompt, prompt + ids, ids], skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else alone


def _until_end(ids: list[int], end: int | None) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids
