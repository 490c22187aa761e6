"""The two stations between a row of a source and a batch."""

from __future__ import annotations

from typing import NamedTuple


class PreferenceExample(NamedTuple):
    """A prompt and its responses as text, best response first.

    Attributes:
        prompt: What the model is given.
        responses: What it might answer, best first.
        row: Number of the row in its source, counted from 1, for messages; in JSON Lines that of its line.
    """

    prompt: str
    responses: tuple[str, ...]
    row: int


class TokenizedExample(NamedTuple):
    """The same as token ids.

    Attributes:
        prompt_ids: At least one token, since something must predict the first token of a response.
        response_ids: At least one token each; the end token included where the response has one.
        row: Number of the row in its source.
    """

    prompt_ids: list[int]
    response_ids: list[list[int]]
    row: int
