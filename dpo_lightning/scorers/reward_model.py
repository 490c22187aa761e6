"""A reward model as a scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from transformers import PreTrainedTokenizerBase as Tokenizer

from dpo_lightning.checkpoints.reading import is_sharded, read_without_weights
from dpo_lightning.data.chat import Chat
from dpo_lightning.data.collate import collate
from dpo_lightning.data.dealing import runs
from dpo_lightning.data.example import PreferenceExample, TokenizedExample, UnusableRow
from dpo_lightning.data.tokenize import Tokenization
from dpo_lightning.errors import UsageError
from dpo_lightning.export.folder import data_provenance, with_chat_template
from dpo_lightning.models.policy import CausalPolicy
from dpo_lightning.models.reward import HEAD, OFFSET, READING, RewardSpec, has_head
from dpo_lightning.modules.reward import RewardModule
from dpo_lightning.paths import resolve
from dpo_lightning.scorers.base import Prompt, Scorer

CHUNK = 4096  # responses that are tokenised and sorted by length together
UNBOUNDED = 1_000_000  # tokens, where a model's config knows no bound


class Loaded(NamedTuple):
    """A reward model at work.

    Attributes:
        model: The model in evaluation mode.
        offset: What its rewards are too high by.
        tokenization: How prompts and responses become tokens, as in training.
    """

    model: CausalPolicy
    offset: float
    tokenization: Tokenization


@dataclass(frozen=True)
class RewardModel(Scorer):
    """Rewards less their offset, of a RewardModule or any decoder for sequence classification with one label.

    Args:
        path: A folder that was exported, another one with such a model, a name on the hub, or a checkpoint of a
            RewardModule, file or folder.
        batch_tokens: Most tokens that are run at once; a prompt counts once however many of its responses are run
            together.
        device: Where to, as in cuda:1; a GPU where there is one.
        dtype: Dtype of the weights; of a checkpoint that of training.
        max_length: Most tokens of prompt and response together; those that the model knows positions for unless given.
        chat: How messages become text; as in training unless given.
    """

    path: str
    batch_tokens: int = 16384
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_length: int | None = None
    chat: Chat | None = None

    ASIDE: ClassVar[tuple[str, ...]] = ("batch_tokens", "device")

    def __post_init__(self) -> None:
        if self.batch_tokens < 1:
            raise UsageError(f"`batch_tokens` must be 1 or more, got {self.batch_tokens}; 16384 is usual.")

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Reward of each response.

        Raises:
            UsageError: If there is no such model, or a prompt or response cannot be tokenised; it says the which-th.
        """
        rewards: list[float] = []
        for start in range(0, len(responses), CHUNK):
            stop = start + CHUNK
            rewards += self._score(prompts[start:stop], responses[start:stop], start)
        return rewards

    @torch.no_grad()
    def _score(self, prompts: Sequence[Prompt], responses: Sequence[str], start: int) -> list[float]:
        model, offset, _ = self._loaded
        examples = sorted(_joined(self._tokenized(prompts, responses, start), self.batch_tokens), key=_weight)
        rewards = [0.0] * len(responses)
        for part in runs(np.array(list(map(_weight, examples))), self.batch_tokens):
            batch = move_data_to_device(collate([example for example, _ in examples[part]]), model.model.device)
            found = model(batch).float() - offset
            for (_, places), row in zip(examples[part], found.tolist(), strict=True):
                for place, reward in zip(places, row, strict=False):
                    rewards[place] = reward
        return rewards

    def _tokenized(self, prompts: Sequence[Prompt], responses: Sequence[str], start: int) -> list[TokenizedExample]:
        tokenization = self._loaded.tokenization
        examples = [_example(*one, tokenization) for one in zip(prompts, responses, strict=True)]
        tokenized = []
        for number, found in enumerate(tokenization(examples), start=start + 1):
            if isinstance(found, UnusableRow):
                raise UsageError(f"Response {number:,} cannot be scored: {found}")
            tokenized.append(found[0])
        return tokenized

    @cached_property
    def _loaded(self) -> Loaded:
        place = Path(resolve(self.path)).expanduser()
        if place.is_file() or (place.is_dir() and is_sharded(place)):
            return self._of_checkpoint(place)
        spec = RewardSpec(path=self.path, dtype=self.dtype)
        config = spec.load_config()
        if not has_head(config):
            found = ", ".join(config.architectures or ["a model"])
            raise UsageError(
                f"{self.path} is no reward model: by its config it is {found}, "
                f"without a {HEAD}. Export a checkpoint of a RewardModule, or train one."
            )
        offset, read = getattr(config, OFFSET, 0.0), getattr(config, READING, {})
        return self._at_work(spec.build(self._device), offset, spec.load_tokenizer(), read)

    def _of_checkpoint(self, place: Path) -> Loaded:
        module = RewardModule.load_from_checkpoint(place, map_location="cpu", weights_only=True)
        module.configure_model()
        tokenizer = module.spec.load_tokenizer()
        record = read_without_weights(place)
        assert module.policy is not None
        return self._at_work(
            module.policy, module.offset, with_chat_template(tokenizer, record), data_provenance(record)
        )

    def _at_work(self, model: CausalPolicy, offset: float, tokenizer: Tokenizer, read: Mapping[str, Any]) -> Loaded:
        """Ready for use.

        Args:
            model: The model.
            offset: Its offset.
            tokenizer: Its tokenizer, with the chat template of training.
            read: What is known of how training read its data.
        """
        known = getattr(model.model.config.get_text_config(), "max_position_embeddings", None) or UNBOUNDED
        trained = Chat(variables=read.get("chat_variables", {}), texts=read.get("chat_texts", False))
        tokenization = Tokenization(
            tokenizer=tokenizer,
            max_length=self.max_length or known,
            chat=self.chat or trained,
            end_token=read.get("end_token", True),
        )
        return Loaded(model.eval().to(self._device), offset, tokenization)

    @property
    def _device(self) -> torch.device:
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _example(prompt: Prompt, response: str, tokenization: Tokenization) -> PreferenceExample:
    if isinstance(prompt, str) and tokenization.chat.texts:
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, str):
        return PreferenceExample(prompt, ([{"role": "assistant", "content": response}],))
    return PreferenceExample(prompt, (response or tokenization.tokenizer.eos_token or "",))  # it ends at once


def _joined(examples: Sequence[TokenizedExample], most: int) -> list[tuple[TokenizedExample, list[int]]]:
    """Responses to the same prompt as one example, as far as so many tokens go; and where each stands."""
    joined: list[tuple[TokenizedExample, list[int]]] = []
    last: dict[tuple[int, ...], int] = {}
    for place, example in enumerate(examples):
        prompt, ids = tuple(example.prompt_ids), example.response_ids[0]
        number = last.get(prompt)
        if number is None or joined[number][0].num_tokens + len(ids) > most:
            last[prompt] = len(joined)
            joined.append((TokenizedExample(example.prompt_ids, [ids], place), [place]))
        else:
            joined[number][0].response_ids.append(ids)
            joined[number][1].append(place)
    return joined


def _weight(example: tuple[TokenizedExample, Any]) -> int:
    return example[0].num_tokens
