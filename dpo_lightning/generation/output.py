"""The file of samples while it is being made: by several processes, any of which may be killed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric

from dpo_lightning.errors import UsageError
from dpo_lightning.journal import SETTINGS, Journal, Row, as_json, write_whole

Key = tuple[float, int]  # temperature, row


class Output:
    """Rows of samples, each once, appended as they are made and sorted at the end.

    The first rank appends to the file itself and every other one to a part beside it, which the first takes up when
    all are done, or when a later launch begins.

    Args:
        path: The file.
        settings: What its rows depend on.
        order: Key of every row that it is to have, in order.
        fabric: The ranks.
        overwrite: Begin anew, whatever lies there.

    Attributes:
        done: Keys of the rows that were there at the beginning.

    Raises:
        UsageError: If what lies there is of other settings, or is being written to.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], order: Sequence[Key], fabric: Fabric, overwrite: bool = False
    ) -> None:
        self.path, self.settings, self.fabric = path, settings, fabric
        self._places = {key: place for place, key in enumerate(order)}
        self._rows: dict[Key, Row] = {}
        self._journal: Journal | None = None
        self._read_to: dict[Path, int] = {}
        error: UsageError | None = None
        if fabric.is_global_zero:
            try:
                self._open(overwrite)
            except UsageError as mistake:
                error = mistake
        message, done = fabric.broadcast((error and str(error), list(self._rows)))
        if message is not None:
            self.close()
            raise error or SystemExit(2)  # the first rank says it
        self.done = frozenset(done)

    @property
    def complete(self) -> bool:
        """Whether all rows were there at the beginning."""
        return self.done >= self._places.keys()

    def append(self, rows: Iterable[Row]) -> list[Row]:
        """Add rows, and give those that are new."""
        if self._journal is None:
            self._journal = Journal(self._part(self.fabric.global_rank), self.settings)
        new = {_key(row, self.path): row for row in rows}
        new = {key: row for key, row in new.items() if key not in self.done}
        self._journal.append(new.values())
        if self.fabric.is_global_zero:
            self._rows |= new
        return list(new.values())

    def of_others(self) -> Iterator[Row]:
        """On the first rank, rows that other ranks have added since it was last asked."""
        for path in map(self._part, range(1, self.fabric.world_size)):
            if path.exists():
                with path.open("rb") as file:
                    file.seek(self._read_to.get(path, 0))
                    content = file.read()
                whole = content.rfind(b"\n") + 1
                self._read_to[path] = self._read_to.get(path, 0) + whole
                yield from map(json.loads, content[:whole].splitlines())

    def wait(self) -> None:
        """Until all ranks are done."""
        if not self.fabric.is_global_zero:
            self.close()
        self.fabric.barrier()

    def finish(self) -> list[Row]:
        """On the first rank put the rows in order, and give them.

        Raises:
            UsageError: If rows are missing.
        """
        self._take_up_parts()
        missing = [key for key in self._places if key not in self._rows]
        if missing:
            raise UsageError(
                f"{self.path} lacks {len(missing):,} of {len(self._places):,} rows, which other ranks have made: the "
                "folder must be one that all machines share. Call the command again to make what is missing."
            )
        ordered = [self._rows[key] for key in self._places]
        assert self._journal is not None
        if self._journal.rows != ordered:
            write_whole(self.path, "".join(as_json(row) + "\n" for row in ordered))
        self.close()
        return ordered

    def close(self) -> None:
        """Let others open what this rank writes."""
        if self._journal is not None:
            self._journal.close()

    def _open(self, overwrite: bool) -> None:
        self._journal = Journal(self.path, self.settings, overwrite)
        if overwrite:
            for part in self._parts():
                _remove(part)
        self._rows = {_key(row, self.path): row for row in self._journal.rows}
        self._take_up_parts()

    def _take_up_parts(self) -> None:
        """Take rows from parts into the file; killed in between, the next launch does it."""
        assert self._journal is not None
        for path in self._parts():
            with Journal(path, self.settings) as part:
                found = {_key(row, path): row for row in part.rows}
                new = {key: row for key, row in found.items() if key not in self._rows}
                self._journal.append(new.values())
                self._rows |= new
                _remove(path)

    def _part(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.name}.rank{rank}")

    def _parts(self) -> list[Path]:
        named = re.compile(re.escape(self.path.name) + r"\.rank\d+")
        return sorted(path for path in self.path.parent.iterdir() if named.fullmatch(path.name))


def _key(row: Any, path: Path) -> Key:
    try:
        return float(row["temperature"]), int(row["row"])
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{path} holds {row!r:.80}, which is no row of samples; give --overwrite.") from None


def _remove(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_name(part.name + SETTINGS).unlink(missing_ok=True)
