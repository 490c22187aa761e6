"""Reward models as transformers has them: sequence classification with one label, read at the last token."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from dpo_lightning.data.chat import Chat, Renderer
from dpo_lightning.data.tokenize import encode, special_ids
from dpo_lightning.export.folder import data_provenance, with_chat_template
from dpo_lightning.export.model import Trained
from dpo_lightning.models.reward import OFFSET, READING

log = logging.getLogger(__name__)

PAD = "<|pad|>"
READ = ("end_token", "chat_texts", "chat_variables")


def as_classifier(trained: Trained, tokenizer: Tokenizer, record: Mapping[str, Any]) -> Trained:
    """A reward model whose config tells its offset, how texts were read, and padding from the end of a response.

    transformers reads a reward at the last token that is no padding, so the token for padding is one that no response
    ends with: the tokenizer's own, or else an unused one of its vocabulary, or a new one.

    Args:
        trained: The reward model.
        tokenizer: Its tokenizer, which gets that token for padding, and the chat template of training.
        record: What a checkpoint holds besides weights.
    """
    found, data = record[OFFSET], data_provenance(record)
    if found["step"] < 0:
        log.warning("No validation has found an offset yet, so the mean of these rewards is any.")
    config = copy.deepcopy(trained.config)
    text = config.get_text_config()
    token = _padding(with_chat_template(tokenizer, record), text, data.get("chat_variables", {}))
    if token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    else:
        tokenizer.pad_token = token
    for part in (config, text):
        part.pad_token_id = tokenizer.pad_token_id
    text.vocab_size = max(text.vocab_size, tokenizer.pad_token_id + 1)
    setattr(config, OFFSET, found["value"])
    setattr(config, READING, {name: data[name] for name in READ if name in data})
    return replace(trained, config=config, generation=None)


def _padding(tokenizer: Tokenizer, config: PretrainedConfig, variables: Mapping[str, Any]) -> str | None:
    """A token that is there and never ends a response."""
    ends = {tokenizer.eos_token_id, tokenizer.unk_token_id, *_closing(tokenizer, variables)}
    ends |= {*config.eos_token_id} if isinstance(config.eos_token_id, list) else {config.eos_token_id}
    named = [(tokenizer.pad_token_id, tokenizer.pad_token)]
    named += [
        (number, str(token)) for number, token in tokenizer.added_tokens_decoder.items() if "pad" in str(token).lower()
    ]
    usable = (token for number, token in named if number is not None and number not in ends)
    return next((token for token in usable if isinstance(token, str)), None)


def _closing(tokenizer: Tokenizer, variables: Mapping[str, Any]) -> frozenset[int]:
    """Special tokens that the chat template closes an answer with."""
    if tokenizer.chat_template is None:
        return frozenset()
    ending = Renderer(tokenizer, Chat(variables=variables)).ending()
    return special_ids(tokenizer).intersection(encode(tokenizer, [ending], templated=True)[0])
