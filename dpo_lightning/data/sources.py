"""Where rows come from. A source yields dictionaries and knows what to call itself in messages."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_lightning.errors import UsageError
from dpo_lightning.paths import resolve

Row = Mapping[str, Any]
OPENERS: dict[str, Callable[..., Any]] = {".jsonl": open, ".jsonl.gz": gzip.open, ".jsonl.xz": lzma.open}


class Source(ABC):
    """A sequence of rows."""

    @abstractmethod
    def __iter__(self) -> Iterator[Row]:
        """The rows in order."""

    def numbered(self) -> Iterator[tuple[int, Row]]:
        """The rows with the numbers by which messages name them: 1, 2, 3, or those of the lines of a file."""
        return enumerate(self, start=1)

    @abstractmethod
    def __str__(self) -> str:
        """What messages call it."""


@dataclass(frozen=True)
class Files(Source):
    """A file of rows: JSON Lines (.jsonl, .jsonl.gz, .jsonl.xz) or Parquet (.parquet).

    Args:
        path: Path of the file, or package:NAME for one that this package brings.
    """

    path: str

    def __iter__(self) -> Iterator[Row]:
        """Rows; a missing or broken file is named with the line where it breaks."""
        return (row for _, row in self.numbered())

    def numbered(self) -> Iterator[tuple[int, Row]]:
        """Rows with their numbers; in JSON Lines those of their lines, where blank lines count but hold no row."""
        path = Path(resolve(self.path)).expanduser()
        if not path.is_file():
            raise UsageError(
                f"There is no data file {self.path} (looked for {path.absolute()}). For a dataset on a hub write "
                "{class_path: HubDataset, init_args: {name: owner/dataset}}."
            )
        suffix = next((suffix for suffix in (*OPENERS, ".parquet") if path.name.endswith(suffix)), None)
        if suffix is None:
            known = ", ".join((*OPENERS, ".parquet"))
            raise UsageError(f"{self.path} has none of the endings that tell its format: {known}.")
        if suffix == ".parquet":
            return enumerate(self._parquet(path), start=1)
        return self._json_lines(path, OPENERS[suffix])

    def __str__(self) -> str:
        """The path."""
        return self.path

    def _json_lines(self, path: Path, opener: Callable[..., Any]) -> Iterator[tuple[int, Row]]:
        number = 0
        try:
            with opener(path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield number, json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UsageError(f"{self.path}, line {number}: not text in UTF-8 ({error}); convert the file.") from error
        except ValueError as error:
            raise UsageError(
                f"{self.path}, line {number}: not valid JSON ({error}); each line must be one object."
            ) from error
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            raise UsageError(
                f"{self.path} cannot be read beyond line {number}: {error}. Is the file whole, and compressed as its "
                "name says?"
            ) from error

    def _parquet(self, path: Path) -> Iterator[Row]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches():
                    yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise UsageError(f"{self.path} cannot be read as Parquet: {error}. Is the file whole?") from error


@dataclass(frozen=True, kw_only=True)
class HubDataset(Source):
    """A dataset on the Hugging Face hub; needs a network or a filled cache.

    Args:
        name: Its name, owner/dataset.
        split: Its split, slices included: train, test[:500], train[:90%].
        config: Its configuration, where it has several.
        data_dir: Folder within the dataset.
        revision: Branch, tag or commit.
    """

    name: str
    split: str = "train"
    config: str | None = None
    data_dir: str | None = None
    revision: str | None = None

    def __iter__(self) -> Iterator[Row]:
        """Rows of the split."""
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        try:
            rows = load_dataset(
                self.name, self.config, split=self.split, data_dir=self.data_dir, revision=self.revision
            )
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise UsageError(
                f"The dataset {self} could not be had from the hub: {error}. Is there a network, and is its name "
                "right? Rows on this machine are given by the path of their file."
            ) from error
        return iter(rows)

    def __str__(self) -> str:
        """Name and split."""
        return f"{self.name} ({', '.join(part for part in (self.config, self.data_dir, self.split) if part)})"


@dataclass(frozen=True)
class Rows(Source):
    """Rows already in memory: a list of dictionaries or a ``datasets.Dataset``.

    Args:
        rows: The rows.
    """

    rows: Sequence[Row]

    def __iter__(self) -> Iterator[Row]:
        """The rows as they are."""
        return iter(self.rows)

    def __str__(self) -> str:
        """Their number."""
        return f"{len(self.rows)} rows in memory"


def as_source(value: str | os.PathLike[str] | Source | Sequence[Row]) -> Source:
    """A source as given; a string is the path of a file, a sequence holds rows."""
    if isinstance(value, Source):
        return value
    if isinstance(value, (str, os.PathLike)):
        return Files(os.fspath(value))
    if isinstance(value, Mapping) or not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        raise UsageError(
            f"Rows in memory must be a list of dictionaries or a `datasets.Dataset`, got {type(value).__name__}; "
            "of several splits name one, of a stream make a list."
        )
    return Rows(value)
