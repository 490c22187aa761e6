"""Files of samples: what a model wrote to each prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpo_lightning.data.cells import is_messages
from dpo_lightning.data.files import Files
from dpo_lightning.errors import UsageError
from dpo_lightning.generation.sampling import Continuation
from dpo_lightning.scorers import Prompt


class Samples(NamedTuple):
    """The completions of a prompt at a temperature.

    Attributes:
        row: Number of the prompt's row in its file, counted from 1; in JSON Lines that of its line.
        prompt: Text or messages.
        temperature: The temperature.
        responses: K texts.
        tokens: Tokens of each, its end token included.
        finished: Whether each came to its end token or to a stop string.
    """

    row: int
    prompt: Prompt
    temperature: float
    responses: list[str]
    tokens: list[int]
    finished: list[bool]


def samples_of(row: int, prompt: Prompt, temperature: float, continuations: Sequence[Continuation]) -> dict[str, Any]:
    """A row of a file of samples."""
    return Samples(
        row,
        prompt,
        temperature,
        [continuation.text for continuation in continuations],
        [len(continuation.ids) for continuation in continuations],
        [continuation.finished for continuation in continuations],
    )._asdict()


def read_samples(path: str) -> list[Samples]:
    """The rows of a file of samples.

    Raises:
        UsageError: If it is none.
    """
    found = [_samples(row, f"{path}, row {number}") for number, row in Files(path).numbered()]
    if not found:
        raise UsageError(f"{path} holds no samples; `dpo-lightning sample` writes such files.")
    return found


def _samples(row: Any, where: str) -> Samples:
    missing = [name for name in Samples._fields if not isinstance(row, Mapping) or name not in row]
    if missing:
        raise UsageError(
            f"{where} has no {missing[0]!r}: a row of samples has {', '.join(Samples._fields)}, as "
            "`dpo-lightning sample` writes them."
        )
    found = Samples(**{name: row[name] for name in Samples._fields})
    expected: dict[str, tuple[str, bool]] = {
        "row": ("a whole number", _is_number(found.row, int)),
        "prompt": ("text or messages", isinstance(found.prompt, str) or is_messages(found.prompt)),
        "temperature": ("a number", _is_number(found.temperature, (int, float))),
        "responses": ("one text or more", _are(found.responses, str) and bool(found.responses)),
        "tokens": ("a whole number for each response", _are(found.tokens, int)),
        "finished": ("true or false for each response", _are(found.finished, bool)),
    }
    for name, (words, right) in expected.items():
        value = getattr(found, name)
        if not right or (name in ("tokens", "finished") and len(value) != len(found.responses)):
            raise UsageError(f"{where}: {name!r} must be {words}, got {value!r:.80}. Mend the row.")
    return found


def _is_number(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)
