"""What a Hugging Face folder holds besides the model: tokenizer, chat template, model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from dpo_lightning.export.card import model_card
from dpo_lightning.modules.base import PROVENANCE


def write_companions(
    folder: Path, tokenizer: Tokenizer, record: Mapping[str, Any], *, base: str, alone: bool = False
) -> None:
    """Write tokenizer, chat template and model card.

    Args:
        folder: The folder of the model.
        tokenizer: The tokenizer of the base model, to which a chat template given for training is added.
        record: What a checkpoint holds besides weights.
        base: Where the base model comes from.
        alone: Whether the folder holds adapters alone.
    """
    with_chat_template(tokenizer, record).save_pretrained(folder)
    card = model_card(record, data_provenance(record), base=base, alone=alone)
    (folder / "README.md").write_text(card, encoding="utf-8")


def with_chat_template(tokenizer: Tokenizer, record: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer with the chat template that was given for training, if one was."""
    template = data_provenance(record).get("chat_template")
    if template:
        tokenizer.chat_template = template
    return tokenizer


def data_provenance(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the data module said of itself; a checkpoint has it under the name of its class."""
    states = (value for value in record.values() if isinstance(value, Mapping))
    return next((state[PROVENANCE] for state in states if PROVENANCE in state), {})
