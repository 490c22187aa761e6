"""Where rows come from. A source yields dictionaries and knows what to call itself in messages."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

from dpo_lightning.errors import UsageError

Row = Mapping[str, Any]


class Source(ABC):
    """A sequence of rows."""

    @abstractmethod
    def __iter__(self) -> Iterator[Row]:
        """The rows in order."""

    def numbered(self) -> Iterator[tuple[int, Row]]:
        """The rows with the numbers by which messages name them: 1, 2, 3, or those of the lines of a file."""
        return enumerate(self, start=1)

    def stream(self) -> Iterator[tuple[int, Row]]:
        """The same rows and numbers, without first storing all of them on this machine."""
        return self.numbered()

    def fingerprint(self) -> str | None:
        """Changes whenever the rows do; None where nobody can tell: then no tokens are cached."""
        return None

    @abstractmethod
    def __str__(self) -> str:
        """What messages call it."""


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
        return iter(self._load())

    def stream(self) -> Iterator[tuple[int, Row]]:
        """Rows as they come from the hub; of whole splits alone."""
        import pyarrow
        from datasets.exceptions import DatasetsError

        if "[" in self.split:
            raise UsageError(
                f"{self}: a stream can only be read from its first row to its last, which leaves no part like "
                f"{self.split!r} to choose; set `split` to {self.split.partition('[')[0]!r}, or leave out "
                "`data.init_args.stream_buffer`, so that the dataset is stored first."
            )
        rows, number = self._load(streaming=True), 0
        try:
            for number, row in enumerate(rows, start=1):
                yield number, row
        except (OSError, EOFError, ValueError, RuntimeError, DatasetsError, pyarrow.ArrowException) as error:
            raise UsageError(
                f"The stream of {self} broke behind row {number}: {_reason(error)}. Try again; to store the dataset "
                "first leave out `data.init_args.stream_buffer`."
            ) from error

    def fingerprint(self) -> str:
        """That of ``datasets``: of name, configuration, split, and the commit on the hub or the time of local files."""
        return self._load()._fingerprint

    def __str__(self) -> str:
        """Name and split."""
        return f"{self.name} ({', '.join(part for part in (self.config, self.data_dir, self.split) if part)})"

    def _load(self, **how: Any) -> Any:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        try:
            return load_dataset(
                self.name, self.config, split=self.split, data_dir=self.data_dir, revision=self.revision, **how
            )
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            # What is unreachable or not there is an OSError; where something was found, the rest of the name is wrong.
            remedy = "Is there a network, and is its name right?"
            if not isinstance(error, OSError):
                remedy = "Are its `split`, `config`, `data_dir` and `revision` right?"
            raise UsageError(
                f"The dataset {self} could not be had from the hub: {_reason(error)}. {remedy} Rows on this machine "
                "are given by the path of their file."
            ) from error


@dataclass(frozen=True)
class Rows(Source):
    """Rows already in memory: a list of dictionaries, a ``datasets.Dataset`` or a ``datasets.IterableDataset``.

    Args:
        rows: The rows.
    """

    rows: Iterable[Row]

    def __post_init__(self) -> None:
        kind, choice = type(self.rows).__name__, "of a stream make a list"
        if isinstance(self.rows, Mapping):
            kind, choice = f"{kind} of {', '.join(map(repr, self.rows))}", "of several splits name one"
        elif (isinstance(self.rows, Sized) and hasattr(self.rows, "__getitem__")) or _is_stream(self.rows):
            return
        raise UsageError(
            f"Rows in memory must be a list of dictionaries, a `datasets.Dataset` or an `IterableDataset`, got {kind}; "
            f"{choice}."
        )

    def __iter__(self) -> Iterator[Row]:
        """The rows as they are."""
        return iter(self.rows)

    def numbered(self) -> Iterator[tuple[int, Row]]:
        """The rows with their numbers; a stream has none to give, as nothing says that it ends."""
        if not isinstance(self.rows, Sized):
            raise UsageError(
                "These rows are a stream, without an end up to which they could be read and stored. Set "
                "`data.init_args.stream_buffer` to train on them as they come, or make a list or a `datasets.Dataset` "
                "of them."
            )
        return enumerate(self.rows, start=1)

    def stream(self) -> Iterator[tuple[int, Row]]:
        """The rows with their numbers, from memory or from the stream."""
        return enumerate(self.rows, start=1)

    def fingerprint(self) -> str | None:
        """That of the ``datasets.Dataset``, or a hash of the rows as JSON; None for a stream and what JSON lacks."""
        if not isinstance(self.rows, Sized):
            return None
        if hasattr(self.rows, "_fingerprint"):
            return self.rows._fingerprint
        digest = hashlib.blake2b(digest_size=16)
        try:
            for row in self.rows:
                digest.update(json.dumps(row).encode() + b"\n")
        except (TypeError, ValueError, RecursionError):
            return None
        return digest.hexdigest()

    def __str__(self) -> str:
        """Their number."""
        return f"{len(self.rows)} rows in memory" if isinstance(self.rows, Sized) else "a stream"


def _is_stream(rows: Iterable[Row]) -> bool:
    from datasets import IterableDataset

    return isinstance(rows, IterableDataset)


def _reason(error: Exception) -> str:
    return str(error).rstrip(".")
