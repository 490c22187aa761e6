"""Responses that are compared with each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from dpo_lightning.generation.samples import Samples
from dpo_lightning.scorers import Prompt


class Group(NamedTuple):
    """Different responses to a prompt.

    Attributes:
        row: Number of the prompt's row.
        prompt: Text or messages.
        responses: Texts, none of them twice.
        temperature: Temperature of all of them; None where several are pooled.
    """

    row: int
    prompt: Prompt
    responses: list[str]
    temperature: float | None

    @property
    def key(self) -> str:
        """What random choices hang on, so that neither order nor an interruption changes them."""
        return f"{self.row}/{self.temperature}"

    def columns(self) -> dict[str, object]:
        """What rows made of it say of where they come from."""
        return {"row": self.row, **({} if self.temperature is None else {"temperature": self.temperature})}


class Grouping(NamedTuple):
    """Groups, and what is not in them.

    Attributes:
        groups: Those with two responses or more.
        prompts: Rows of samples, those of a prompt pooled counted once.
        responses: All responses.
        unfinished: Responses that were cut before their end.
        empty: Responses without a word, which the data module would leave out.
        duplicates: Responses equal to an earlier one of their prompt.
        alone: Prompts with fewer than two different responses.
    """

    groups: list[Group]
    prompts: int
    responses: int
    unfinished: int
    empty: int
    duplicates: int
    alone: int


def group(samples: Sequence[Samples], *, unfinished: Literal["keep", "drop"], pool: bool) -> Grouping:
    """Bring together what is compared.

    Args:
        samples: Rows of samples.
        unfinished: Whether responses that were cut before their end are kept.
        pool: Compare the responses of all temperatures of a prompt with each other.
    """
    together: dict[tuple[int, float | None], list[Samples]] = {}
    for one in samples:
        together.setdefault((one.row, None if pool else one.temperature), []).append(one)
    groups, num_unfinished, empty, duplicates = [], 0, 0, 0
    for (row, temperature), parts in together.items():
        ended = [end for part in parts for end in part.finished]
        texts = [text for part in parts for text in part.responses]
        kept = [text for text, end in zip(texts, ended, strict=True) if end or unfinished == "keep"]
        written = [text for text in kept if text.strip()]
        different = list(dict.fromkeys(written))
        num_unfinished += len(ended) - sum(ended)
        empty += len(kept) - len(written)
        duplicates += len(written) - len(different)
        groups.append(Group(row, parts[0].prompt, different, temperature))
    usable = [one for one in groups if len(one.responses) > 1]
    total = sum(len(one.responses) for one in samples)
    return Grouping(usable, len(groups), total, num_unfinished, empty, duplicates, len(groups) - len(usable))
