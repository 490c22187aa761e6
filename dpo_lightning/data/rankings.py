"""Formats of rows that rank or compare responses, and of rows that are tables."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from dpo_lightning.data.cells import cell, is_messages, wrong_type
from dpo_lightning.data.example import PreferenceExample, UnusableRow
from dpo_lightning.data.formats import Asked, Format
from dpo_lightning.data.sources import Row
from dpo_lightning.errors import UsageError

TIES = "all responses tie"


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

    def answers(self) -> tuple[str, ...]:
        """Responses, and scores where they are named."""
        return (self.responses,) if self.scores is None else (self.responses, self.scores)

    def read(self, row: Row) -> list[PreferenceExample]:
        """One ranking, or the pairs that are made of it."""
        responses = cell(row, self.responses)
        if not isinstance(responses, list) or not all(isinstance(item, str) or is_messages(item) for item in responses):
            raise wrong_type(f"column {self.responses!r}", "a list of responses", responses)
        if len(responses) < 2:
            raise UnusableRow("fewer than two responses")
        groups = self._groups(row, responses)
        if len(groups) < 2:
            raise UnusableRow(TIES)
        if self.ties == "drop":
            groups = [group[:1] for group in groups]
        if self.reduce == "all_pairs":
            chosen = [[best, worst] for better, worse in combinations(groups, 2) for best in better for worst in worse]
        else:
            ends = groups if self.reduce is None else [groups[0], groups[-1]]
            # Every response stands in at least one example, and no example holds two that tie.
            chosen = [[group[turn % len(group)] for group in ends] for turn in range(max(map(len, ends)))]
        return [self.example(row, [responses[place] for place in places]) for places in chosen]

    def _groups(self, row: Row, responses: list[Any]) -> list[list[int]]:
        """Places of the responses, best first, those that tie together."""
        if self.scores is None:
            return [[place] for place in range(len(responses))]
        scores, where = cell(row, self.scores), f"column {self.scores!r}"
        if not isinstance(scores, list) or len(scores) != len(responses):
            raise wrong_type(where, f"a list of {len(responses)} scores, one a response", scores)
        for score in scores:
            if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
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
        if isinstance(label, str) and label.strip().lower() in ("tie", "both", "neither", "equal"):
            raise UnusableRow(TIES)
        # As text, since CSV knows nothing else; 1.0 is what a column of numbers with gaps makes of 1.
        said = str(int(label) if isinstance(label, float) and label.is_integer() else label).strip()
        if isinstance(label, bool) or said not in map(str, self.labels):
            raise wrong_type(f"column {self.label!r}", f"{self.labels[0]!r} or {self.labels[1]!r}", label)
        sides = [cell(row, self.first), cell(row, self.second)]
        for column, side in zip((self.first, self.second), sides, strict=True):
            if not isinstance(side, str) and not is_messages(side):
                raise wrong_type(f"column {column!r}", "text or messages", side)
        return [self.example(row, sides if said == str(self.labels[0]) else sides[::-1])]


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
