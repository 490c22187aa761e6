"""Formats of rows for SFT: one response, or none but text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dpo_lightning.data.cells import as_messages, as_text, cell, is_messages, optional_text, text, tools_in, wrong_type
from dpo_lightning.data.dialogue import turns
from dpo_lightning.data.example import PreferenceExample
from dpo_lightning.data.formats import Asked, Format
from dpo_lightning.data.sources import Row


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
        return [PreferenceExample(optional_text(row, self.prompt), (text(row, self.text),))]


@dataclass(frozen=True, kw_only=True)
class Messages(Format):
    """Dialogues as lists of messages.

    Args:
        messages: Column of the messages.
        turns: Learn all of the assistant's answers, or the last alone.
        tools: Column of tools, for the chat template.
    """

    messages: str = "messages"
    turns: Literal["all", "last"] = "all"
    tools: str | None = None

    def columns(self) -> tuple[str, ...]:
        """Messages, and tools where they are named."""
        return (self.messages,) if self.tools is None else (self.messages, self.tools)

    def read(self, row: Row) -> list[PreferenceExample]:
        """One dialogue."""
        messages = as_messages(cell(row, self.messages), f"column {self.messages!r}")
        return [turns(messages, every=self.turns == "all", tools=tools_in(row, self.tools))]


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
        completion = cell(row, self.completion)
        if not isinstance(completion, str) and not is_messages(completion):
            raise wrong_type(f"column {self.completion!r}", "text or messages", completion)
        return [self.example(row, [completion])]


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
        return [self.example(row, [[{"role": "assistant", "content": item}] for item in texts])]
