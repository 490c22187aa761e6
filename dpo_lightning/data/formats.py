"""What the columns of a row mean. A format turns a row into an example or says why it cannot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from dpo_lightning.data.example import PreferenceExample
from dpo_lightning.data.sources import Row
from dpo_lightning.errors import UsageError


class UnusableRow(Exception):
    """A row that holds no usable example, though its columns are right; the text is the reason to count it under."""


class Format(ABC):
    """How rows of one shape are read."""

    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Columns that every row must have."""

    @abstractmethod
    def read(self, row: Row) -> tuple[str, list[str]]:
        """Prompt and responses, best first; may raise :class:`UnusableRow`."""

    def __call__(self, row: Row, number: int, source: str) -> PreferenceExample:
        """The example of a row.

        Args:
            row: The row.
            number: Its number in the source, for messages.
            source: What messages call its source.

        Raises:
            UsageError: If a column is missing or does not hold what it should.
            UnusableRow: If the row is well-formed but holds no example.
        """
        if not isinstance(row, Mapping):
            raise UsageError(
                f"{source}, row {number}: expected an object with named columns, got {type(row).__name__}; write each "
                'row like {"prompt": ...}.'
            )
        for column in self.columns():
            if column not in row:
                argument = next((name for name, value in vars(self).items() if value == column), column)
                raise UsageError(
                    f"{source}, row {number}: there is no column {column!r}; the row has {', '.join(map(repr, row))}. "
                    f"{type(self).__name__} reads {', '.join(map(repr, self.columns()))}; name your columns by "
                    "`data.init_args.format`, as in {class_path: "
                    f"{type(self).__name__}, init_args: {{{argument}: your_column}}}}."
                )
        try:
            prompt, responses = self.read(row)
        except TypeError as error:
            raise UsageError(
                f"{source}, row {number}: {error} Name another column by `data.init_args.format`, or change the row."
            ) from error
        return PreferenceExample(prompt, tuple(responses), number)


@dataclass(frozen=True, kw_only=True)
class Pairs(Format):
    """Prompt, chosen and rejected response as text; the model reads prompt and response joined as they are.

    Args:
        prompt: Column of the prompt.
        chosen: Column of the better response.
        rejected: Column of the worse response.
    """

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"

    def columns(self) -> tuple[str, ...]:
        """Prompt, chosen, rejected."""
        return self.prompt, self.chosen, self.rejected

    def read(self, row: Row) -> tuple[str, list[str]]:
        """The three texts."""
        return text(row, self.prompt), [text(row, self.chosen), text(row, self.rejected)]


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

    def read(self, row: Row) -> tuple[str, list[str]]:
        """Prompt and the two last answers."""
        (prompt, chosen), (other, rejected) = (self._split(text(row, name)) for name in self.columns())
        if prompt != other:
            raise UnusableRow("chosen and rejected differ before the last answer")
        return prompt, [chosen, rejected]

    def _split(self, dialogue: str) -> tuple[str, str]:
        head, mark, answer = dialogue.rpartition(self.answer)
        if not mark:
            raise UnusableRow(f"no {self.answer!r} in the dialogue")
        return head + mark, answer


@dataclass(frozen=True, kw_only=True)
class Rankings(Format):
    """A prompt and a list of responses, best first.

    Args:
        prompt: Column of the prompt.
        responses: Column of the list.
    """

    prompt: str = "prompt"
    responses: str = "responses"

    def columns(self) -> tuple[str, ...]:
        """Prompt, responses."""
        return self.prompt, self.responses

    def read(self, row: Row) -> tuple[str, list[str]]:
        """The prompt and its ranking."""
        responses = row[self.responses]
        if not isinstance(responses, (list, tuple)) or not all(isinstance(item, str) for item in responses):
            raise TypeError(f"column {self.responses!r} must be a list of texts, best first, got {responses!r:.80}.")
        if len(responses) < 2:
            raise UnusableRow("fewer than two responses")
        return text(row, self.prompt), [encodable(response) for response in responses]


@dataclass(frozen=True, kw_only=True)
class Texts(Format):
    """Plain text to learn as it is, for SFT.

    Args:
        text: Column of the text.
        prompt: Column of a beginning that is given and not learned, if any.
    """

    text: str = "text"
    prompt: str | None = None

    def columns(self) -> tuple[str, ...]:
        """Text, and prompt where it is named."""
        return (self.text,) if self.prompt is None else (self.prompt, self.text)

    def read(self, row: Row) -> tuple[str, list[str]]:
        """One response, its prompt empty unless a column is named."""
        return "" if self.prompt is None else text(row, self.prompt), [text(row, self.text)]


SHAPES: tuple[Format, ...] = (Pairs(), Rankings(), Transcripts(), Texts())


def infer(row: Row, number: int, source: str) -> Format:
    """The first known shape whose columns a row has.

    Raises:
        UsageError: If none has; names the columns found and the shapes known.
    """
    for shape in SHAPES:
        if isinstance(row, Mapping) and set(shape.columns()) <= set(row):
            return shape
    known = "; ".join(f"{type(shape).__name__}: {', '.join(shape.columns())}" for shape in SHAPES)
    found = ", ".join(map(repr, row)) if isinstance(row, Mapping) else type(row).__name__
    raise UsageError(
        f"{source}, row {number}: cannot tell what its columns mean. Found {found}; known are {known}. Name the "
        "columns by `data.init_args.format`, as in {class_path: Pairs, init_args: {prompt: question}}."
    )


def text(row: Row, column: str) -> str:
    """The text in a column; anything else is a TypeError that names it."""
    value = row[column]
    if not isinstance(value, str):
        raise TypeError(f"column {column!r} must be text, got {type(value).__name__}: {value!r:.80}.")
    return encodable(value)


def encodable(value: str) -> str:
    """A text that a tokenizer takes: JSON may hold halves of characters, which no encoding has."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UnusableRow("text with half a character (a lone surrogate)") from None
    return value
