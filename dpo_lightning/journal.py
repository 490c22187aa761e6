"""Rows of results that a run appends to as it goes, and that a killed run goes on from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dpo_lightning.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Row = dict[str, Any]
SETTINGS = ".settings.json"


class Journal:
    """A file of JSON Lines, and beside it the settings that its rows were made with.

    Every row is on the disk when :meth:`append` returns. A row that was cut short by a kill is taken off when the file
    is opened again; rows of other settings are refused, and so is a second process.

    Args:
        path: The file; ``PATH.settings.json`` lies beside it.
        settings: What its rows depend on, as plain data.
        overwrite: Begin anew, whatever lies there.

    Attributes:
        rows: What was there when it was opened.

    Raises:
        UsageError: If the file is of other settings, is no journal, is damaged, or is being written to.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(json.dumps(settings))  # as it will be read again
        beside = self.path.with_name(self.path.name + SETTINGS)
        if not overwrite:
            self._see_that_it_goes_on(beside, known)
        self._file = self.path.open("a+b")
        self._lock()
        if overwrite:
            self._file.truncate(0)
        write_whole(beside, as_json(known, indent=2) + "\n")
        self.rows = self._read()

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows behind the others, all in one go."""
        self._file.write("".join(as_json(row) + "\n" for row in rows).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let others open it."""
        self._file.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def _see_that_it_goes_on(self, beside: Path, settings: Mapping[str, Any]) -> None:
        if not beside.exists():
            if self.path.exists() and self.path.stat().st_size:
                raise UsageError(
                    f"{self.path} exists and was not begun by this command: there is no {beside.name} beside it. Name "
                    "another file, or give --overwrite."
                )
            return
        found = json.loads(beside.read_text(encoding="utf-8"))
        others = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
        if others and self.path.exists() and self.path.stat().st_size:
            name = others[0]
            raise UsageError(
                f"{self.path} was begun with {name} = {found.get(name)!r}, and now it is {settings.get(name)!r}. Go on "
                "with the same settings, name another file, or give --overwrite."
            )

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UsageError(f"Another process is writing to {self.path}; wait for it, or name another file.") from None
        except OSError:  # the file system has no locks
            pass

    def _read(self) -> list[Row]:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)
        rows = []
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UsageError(
                    f"{self.path}, line {number} is no JSON ({error}): something else changed the file. Take "
                    "the line out, or give --overwrite."
                ) from None
        return rows


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON that people can read; where text holds half a character, which UTF-8 has not, with escapes instead."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


class Book:
    """What was found and is kept, so that nothing is asked for twice; a subclass says what it is.

    Args:
        path: File that keeps it; without one it is kept in memory.
        holds: What lies in the file, in words.
        overwrite: Begin the file anew.

    Attributes:
        rows: What was there when it was opened.
    """

    def __init__(self, path: Path | None, holds: str, overwrite: bool = False) -> None:
        self._journal = None if path is None else Journal(path, {"holds": holds}, overwrite)
        self.rows = [] if self._journal is None else self._journal.rows

    def keep(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows down, where there is a file."""
        if self._journal is not None:
            self._journal.append(rows)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let others write to the file."""
        if self._journal is not None:
            self._journal.close()


def digest_of(*parts: Any) -> str:
    """A key of plain data: another one wherever the data are."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def write_whole(path: Path, text: str) -> None:
    """A text file that is whole or as it was before."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
