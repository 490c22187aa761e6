"""Rows in files and folders of this machine. The ending of a name says how a file is read."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

from dpo_lightning.data.readers import READERS, SEEKING
from dpo_lightning.data.sources import Row, Rows, Source
from dpo_lightning.errors import UsageError
from dpo_lightning.paths import resolve


def _open_zst(path: str, mode: str = "rb") -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(path, mode), "zstd"))


OPENERS: dict[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".xz": lzma.open, ".zst": _open_zst}
ENDINGS = {reader + opener: (reader, opener) for reader in READERS for opener in OPENERS}
# One of them lies in every folder that `save_to_disk` has written.
SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")
MANY = 10  # names to show of a folder's


@dataclass(frozen=True)
class Files(Source):
    """Rows in a file: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, each also with .gz, .xz or .zst behind it.

    Args:
        path: Path of the file, or of a folder that Dataset.save_to_disk wrote; package:NAME is brought by this package.
        split: Which split of a saved folder that has several.
    """

    path: str
    split: str | None = None

    def __iter__(self) -> Iterator[Row]:
        """Rows; a missing or broken file is named with the line where it breaks."""
        return (row for _, row in self.numbered())

    def numbered(self) -> Iterator[tuple[int, Row]]:
        """Rows with their numbers; in JSON Lines those of their lines, where blank lines count but hold no row."""
        path = self._found()
        return self._saved_rows(path) if os.path.isdir(path) else self._file_rows(path, *ENDINGS[self._ending(path)])

    def fingerprint(self) -> str:
        """A hash of the file's content, with the ending that says how it is read; of a folder that of the dataset."""
        path = self._found()
        if os.path.isdir(path):
            return "-".join([self._load_saved(path)._fingerprint, *([self.split] if self.split else [])])
        ending = self._ending(path)
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16))
        except OSError as error:
            raise self._unreadable(error) from error
        return digest.hexdigest() + ending

    def __str__(self) -> str:
        """The path, and the split where one is named."""
        return self.path if self.split is None else f"{self.path} ({self.split})"

    def _found(self) -> str:
        path = os.path.expanduser(resolve(self.path))
        if not (os.path.isfile(path) or os.path.isdir(path)):
            raise UsageError(
                f"There is no data file {self.path} (looked for {os.path.abspath(path)}). For a dataset on a hub write "
                "{class_path: HubDataset, init_args: {name: owner/dataset}}."
            )
        return path

    def _ending(self, path: str) -> str:
        ending = _ending_of(path)
        if ending is None:
            raise UsageError(
                f"{self.path} has none of the endings that tell its format: {', '.join(READERS)}, each also with "
                f"{', '.join(filter(None, OPENERS))} behind it."
            )
        if self.split is not None:
            raise UsageError(f"{self.path} is one file and has no splits; leave out `split`, here {self.split!r}.")
        return ending

    def _file_rows(self, path: str, reader: str, opener: str) -> Iterator[tuple[int, Row]]:
        number = 0
        try:
            with OPENERS[opener](path, "rb") as file:
                whole = io.BytesIO(file.read()) if opener and reader in SEEKING else file
                for number, row in READERS[reader](whole, str(self)):
                    yield number, row
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            raise self._unreadable(error, f" beyond row {number}") from error

    def _unreadable(self, error: Exception, beyond: str = "") -> UsageError:
        return UsageError(
            f"{self.path} cannot be read{beyond}: {error}. Is the file whole, and compressed as its name says?"
        )

    def _saved_rows(self, path: str) -> Iterator[tuple[int, Row]]:
        import pyarrow

        number = 0
        dataset = self._load_saved(path).with_format(None)  # a format of tensors is saved along
        try:
            dataset.data.validate(full=True)  # damaged offsets would be followed to anywhere in memory
            for number, row in enumerate(dataset, start=1):
                yield number, row
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise UsageError(
                f"{self} cannot be read beyond row {number}: {error}. Write the folder anew by `save_to_disk`."
            ) from error

    def _load_saved(self, path: str) -> Any:
        import pyarrow
        from datasets import DatasetDict, load_from_disk

        inside = sorted(os.listdir(path))
        if not set(SAVED) & set(inside):
            data = [name for name in inside if _ending_of(name)]
            more = f" and {len(data) - MANY} more" if len(data) > MANY else ""
            hint = f"name one of its files: {', '.join(data[:MANY])}{more}" if data else "it holds no data files either"
            raise UsageError(f"{self.path} is a folder, but not one that `Dataset.save_to_disk` wrote; {hint}.")
        try:
            loaded = load_from_disk(path)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, pyarrow.ArrowException) as error:
            raise UsageError(
                f"{self.path} cannot be read as a saved dataset ({type(error).__name__}: {error}). Write the folder "
                "anew by `save_to_disk`."
            ) from error
        if isinstance(loaded, DatasetDict):
            if self.split not in loaded:
                raise UsageError(
                    f"{self.path} has no split {self.split!r}; `split` must be one of {', '.join(loaded)}."
                    if self.split
                    else f"{self.path} has several splits; name one of them by `split`: {', '.join(loaded)}."
                )
            return loaded[self.split]
        if self.split is not None:
            raise UsageError(f"{self.path} has no splits; leave out `split`, here {self.split!r}.")
        return loaded


def _ending_of(path: str) -> str | None:
    return next((ending for ending in ENDINGS if path.lower().endswith(ending)), None)


def as_source(value: str | os.PathLike[str] | Source | Iterable[Row]) -> Source:
    """A source as given; a string is the path of a file or folder, anything else holds rows."""
    if isinstance(value, Source):
        return value
    if isinstance(value, (str, os.PathLike)):
        return Files(os.fspath(value))
    return Rows(value)
