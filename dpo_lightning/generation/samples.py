"""Files of samples."""

from __future__ import annotations

from typing import NamedTuple

from dpo_lightning.data.files import Files
from dpo_lightning.errors import UsageError
from dpo_lightning.scorers.base import Prompt


class Samples(NamedTuple):
    """What a model wrote on a prompt at a temperature.

    Attributes:
        row: Row of the prompt in its file, counted from 1.
        prompt: Text or messages.
        temperature: That of the samples.
        responses: Texts.
        tokens: Tokens of each, the end token included.
        finished: Whether each came to its end token.
    """

    row: int
    prompt: Prompt
    temperature: float
    responses: list[str]
    tokens: list[int]
    finished: list[bool]


def read_samples(path: str) -> list[Samples]:
    """All of a file.

    Raises:
        UsageError: If a row is none of samples.
    """
    found = []
    for number, row in Files(path).numbered():
        missing = [name for name in Samples._fields if name not in row]
        if missing:
            raise UsageError(f"{path}, row {number}: no row of samples, it lacks {', '.join(map(repr, missing))}.")
        found.append(Samples(*(row[name] for name in Samples._fields)))
    return found
