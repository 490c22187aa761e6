"""Two sides of a comparison: responses to the same prompts, from files of samples or of data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpo_lightning.data.cells import is_messages
from dpo_lightning.data.files import Files, as_source
from dpo_lightning.data.sources import Source
from dpo_lightning.errors import UsageError
from dpo_lightning.generation.samples import Samples, read_samples
from dpo_lightning.scorers import Prompt

SHOWN = 80  # characters of a prompt in a message


class Side(NamedTuple):
    """Responses to a prompt.

    Attributes:
        row: Number of the prompt's row.
        prompt: Text or messages; None where the file has none.
        temperature: That of the samples; None of given responses.
        responses: Texts.
        tokens: Tokens of each, where they were counted.
    """

    row: int
    prompt: Prompt | None
    temperature: float | None
    responses: list[str]
    tokens: list[int] | None


class Matched(NamedTuple):
    """A response and the one that it is compared with.

    Attributes:
        row: Number of the prompt's row.
        sample: Which of the prompt's responses it is, counted from 1.
        temperature: That of the response, if it is a sample.
        prompt: What both answer.
        first: The response.
        second: The other.
        tokens: Tokens of both, where they were counted.
        best_of: Of how many of the prompt's samples it was chosen; None where none was.
    """

    row: int
    sample: int
    temperature: float | None
    prompt: Prompt
    first: str
    second: str
    tokens: tuple[int | None, int | None]
    best_of: int | None = None


class Unmatched(NamedTuple):
    """Numbers of responses to prompts that both sides answer, but one of them more often.

    Attributes:
        samples: Responses to judge that have no partner.
        against: Those of the other side.
    """

    samples: int
    against: int


Partners = tuple[Side, Side]  # responses to judge, and the other side's to the same prompt


def read_side(path: str | Source, column: str, prompt: str = "prompt", temperature: float | None = None) -> list[Side]:
    """Responses of a file.

    Args:
        path: A file of samples, or a file or source of data with one response a row.
        column: Column of the response in data.
        prompt: Column of the prompt in data. Without one, responses that begin with the prompt lose it when they are
            matched.
        temperature: Take the samples of this temperature alone.

    Raises:
        UsageError: If there are none.
    """
    if isinstance(path, str) and _is_of_samples(path):
        found = [_of_samples(samples) for samples in read_samples(path)]
        known = sorted({side.temperature for side in found if side.temperature is not None})
        if temperature is not None and temperature not in known:
            raise UsageError(f"{path} has no samples of temperature {temperature:g}, but of {_listed(known)}.")
        return [side for side in found if temperature is None or side.temperature == temperature]
    if temperature is not None:
        raise UsageError(f"{path} is no file of samples, so it has none of temperature {temperature:g}.")
    rows = as_source(path).numbered()
    return [_of_data(row, f"{path}, row {number}", number, column, prompt) for number, row in rows]


def partners(sides: Sequence[Side], others: Sequence[Side], against: str) -> list[Partners]:
    """Responses of both sides to each prompt.

    Args:
        sides: Responses to judge.
        others: What they are compared with, at one temperature.
        against: What messages call those.

    Raises:
        UsageError: If a prompt has no partner.
    """
    temperatures = sorted({side.temperature for side in others if side.temperature is not None})
    if len(temperatures) > 1:
        raise UsageError(
            f"{against} has samples of temperatures {_listed(temperatures)}; choose one by --against_temperature."
        )
    by_row = {side.row: side for side in others}
    by_prompt = {str(side.prompt): side for side in reversed(others) if side.prompt is not None}
    return [(side, _partner(side, by_row, by_prompt, against)) for side in sides]


def match(found: Sequence[Partners]) -> list[Matched]:
    """Each response with the other side's of the same prompt: the n-th with the n-th, or all with the only one.

    Args:
        found: Responses of both sides to each prompt.

    Raises:
        UsageError: If there is nothing to compare, or no two prompts have their names.
    """
    matched = [pair for side, other in found for pair in _pairs(side, other)]
    if not matched:
        raise UsageError("There is nothing to compare: the files hold no responses.")
    return matched


def unmatched(found: Sequence[Partners]) -> Unmatched:
    """How many responses :func:`match` leaves over.

    Args:
        found: Responses of both sides to each prompt.
    """
    counts = [(len(side.responses), len(other.responses)) for side, other in found]
    samples = sum(max(0, own - theirs) for own, theirs in counts if theirs != 1)
    return Unmatched(samples, sum(max(0, theirs - own) for own, theirs in counts))


def _partner(side: Side, by_row: Mapping[int, Side], by_prompt: Mapping[str, Side], against: str) -> Side:
    same_row = by_row.get(side.row)
    if side.prompt is None or (same_row is not None and same_row.prompt == side.prompt):
        found = same_row
    elif str(side.prompt) in by_prompt:
        found = by_prompt[str(side.prompt)]
    else:
        found = None if same_row is None or same_row.prompt is not None else same_row
    if found is None:
        raise UsageError(
            f"{against} has no response to prompt {side.row}, {str(side.prompt)[:SHOWN]!r}. Compare with a file of the "
            "same prompts."
        )
    return found


def _pairs(side: Side, other: Side) -> list[Matched]:
    prompt = side.prompt if side.prompt is not None else other.prompt
    if prompt is None:
        raise UsageError("Neither file has the prompts; name their column by --prompt_column.")
    pairs = []
    for index, response in enumerate(side.responses):
        place = 0 if len(other.responses) == 1 else index
        if place >= len(other.responses):
            break
        tokens = (_item(side.tokens, index), _item(other.tokens, place))
        texts = (_alone(response, side, prompt), _alone(other.responses[place], other, prompt))
        pairs.append(Matched(side.row, index + 1, side.temperature, prompt, *texts, tokens))
    return pairs


def _alone(response: str, side: Side, prompt: Prompt) -> str:
    """A response without the prompt, where a file has both in one text."""
    whole = side.prompt is None and isinstance(prompt, str)
    return response.removeprefix(prompt) if whole else response  # type: ignore[arg-type]


def _is_of_samples(path: str) -> bool:
    first = next((row for _, row in Files(path).numbered()), None)
    return isinstance(first, Mapping) and {"responses", "temperature", "tokens"} <= first.keys()


def _of_samples(samples: Samples) -> Side:
    return Side(samples.row, samples.prompt, samples.temperature, samples.responses, samples.tokens)


def _of_data(row: Any, where: str, number: int, column: str, prompt: str) -> Side:
    value = row.get(column) if isinstance(row, Mapping) else None
    response = value[-1]["content"] if is_messages(value) and value else value
    if not isinstance(response, str):
        has = ", ".join(map(repr, row)) if isinstance(row, Mapping) else repr(row)[:SHOWN]
        raise UsageError(
            f"{where}: column {column!r} must hold a response, text or messages, got {value!r:.80}; the row has {has}. "
            "Name another column by --column."
        )
    return Side(number, row.get(prompt), None, [response], None)


def _item(items: list[int] | None, index: int) -> int | None:
    return None if items is None else items[index]


def _listed(values: Sequence[float | None]) -> str:
    return ", ".join(f"{value:g}" for value in values if value is not None)
