"""What the columns of a row mean. A format turns a row into examples or says why it cannot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpo_lightning.data.cells import as_messages, cell, is_messages, optional_text, text, tools_in, wrong_type
from dpo_lightning.data.dialogue import DIFFER_EARLIER, NOTHING_SHARED, answered, shared, word_ends
from dpo_lightning.data.example import PreferenceExample, UnusableRow
from dpo_lightning.data.sources import Row
from dpo_lightning.errors import UsageError


class Format(ABC):
    """How rows of one shape are read."""

    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Columns that it reads, all of which every row must have."""

    @abstractmethod
    def read(self, row: Row) -> Sequence[PreferenceExample | UnusableRow]:
        """The examples of a row; where it holds several, a reason in place of each that cannot be used.

        Raises:
            UnusableRow: If the row holds none.
        """

    def __str__(self) -> str:
        """Its name and the columns that it reads."""
        return f"{type(self).__name__} ({', '.join(self.columns())})"


@dataclass(frozen=True, kw_only=True)
class Asked(Format):
    """A format whose prompts have a column of their own.

    Args:
        prompt: Column of the prompt, as text or messages.
        context: Column of text that follows the prompt after a blank line, where it is not empty.
        system: Column of a system message.
        tools: Column of tools, for the chat template.
    """

    prompt: str = "prompt"
    context: str | None = None
    system: str | None = None
    tools: str | None = None

    @abstractmethod
    def answers(self) -> tuple[str, ...]:
        """Columns of the responses."""

    def columns(self) -> tuple[str, ...]:
        """Those of the prompt and those of the responses."""
        asked = (self.prompt, self.context, self.system, self.tools)
        return (*(column for column in asked if column is not None), *self.answers())

    def example(self, row: Row, responses: Sequence[Any]) -> PreferenceExample:
        """The row's prompt with some responses."""
        prompt = cell(row, self.prompt)
        if not isinstance(prompt, str) and not is_messages(prompt):
            raise wrong_type(f"column {self.prompt!r}", "text or messages", prompt)
        context = optional_text(row, self.context)
        if context.strip():
            if not isinstance(prompt, str):
                raise wrong_type(f"column {self.prompt!r}", "text, since a context is to follow it", prompt)
            prompt = f"{prompt}\n\n{context}"
        return answered(prompt, responses, optional_text(row, self.system), tools_in(row, self.tools))


@dataclass(frozen=True, kw_only=True)
class Pairs(Asked):
    """Prompt, chosen and rejected response, each as text or as messages.

    The model reads a prompt and a response that are text joined as they are. Where one is a list of messages, text
    means the user's or the assistant's message, and chosen and rejected may repeat the prompt.

    Args:
        chosen: Column of the better response.
        rejected: Column of the worse response.
        repeated: Whether texts of chosen and rejected begin with the prompt once more; it is taken off.
    """

    chosen: str = "chosen"
    rejected: str = "rejected"
    repeated: bool = False

    def answers(self) -> tuple[str, ...]:
        """Chosen, rejected."""
        return self.chosen, self.rejected

    def read(self, row: Row) -> list[PreferenceExample]:
        """One pair."""
        sides = [cell(row, column) for column in self.answers()]
        for column, side in zip(self.answers(), sides, strict=True):
            if not isinstance(side, str) and not is_messages(side):
                raise wrong_type(f"column {column!r}", "text or messages", side)
        if self.repeated:
            prompt = text(row, self.prompt)
            if not all(isinstance(side, str) and side.startswith(prompt) for side in sides):
                raise UnusableRow("the responses do not begin with the prompt", "`repeated` says that they do.")
            sides = [side[len(prompt) :] for side in sides]
        return [self.example(row, sides)]


@dataclass(frozen=True, kw_only=True)
class ShareGPT(Pairs):
    """Dialogues of ``{"from": ..., "value": ...}`` with a chosen and a rejected answer.

    Args:
        prompt: Column of the dialogue.
    """

    prompt: str = "conversations"


@dataclass(frozen=True, kw_only=True)
class Transcripts(Format):
    r"""Chosen and rejected as whole dialogues that share all but the last answer, as in Anthropic's HH-RLHF.

    Args:
        chosen: Column of the better dialogue.
        rejected: Column of the worse dialogue.
        answer: What an answer begins with; the prompt ends behind the last one.
    """

    chosen: str = "chosen"
    rejected: str = "rejected"
    answer: str = "\n\nAssistant:"

    def __post_init__(self) -> None:
        if not self.answer:
            raise UsageError("`answer` must not be empty; where prompts have a column of their own use Pairs.")

    def columns(self) -> tuple[str, ...]:
        """Chosen, rejected."""
        return self.chosen, self.rejected

    def read(self, row: Row) -> list[PreferenceExample]:
        """Prompt and the two last answers."""
        (prompt, chosen), (other, rejected) = (self._split(text(row, name)) for name in self.columns())
        if prompt != other:
            raise UnusableRow(DIFFER_EARLIER)
        return [PreferenceExample(prompt, (chosen, rejected))]

    def _split(self, dialogue: str) -> tuple[str, str]:
        head, mark, answer = dialogue.rpartition(self.answer)
        if not mark:
            raise UnusableRow(f"no {self.answer!r} in the dialogue")
        return head + mark, answer


@dataclass(frozen=True, kw_only=True)
class SharedPrompts(Format):
    """Chosen and rejected with the prompt inside both: it is what they share at their beginning.

    Messages are split at the first that differs, texts at the last place before the first difference where a word
    and a token end.

    Args:
        chosen: Column of the better dialogue.
        rejected: Column of the worse dialogue.
        tools: Column of tools, for the chat template.
    """

    chosen: str = "chosen"
    rejected: str = "rejected"
    tools: str | None = None

    def columns(self) -> tuple[str, ...]:
        """Chosen, rejected, and tools where they are named."""
        return (self.chosen, self.rejected, *([] if self.tools is None else [self.tools]))

    def read(self, row: Row) -> list[PreferenceExample]:
        """One pair."""
        sides = [cell(row, column) for column in (self.chosen, self.rejected)]
        if all(isinstance(side, str) for side in sides):
            texts = (text(row, self.chosen), text(row, self.rejected))
            if not any(texts[0][:place].strip() for place in word_ends(texts)):
                raise UnusableRow(NOTHING_SHARED)
            return [PreferenceExample(None, texts)]
        messages = [as_messages(cell(row, column), f"column {column!r}") for column in (self.chosen, self.rejected)]
        return [shared(messages, tools_in(row, self.tools))]
