"""Verdicts of one rater, from files of verdicts and from preference data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

from dpo_lightning.data.auto import NUM_ROWS, choose
from dpo_lightning.data.example import PreferenceExample, UnusableRow
from dpo_lightning.data.files import Files
from dpo_lightning.data.formats import Format
from dpo_lightning.data.rankings import TIES, Comparisons
from dpo_lightning.data.sources import Row
from dpo_lightning.errors import UsageError

KINDS = ("texts", "prompt", "row")  # what comparisons are known by, the surest first


class Verdict(NamedTuple):
    """What a rater says of a comparison.

    Attributes:
        names: What it is known by, by kind; texts of two responses stand in one order, whichever came first.
        prompt: What tells its prompt from others.
        value: 1 where the response that comes first in the order of texts is better, 0 where the other is, one half
            for a tie, None where nothing is known. Without texts: that the first is better, as it stands in the file.
    """

    names: dict[str, str]
    prompt: str
    value: float | None


def read_verdicts(path: str) -> list[Verdict]:
    """Verdicts of a file: JSON Lines with a verdict, or preference data, whose labels are a rater's.

    Args:
        path: Lines of {"verdict": 1, 0, 0.5 or null} with "first" and "second", "prompt" or "row"; or data of pairs
            or of comparisons with a label, as data modules read them.

    Raises:
        UsageError: If it is neither, or a comparison has two verdicts.
    """
    rows = list(Files(path).numbered())
    if not rows:
        raise UsageError(f"{path} holds no verdicts.")
    if isinstance(rows[0][1], Mapping) and "verdict" in rows[0][1]:
        return [_of_line(row, f"{path}, row {number}", number) for number, row in rows]
    shape = choose([row for _, row in islice(rows, NUM_ROWS)], path)
    return [verdict for number, row in rows for verdict in _of_data(shape, row, number)]


def by_name(verdicts: list[Verdict], kind: str, path: str) -> dict[str, Verdict]:
    """Verdicts by what their comparisons are known by.

    Raises:
        UsageError: If a comparison without texts has two.
    """
    found: dict[str, Verdict] = {}
    for verdict in verdicts:
        name = verdict.names[kind]
        if name in found and kind != "texts":
            raise UsageError(
                f"{path} has two verdicts of the {kind} {name[:80]}, and no texts to tell the comparisons apart: give "
                'each line "first" and "second" too.'
            )
        found.setdefault(name, verdict)  # texts that were drawn twice count once
    return found


def _of_line(row: Any, where: str, number: int) -> Verdict:
    value = row.get("verdict", "missing") if isinstance(row, Mapping) else "missing"
    if isinstance(value, bool) or value not in (1, 0, 0.5, None):
        raise UsageError(f"{where}: 'verdict' must be 1, 0, 0.5 for a tie, or null, got {value!r}.")
    texts = (row.get("first"), row.get("second"))
    prompt = row.get("prompt")
    names = {"row": str(row["row"])} if "row" in row else {}
    if prompt is not None:
        names["prompt"] = _prompt_name(prompt)
    if all(isinstance(text, str) for text in texts):
        names["texts"], value = _ordered(prompt, *texts, value)
    if not names:
        raise UsageError(f'{where}: a verdict needs "first" and "second", "prompt" or "row", to be known by.')
    return Verdict(names, names.get("prompt", str(row.get("row", number))), value)


def _of_data(shape: Format, row: Row, number: int) -> Iterator[Verdict]:
    value = 1.0
    try:
        examples = shape.read(row)
    except UnusableRow as reason:
        if reason.reason != TIES or not isinstance(shape, Comparisons):
            return
        value, examples = 0.5, shape.read({**row, shape.label: shape.labels[0]})
    for example in examples:
        if isinstance(example, PreferenceExample) and len(example.responses) == 2:
            first, second = (_text(response) for response in example.responses)
            name, ordered = _ordered(example.prompt, first, second, value)
            prompt = _prompt_name(example.prompt)
            yield Verdict({"texts": name, "prompt": prompt, "row": str(number)}, prompt, ordered)


def _ordered(prompt: Any, first: str, second: str, value: float | None) -> tuple[str, float | None]:
    """A name of a comparison that does not depend on which response is first, and the verdict in that order."""
    texts = [first.strip(), second.strip()]
    swapped = texts[0] > texts[1]
    name = json.dumps([_prompt_name(prompt), *sorted(texts)], ensure_ascii=False)
    return name, value if value is None or not swapped else 1 - value


def _prompt_name(prompt: Any) -> str:
    """The text of a prompt; of messages the user's words, where they are all there is."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], Mapping):
        prompt = prompt[0].get("content", prompt)
    return prompt.strip() if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False)


def _text(response: Any) -> str:
    return response if isinstance(response, str) else str(response[-1]["content"])
