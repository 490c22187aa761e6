"""Formats of rows that rank or compare responses, and of rows that are tables."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from dpo_lightning.data.cells import cell, wrong_type
from dpo_lightning.data.example import PreferenceExample, UnusableRow
from dpo_lightning.data.formats import Asked, Format
from dpo_lightning.data.sources import Row
from dpo_lightning.errors import UsageError

TIES = "all responses tie"
TIED = ("tie", "tie (bothbad)", "both", "neither", "equal")


def said(label: object) -> str:
    """A label as text: CSV knows nothing else, and 1.0 is what a column of numbers with gaps makes of 1."""
    return str(label).strip().removesuffix(".0") if isinstance(label, (str, int, float)) else ""


@dataclass(frozen=True, kw_only=True)
class Rankings(Asked):
    """A prompt and a list of responses, best first or with scores.

    Args:
        responses: Column of the list.
        scores: Column of the scores, one a response, higher is better; without them the list is best first.
        ties: Of responses with equal scores drop all but the first, or keep them apart, in examples of their own.
        reduce: Make pairs of a ranking: its best and its worst, or every better one with every worse one.
    """

    responses: str = "responses"
    scores: str | None = None
    ties: Literal["drop", "apart"] = "drop"
    reduce: Literal["best_worst", "all_pairs"] | None = None

    def __post_init__(self) -> None:
        if self.ties not in ("drop", "apart"):
            raise UsageError(f"`ties` must be drop or apart, got {self.ties!r}.")
        if self.reduce not in (None, "best_worst", "all_pairs"):
            raise UsageError(f"`reduce` must be best_worst or all_pairs, or be left out, got {self.reduce!r}.")

    def answers(self) -> tuple[str, ...]:
        """Responses, and scores where they are named."""
        return (self.responses,) if self.scores is None else (self.responses, self.scores)

    def read(self, row: Row) -> list[PreferenceExample]:
        """One ranking, or the pairs that are made of it."""
        responses, where = cell(row, self.responses), f"column {self.responses!r}"
        if not isinstance(responses, list):
            raise wrong_type(where, "a list of responses", responses)
        if len(responses) < 2:
            raise UnusableRow("fewer than two responses", f"{where} has {len(responses)}; a ranking needs two or more.")
        groups = self._groups(row, responses)
        if len(groups) < 2:
            raise UnusableRow(TIES, f"column {self.scores!r} gives all {len(responses)} the same score.")
        if self.ties == "drop":
            groups = [group[:1] for group in groups]
        if self.reduce == "all_pairs":
            chosen = [[best, worst] for better, worse in combinations(groups, 2) for best in better for worst in worse]
        else:
            ends = groups if self.reduce is None else [groups[0], groups[-1]]
            # Every response stands in at least one example, and no example holds two that tie.
            chosen = [[group[turn % len(group)] for group in ends] for turn in range(max(map(len, ends)))]
        names = [f"{where}, response {number}" for number in range(1, len(responses) + 1)]
        return [
            self.example(row, [responses[place] for place in places], [names[place] for place in places])
            for places in chosen
        ]

    def _groups(self, row: Row, responses: list[Any]) -> list[list[int]]:
        """Places of the responses, best first, those that tie together."""
        if self.scores is None:
            return [[place] for place in range(len(responses))]
        scores, where = cell(row, self.scores), f"column {self.scores!r}"
        if not isinstance(scores, list) or len(scores) != len(responses):
            raise wrong_type(where, f"a list of {len(responses)} scores, one a response", scores)
        for score in scores:
            # An int is finite, and may be larger than any float.
            if type(score) is not int and not (isinstance(score, float) and math.isfinite(score)):
                raise wrong_type(where, "a list of finite numbers", score)
        levels = sorted(set(scores), reverse=True)
        return [[place for place, score in enumerate(scores) if score == level] for level in levels]


@dataclass(frozen=True, kw_only=True)
class Comparisons(Asked):
    """A prompt, two responses, and a label that says which of them is better.

    Args:
        first: Column of the first response.
        second: Column of the second response.
        label: Column of the label.
        labels: What the label says where the first is better, and where the second is.
    """

    first: str = "output_1"
    second: str = "output_2"
    label: str = "label"
    labels: tuple[int | str, int | str] = (1, 2)

    def __post_init__(self) -> None:
        if str(self.labels[0]) == str(self.labels[1]):
            raise UsageError(f"`labels` must be two different ones, got {list(self.labels)}.")

    def answers(self) -> tuple[str, ...]:
        """First, second, label."""
        return self.first, self.second, self.label

    def read(self, row: Row) -> list[PreferenceExample]:
        """One pair."""
        label = cell(row, self.label)
        if said(label).lower() in TIED:
            raise UnusableRow(TIES, f"column {self.label!r} says {label!r}.")
        if said(label) not in map(str, self.labels):
            raise wrong_type(f"column {self.label!r}", f"{self.labels[0]!r} or {self.labels[1]!r}", label)
        columns = [self.first, self.second] if said(label) == str(self.labels[0]) else [self.second, self.first]
        return [self.example(row, [cell(row, column) for column in columns], [f"column {name!r}" for name in columns])]


@dataclass(frozen=True, kw_only=True)
class Columns(Format):
    """Parallel lists: a row is a table of its own, each column the list of its values.

    Args:
        rows: What the columns of that table mean.
    """

    rows: Format

    def columns(self) -> tuple[str, ...]:
        """Those of the table."""
        return self.rows.columns()

    def ordered(self) -> bool:
        """As the table."""
        return self.rows.ordered()

    def read(self, row: Row) -> list[PreferenceExample | UnusableRow]:
        """The examples of all rows of the table."""
        table = {column: cell(row, column) for column in self.columns()}
        for column, values in table.items():
            if not isinstance(values, list):
                raise wrong_type(f"column {column!r}", "a list, one value a row", values)
        lengths = {column: len(values) for column, values in table.items()}
        if len(set(lengths.values())) > 1 or not max(lengths.values()):
            raise UnusableRow("lists of different or no length", f"there are {lengths}; each needs one value a row.")
        examples: list[PreferenceExample | UnusableRow] = []
        for values in zip(*table.values(), strict=True):
            try:
                examples += self.rows.read(dict(zip(table, values, strict=True)))
            except UnusableRow as reason:
                examples.append(reason)
        return examples

    def __str__(self) -> str:
        """The inner format."""
        return f"Columns of {self.rows}"
