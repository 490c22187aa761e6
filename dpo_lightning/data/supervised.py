"""Formats of rows for SFT: one response, or none but text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dpo_lightning.data.cells import as_messages, as_text, cell, optional_text, text, tools_in, wrong_type
from dpo_lightning.data.dialogue import Setting, turns
from dpo_lightning.data.example import PreferenceExample
from dpo_lightning.data.formats import Asked, Format
from dpo_lightning.data.sources import Row
from dpo_lightning.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Texts(Format):
    """Plain text to learn as it is.

    Args:
        text: Column of the text.
        prompt: Column of a beginning that is given and not learned, if any.
    """

    text: str = "text"
    prompt: str | None = None

    def columns(self) -> tuple[str, ...]:
        """Text, and prompt where it is named."""
        return (self.text,) if self.prompt is None else (self.prompt, self.text)

    def read(self, row: Row) -> list[PreferenceExample]:
        """One response, its prompt empty unless a column is named."""
        return [PreferenceExample("" if self.prompt is None else text(row, self.prompt), (text(row, self.text),))]


@dataclass(frozen=True, kw_only=True)
class Messages(Format):
    """Dialogues as lists of messages.

    Args:
        messages: Column of the messages.
        turns: Learn all of the assistant's answers, or the last alone.
        system: Column of a system message.
        tools: Column of tools, for the chat template.
    """

    messages: str = "messages"
    turns: Literal["all", "last"] = "all"
    system: str | None = None
    tools: str | None = None

    def __post_init__(self) -> None:
        if self.turns not in ("all", "last"):
            raise UsageError(f"`turns` must be all or last, got {self.turns!r}.")

    def columns(self) -> tuple[str, ...]:
        """Messages, and system and tools where they are named."""
        return (self.messages, *(column for column in (self.system, self.tools) if column is not None))

    def read(self, row: Row) -> list[PreferenceExample]:
        """One dialogue."""
        messages = as_messages(cell(row, self.messages), f"column {self.messages!r}")
        setting = Setting(optional_text(row, self.system), tools=tools_in(row, self.tools))
        return [turns(messages, self.turns == "all", setting)]


@dataclass(frozen=True, kw_only=True)
class Completions(Asked):
    """A prompt and its completion, each as text or as messages.

    Args:
        completion: Column of the completion.
    """

    completion: str = "completion"

    def answers(self) -> tuple[str, ...]:
        """Completion."""
        return (self.completion,)

    def read(self, row: Row) -> list[PreferenceExample]:
        """One response."""
        return [self.example(row, [cell(row, self.completion)], [f"column {self.completion!r}"])]


@dataclass(frozen=True, kw_only=True)
class Alpaca(Asked):
    """An instruction, an input to it that may be empty, and an output, or a list of outputs, best first.

    They are a user's and an assistant's message, so they need a chat template; for models without one there is
    package:data/templates/alpaca.jinja.

    Args:
        prompt: Column of the instruction.
        context: Column of the input.
        output: Column of the output.
    """

    prompt: str = "instruction"
    context: str | None = "input"
    output: str = "output"

    def answers(self) -> tuple[str, ...]:
        """Output."""
        return (self.output,)

    def read(self, row: Row) -> list[PreferenceExample]:
        """One response, or a ranking."""
        output, where = cell(row, self.output), f"column {self.output!r}"
        if not isinstance(output, (str, list)) or output == []:
            raise wrong_type(where, "text, or a list of texts, best first", output)
        texts = [as_text(item, where) for item in ([output] if isinstance(output, str) else output)]
        names = [where if isinstance(output, str) else f"{where}, text {number}" for number in range(1, len(texts) + 1)]
        return [self.example(row, [{"role": "assistant", "content": item} for item in texts], names)]
