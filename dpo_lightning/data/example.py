"""The two stations between a row of a source and a batch, and the rows that do not get there."""

from __future__ import annotations

from typing import Any, NamedTuple

Message = dict[str, Any]  # {"role": ..., "content": ...}, and what else a chat template knows


class UnusableRow(Exception):
    """A row that holds no usable example.

    Args:
        reason: What it is counted under.
        detail: What is wrong with this one, what was expected and what to do.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        """Reason and detail."""
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class PreferenceExample(NamedTuple):
    """A prompt and its responses, best response first: all of them text, or all of them messages.

    Attributes:
        prompt: What the model is given. None where the responses are whole texts: then it is what they share at
            their beginning.
        responses: What the model might answer, best first. Of messages those of the assistant are scored.
        row: Number of the row in its source, counted from 1, for messages; in JSON Lines that of its line.
        tools: Tools that the chat template describes to the model.
        response: Number of its one response in the row, counted from 1, where those of a row are in no order; else 0.
    """

    prompt: str | list[Message] | None
    responses: tuple[str | list[Message], ...]
    row: int = 0
    tools: list[Any] | None = None
    response: int = 0


class TokenizedExample(NamedTuple):
    """The same as token ids.

    Attributes:
        prompt_ids: At least one token, since something must predict the first token of a response.
        response_ids: At least one token each; the end token included where the response has one.
        row: Number of the row in its source.
        scored: Which response tokens are the assistant's; None where all are.
        digest: A 64-bit number that changes with the tokens and with which of them are scored.
        response: Number of its one response in the row where those of a row are in no order; else 0.
    """

    prompt_ids: list[int]
    response_ids: list[list[int]]
    row: int
    scored: list[list[bool]] | None = None
    digest: int | None = None
    response: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens in the stream."""
        return len(self.prompt_ids) + sum(map(len, self.response_ids))
