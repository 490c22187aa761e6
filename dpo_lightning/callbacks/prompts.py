"""Prompts that a policy continues while it trains."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Trainer

from dpo_lightning.generation.prompts import Numbered, PromptEncoding, read_prompts
from dpo_lightning.scorers import Prompt


def numbered(prompts: str | Sequence[Prompt]) -> list[Numbered]:
    """Prompts of a file with the numbers of their rows, or prompts with numbers from 1 on."""
    return read_prompts(prompts) if isinstance(prompts, str) else list(enumerate(prompts, start=1))


def encoding_of(trainer: Trainer) -> PromptEncoding:
    """How training makes tokens of prompts, as far as a data module of ours says it."""
    tokenization = getattr(getattr(trainer, "datamodule", None), "tokenization", None)
    if tokenization is None:
        return PromptEncoding()
    return PromptEncoding(tokenization.chat, tokenization.max_prompt_length, tokenization.truncation_side)
