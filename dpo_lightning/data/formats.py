"""What the columns of a row mean. A format turns a row into examples or says why it cannot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_lightning.data.cells import as_messages, cell, is_messages, optional_text, text, tools_in, turns_in, wrong_type
from dpo_lightning.data.dialogue import DIFFER_EARLIER, NOTHING_SHARED, Setting, answered, shared, word_ends
from dpo_lightning.data.example import PreferenceExample, UnusableRow
from dpo_lightning.data.sources import Row
from dpo_lightning.errors import UsageError


class Format(ABC):
    """How rows of one shape are read."""

    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Columns that it reads; a source has all of them, or has another shape."""

    @abstractmethod
    def read(self, row: Row) -> Sequence[PreferenceExample | UnusableRow]:
        """The examples of a row; where it holds several, a reason in place of each that cannot be used.

        Raises:
            UnusableRow: If the row holds none.
        """

    def ordered(self) -> bool:
        """Whether the responses of an example are best first, or one to be learnt: what can only be scored is not."""
        return True

    def __str__(self) -> str:
        """Its name and the columns that it reads."""
        return f"{type(self).__name__} ({', '.join(self.columns())})"


@dataclass(frozen=True, kw_only=True)
class Asked(Format):
    """A format whose prompts have a column of their own.

    Where a system message, history or tools have a column, prompts and responses become messages in all rows.

    Args:
        prompt: Column of the prompt, as text or messages.
        context: Column of text that follows the prompt after a blank line, where it is not empty.
        system: Column of a system message.
        history: Column of earlier turns, each [question, answer], or as messages.
        tools: Column of tools, for the chat template.
    """

    prompt: str = "prompt"
    context: str | None = None
    system: str | None = None
    history: str | None = None
    tools: str | None = None

    @abstractmethod
    def answers(self) -> tuple[str, ...]:
        """Columns of the responses."""

    def columns(self) -> tuple[str, ...]:
        """Those of the prompt and those of the responses."""
        asked = (self.prompt, self.context, self.system, self.history, self.tools)
        return (*(column for column in asked if column is not None), *self.answers())

    def example(self, row: Row, responses: Sequence[object], names: Sequence[str]) -> PreferenceExample:
        """The row's prompt with some responses, and what messages call those."""
        where, prompt = f"column {self.prompt!r}", cell(row, self.prompt)
        context = optional_text(row, self.context)
        if context.strip():
            if not isinstance(prompt, str):
                raise wrong_type(where, "text, since a context is to follow it", prompt)
            prompt = "\n\n".join(part for part in (prompt, context) if part.strip())
        return answered(prompt, responses, (where, *names), self._setting(row))

    def _setting(self, row: Row) -> Setting | None:
        if self.system is None and self.history is None and self.tools is None:
            return None
        return Setting(optional_text(row, self.system), turns_in(row, self.history), tools_in(row, self.tools))


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
        sides, prompt = [cell(row, column) for column in self.answers()], cell(row, self.prompt)
        if self.repeated and isinstance(prompt, str):
            wholes = [text(row, column) for column in self.answers()]
            if not all(whole.startswith(prompt) for whole in wholes):
                raise UnusableRow(
                    "the responses do not begin with the prompt",
                    f"`repeated` says that columns {self.chosen!r} and {self.rejected!r} begin with {self.prompt!r}.",
                )
            sides = [whole[len(prompt) :] for whole in wholes]
        return [self.example(row, sides, [f"column {column!r}" for column in self.answers()])]


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
        (prompt, chosen), (other, rejected) = (self._split(row, name) for name in self.columns())
        if prompt != other:
            raise UnusableRow(DIFFER_EARLIER, f"up to the last {self.answer!r} both must be the same.")
        return [PreferenceExample(prompt, (chosen, rejected))]

    def _split(self, row: Row, column: str) -> tuple[str, str]:
        head, mark, answer = text(row, column).rpartition(self.answer)
        if not mark:
            raise UnusableRow(f"no {self.answer!r} in the dialogue", f"column {column!r} has none; see `answer`.")
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
        sides, tools = [cell(row, column) for column in (self.chosen, self.rejected)], tools_in(row, self.tools)
        places = [f"column {column!r}" for column in (self.chosen, self.rejected)]
        for place, side in zip(places, sides, strict=True):
            if not isinstance(side, str) and not is_messages(side):
                raise wrong_type(place, "text or messages", side)
        if all(isinstance(side, str) for side in sides):
            if tools:
                raise wrong_type(places[0], "messages, since there are tools", sides[0])
            texts = (text(row, self.chosen), text(row, self.rejected))
            if not any(texts[0][:place].strip() for place in word_ends(texts)):
                raise UnusableRow(
                    NOTHING_SHARED, "both must begin with the prompt; where it has a column of its own use Pairs."
                )
            return [PreferenceExample(None, texts)]
        messages = [(place, as_messages(side, place)) for place, side in zip(places, sides, strict=True)]
        return [shared(messages, tools)]
