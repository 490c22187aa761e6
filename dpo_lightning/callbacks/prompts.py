"""Prompts that a policy continues while it trains."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Trainer

from dpo_lightning.data.chat import Chat
from dpo_lightning.generation.prompts import Numbered, read_prompts
from dpo_lightning.scorers import Prompt


def numbered(prompts: str | Sequence[Prompt]) -> list[Numbered]:
    """Prompts of a file with the numbers of their rows, or prompts with numbers from 1 on."""
    return read_prompts(prompts) if isinstance(prompts, str) else list(enumerate(prompts, start=1))


def reading_of(trainer: Trainer) -> tuple[Chat | None, int | None]:
    """How training reads prompts: how messages become text, and most tokens; None where no data module of ours says."""
    tokenization = getattr(getattr(trainer, "datamodule", None), "tokenization", None)
    return (None, None) if tokenization is None else (tokenization.chat, tokenization.max_prompt_length)
