"""Prompts that a policy continues while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lightning.pytorch import Trainer

from dpo_lightning.data.chat import Chat
from dpo_lightning.generation.prompts import Numbered, read_prompts
from dpo_lightning.scorers import Prompt


def numbered(prompts: str | Sequence[Prompt]) -> list[Numbered]:
    """Prompts of a file with the numbers of their rows, or prompts with numbers from 1 on."""
    return read_prompts(prompts) if isinstance(prompts, str) else list(enumerate(prompts, start=1))


class Reading(NamedTuple):
    """How prompts become tokens.

    Attributes:
        chat: How messages become text.
        max_length: Most tokens of a prompt.
        truncation_side: Where a longer one is cut.
    """

    chat: Chat | None = None
    max_length: int | None = None
    truncation_side: str = "left"


def reading_of(trainer: Trainer) -> Reading:
    """How training reads prompts, as far as a data module of ours says it."""
    tokenization = getattr(getattr(trainer, "datamodule", None), "tokenization", None)
    if tokenization is None:
        return Reading()
    return Reading(tokenization.chat, tokenization.max_prompt_length, tokenization.truncation_side)
