"""Ratings of one rater, from files of verdicts and from preference data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple, TypeGuard

from dpo_lightning.data.auto import ALIASES, NUM_ROWS, choose
from dpo_lightning.data.example import PreferenceExample, UnusableRow
from dpo_lightning.data.files import Files
from dpo_lightning.data.formats import Format
from dpo_lightning.data.rankings import TIES, Comparisons, said
from dpo_lightning.data.sources import Row
from dpo_lightning.errors import UsageError

KINDS = ("texts", "prompt", "row")  # what comparisons are known by, the surest first
TEXTS = {"first", "second"}
OF_DATA = {"chosen", "rejected", "responses", *ALIASES["first"]}  # columns that labels have, even with a verdict beside


class Rating(NamedTuple):
    """What a rater says of a comparison.

    Attributes:
        names: What it is known by, by kind; texts of two responses stand in one order, whichever came first.
        prompt: What tells its prompt from others.
        value: 1 where the first response is better as it stands in the file, 0 where the second is, one half for a
            tie, between for a leaning; None where nothing is known. Of pairs the chosen one is the first.
        by_text: The same, of the response that comes first in the order of texts; None without texts.
    """

    names: dict[str, str]
    prompt: str
    value: float | None
    by_text: float | None

    def known_by(self, kind: str) -> float | None:
        """What is said of the response that is first for all raters whose comparisons are known by such names."""
        return self.by_text if kind == "texts" else self.value


def read_ratings(path: str) -> list[Rating]:
    """Ratings of a file: JSON Lines with a verdict, or preference data, whose labels are a rater's.

    Args:
        path: Lines of {"verdict": 0 to 1 or null} with "first" and "second", "prompt" or "row"; or data of pairs or of
            comparisons with a label, as data modules read them, where a column verdict says how sure a label is.

    Raises:
        UsageError: If it is neither.
    """
    rows = list(Files(path).numbered())
    if not rows:
        raise UsageError(f"{path} holds no verdicts.")
    if _is_line(rows[0][1]):
        return [_of_line(row, f"{path}, row {number}", number) for number, row in rows]
    shape = choose([row for _, row in islice(rows, NUM_ROWS)], path)
    return [rating for number, row in rows for rating in _of_data(shape, row, number)]


def by_name(ratings: list[Rating], kind: str, path: str) -> dict[str, Rating]:
    """Ratings by what their comparisons are known by.

    Raises:
        UsageError: If a comparison without texts has two.
    """
    found: dict[str, Rating] = {}
    for rating in ratings:
        name = rating.names[kind]
        if name in found and kind != "texts":
            raise UsageError(
                f"{path} has two verdicts of the {kind} {name[:80]}, and no texts to tell the comparisons apart: give "
                'each line "first" and "second" too.'
            )
        found.setdefault(name, rating)  # texts that were drawn twice count once
    return found


def prompt_name(prompt: Any) -> str:
    """The text of a prompt; of messages the user's words, where they are all there is."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], Mapping):
        prompt = prompt[0].get("content", prompt)
    return prompt.strip() if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False)


def _is_line(row: Any) -> bool:
    """Whether a row is a verdict, and no label with one beside it."""
    return isinstance(row, Mapping) and "verdict" in row and (row.keys() >= TEXTS or not row.keys() & OF_DATA)


def _of_line(row: Any, where: str, number: int) -> Rating:
    found: object = row.get("verdict", "missing") if isinstance(row, Mapping) else "missing"
    value = found if _is_share(found) else None
    if value is None and found is not None:
        raise UsageError(
            f"{where}: 'verdict' must be 1, 0, 0.5 for a tie, a number between for a leaning, or null, got {found!r}."
        )
    first, second = (row.get(name) for name in ("first", "second"))
    prompt = row.get("prompt")
    names = {"row": str(row["row"])} if "row" in row else {}
    if prompt is not None:
        names["prompt"] = prompt_name(prompt)
    by_text = None
    if isinstance(first, str) and isinstance(second, str):
        names["texts"], by_text = _ordered(prompt, first, second, value)
    if not names:
        raise UsageError(f'{where}: a verdict needs "first" and "second", "prompt" or "row", to be known by.')
    return Rating(names, names.get("prompt", str(row.get("row", number))), value, by_text)


def _of_data(shape: Format, row: Row, number: int) -> Iterator[Rating]:
    sure: object = row.get("verdict") if isinstance(row, Mapping) else None
    value: float = max(sure, 1 - sure) if _is_share(sure) else 1.0
    try:
        examples = shape.read(row)
    except UnusableRow as reason:
        if reason.reason != TIES or not isinstance(shape, Comparisons):
            return
        value, examples = 0.5, shape.read({**row, shape.label: shape.labels[0]})
    turned = isinstance(shape, Comparisons) and said(row[shape.label]) == str(shape.labels[1])
    for example in examples:
        if isinstance(example, PreferenceExample) and len(example.responses) == 2:
            better, worse = (_text(response) for response in example.responses)
            name, by_text = _ordered(example.prompt, better, worse, value)
            prompt = prompt_name(example.prompt)
            names = {"texts": name, "prompt": prompt, "row": str(number)}
            yield Rating(names, prompt, 1 - value if turned else value, by_text)


def _ordered(prompt: Any, first: str, second: str, value: float | None) -> tuple[str, float | None]:
    """A name of a comparison that does not depend on which response is first, and the verdict in that order."""
    texts = [first.strip(), second.strip()]
    swapped = texts[0] > texts[1]
    name = json.dumps([prompt_name(prompt), *sorted(texts)], ensure_ascii=False)
    return name, value if value is None or not swapped else 1 - value


def _is_share(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _text(response: Any) -> str:
    return response if isinstance(response, str) else str(response[-1]["content"])
