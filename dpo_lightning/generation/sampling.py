"""Sampling continuations."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers import PreTrainedTokenizerBase as Tokenizer

from dpo_lightning.data.tokenize import encode
from dpo_lightning.errors import UsageError


class Continuation(NamedTuple):
    """What a model wrote.

    Attributes:
        prompt_ids: What it was given.
        ids: What it added, the end token or the tokens of a stop string included where it came to one.
        text: What the prompt's text goes on with, special tokens left out, up to a stop string.
        finished: Whether it came to an end token or a stop string.
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str
    finished: bool = False


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str] | Sequence[list[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
    ends: Sequence[int] = (),
    stop: Sequence[str] = (),
    generate: Callable[..., Any] | None = None,
) -> list[Continuation]:
    """One continuation of each prompt; the random state of the caller is left as it was.

    Args:
        model: Model with a language-modelling head; set to evaluation mode for the while.
        tokenizer: Its tokenizer.
        prompts: Texts to continue, or their token ids.
        max_new_tokens: Most tokens to add.
        temperature: 1 samples from the model's own distribution, 0 takes the likeliest token.
        top_p: Sample from the smallest set of tokens that holds this probability.
        seed: Seed of the samples.
        batch_size: Prompts continued at a time.
        ends: Tokens that end a continuation, if not the tokenizer's end token alone.
        stop: Texts that end a continuation.
        generate: What generates, if not the model by itself, as where its weights are divided among ranks.
    """
    produce: Any = generate or model.generate
    prompt_ids = _prompt_ids(tokenizer, prompts)
    end = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (end if end is not None else 0)
    choice = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    eos = list(ends) or end
    settings = GenerationConfig(max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=eos, **choice)
    forked = [model.device] if model.device.type == "cuda" else []
    added: list[list[int]] = []
    with _evaluated(model, settings), torch.random.fork_rng(forked):
        torch.manual_seed(seed)
        for start in range(0, len(prompt_ids), batch_size):
            chunk = prompt_ids[start : start + batch_size]
            width = max(map(len, chunk))
            ids = torch.tensor([[pad] * (width - len(row)) + row for row in chunk], device=model.device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in chunk], device=model.device)
            more = {"stopping_criteria": StoppingCriteriaList([_AtStop(tokenizer, stop, width)])} if stop else {}
            output = produce(input_ids=ids, attention_mask=mask, generation_config=settings, **more)
            added += output[:, width:].tolist()
    ends = ends or ([] if end is None else [end])
    return [_continuation(tokenizer, *pair, ends, stop) for pair in zip(prompt_ids, added, strict=True)]


@contextmanager
def _evaluated(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, and none of the penalties and filters that a model's own generation config may hold."""
    training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = settings
    says = logging.getLogger("transformers.modeling_utils")
    says.addFilter(_is_not_of_mask)
    try:
        yield
    finally:
        says.removeFilter(_is_not_of_mask)
        model.train(training)
        model.generation_config = own


def _is_not_of_mask(record: logging.LogRecord) -> bool:
    """Not the warning of pads behind ends, which comes as transformers leaves out a mask that masks nothing."""
    return "passing in an `attention_mask`" not in record.getMessage()


def _continued(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    """Text of a continuation in its place: some decoders drop the space that a text begins with."""
    before, whole, alone = tokenizer.batch_decode([prompt, prompt + ids, ids], skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else alone


def _prompt_ids(tokenizer: Tokenizer, prompts: Sequence[str] | Sequence[list[int]]) -> list[list[int]]:
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = iter(encode(tokenizer, texts))
    found = [(next(encoded) if isinstance(prompt, str) else prompt) or begin for prompt in prompts]
    if not all(found):
        raise UsageError("A prompt is empty, and the tokenizer has no begin token to start from; give it some text.")
    return found


def _continuation(
    tokenizer: Tokenizer, prompt: list[int], ids: list[int], ends: Sequence[int], stop: Sequence[str]
) -> Continuation:
    """What was added, up to its end."""
    place = next((place for place, token in enumerate(ids, start=1) if token in ends), None)
    ids, finished = ids[:place], place is not None
    text = _continued(tokenizer, prompt, ids)
    if not _holds(text, stop):
        return Continuation(prompt, ids, text, finished)
    lengths = range(1, len(ids) + 1)
    first = bisect_left(lengths, True, key=lambda length: _holds(_continued(tokenizer, prompt, ids[:length]), stop))
    ids = ids[: lengths[first]]
    text = _continued(tokenizer, prompt, ids)
    return Continuation(prompt, ids, text[: min(text.find(one) for one in stop if one in text)], True)


def _holds(text: str, stop: Sequence[str]) -> bool:
    return any(one in text for one in stop)


class _AtStop(StoppingCriteria):
    """Ends a row whose continuation holds a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], width: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width
        # A token stands for a byte at least; some before them may be parts of a character.
        self.window = max(len(one.encode()) for one in stop) + 4

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        added = input_ids[:, self.width :].tolist()
        ended = [self._stops(row[-self.window :]) and self._stops(row) for row in added]
        return torch.tensor(ended, device=input_ids.device)

    def _stops(self, ids: list[int]) -> bool:
        (text,) = self.tokenizer.batch_decode([ids], skip_special_tokens=True)
        return _holds(text, self.stop)
