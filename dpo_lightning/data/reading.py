"""Rows of a source to examples, with the shape named or found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import NamedTuple

from dpo_lightning.data.auto import NUM_ROWS, choose
from dpo_lightning.data.cells import WRONG_TYPE
from dpo_lightning.data.example import PreferenceExample, UnusableRow
from dpo_lightning.data.formats import Format
from dpo_lightning.data.rankings import Columns
from dpo_lightning.data.sources import Row
from dpo_lightning.errors import UsageError

NO_EXAMPLE = "no example in the row"


class Reading(NamedTuple):
    """A source being read.

    Attributes:
        format: The shape of its rows.
        unread: Columns that the shape does not read.
        rows: All rows with their numbers.
    """

    format: Format
    unread: list[str]
    rows: Iterator[tuple[int, Row]]

    def examples(self) -> Iterator[tuple[int, list[PreferenceExample | UnusableRow]]]:
        """The number of each row and what it holds."""
        for number, row in self.rows:
            yield number, _examples(self.format, number, row)


def begin(rows: Iterator[tuple[int, Row]], shape: Format | None, source: str) -> Reading:
    """Read the first rows to find their shape, or to see that they can have the one that was named.

    Raises:
        UsageError: If there are no rows, or they cannot have that shape.
    """
    first = list(islice(rows, NUM_ROWS))
    if not first:
        raise UsageError(f"{source} holds no rows.")
    found = list(dict.fromkeys(column for _, row in first if isinstance(row, Mapping) for column in row))
    if shape is None:
        shape = choose([row for _, row in first], source)
    elif missing := [column for column in shape.columns() if column not in found]:
        row_shape = shape.rows if isinstance(shape, Columns) else shape
        argument = next((name for name, value in vars(row_shape).items() if value == missing[0]), missing[0])
        remedy = f"{{class_path: {type(row_shape).__name__}, init_args: {{{argument}: your_column}}}}"
        if isinstance(shape, Columns):
            remedy = f"{{class_path: Columns, init_args: {{rows: {remedy}}}}}"
        raise UsageError(
            f"{source}: there is no column {missing[0]!r}; the rows have {', '.join(map(repr, found)) or 'none'}. "
            f"{shape} is what was asked for; name your columns, as in {remedy}."
        )
    unread = [column for column in found if column not in shape.columns()]
    return Reading(shape, unread, chain(first, rows))


def _examples(shape: Format, number: int, row: Row) -> list[PreferenceExample | UnusableRow]:
    try:
        items = [item._replace(row=number) if isinstance(item, PreferenceExample) else item for item in shape.read(row)]
        return items or [UnusableRow(NO_EXAMPLE)]
    except UnusableRow as reason:
        return [reason]
    except RecursionError:
        return [UnusableRow(WRONG_TYPE, "its lists and objects are nested too deeply; mend the row.")]
