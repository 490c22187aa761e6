"""Training rows that are too many to store: read, shuffled in a buffer and tokenised as they are needed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, IterableDataset

from dpo_lightning.batch import Batch
from dpo_lightning.data.collate import as_it_is, collate_pieces
from dpo_lightning.data.dealing import assignments
from dpo_lightning.data.example import PreferenceExample, TokenizedExample, UnusableRow
from dpo_lightning.data.loader import outlive_notices
from dpo_lightning.data.mixture import Part
from dpo_lightning.data.reading import begin
from dpo_lightning.data.report import DataReport
from dpo_lightning.data.table import record, records_table
from dpo_lightning.data.tokenize import Tokenization
from dpo_lightning.errors import UsageError

MAX_FRUITLESS = 10_000  # rows in a row without a usable example


class Item(NamedTuple):
    """An example on its way.

    Attributes:
        row: Number of its row.
        first: Whether it is the first that the row holds.
        content: The example, or why there is none.
    """

    row: int
    first: bool
    content: PreferenceExample | UnusableRow


class StreamedBatch(NamedTuple):
    """A batch and where the stream stands behind it.

    Attributes:
        batch: This rank's share, in pieces where it is too heavy to be run at once.
        taken: Items taken from the shuffled stream since it began.
        rows: Rows begun, part by part.
        records: What became of the items, part by part, as rows of a token table.
    """

    batch: Batch
    taken: int
    rows: list[int]
    records: list[pa.Table]


@dataclass
class ShuffledStream(IterableDataset):
    """Batches without end, in an order that the seed fixes: a source that ends begins anew, in another order.

    Every rank reads and tokenises all rows, so that they agree on what is dropped, and keeps its share of each batch.

    Args:
        parts: The sources; several need weights.
        tokenization: How examples become tokens.
        batch_size: Examples in a global batch.
        buffer: Examples among which the next is drawn.
        seed: Fixes the order.
        rank: This process.
        world_size: Number of processes.
        taken: Items to leave out, since they were used before.
        most_tokens: Tokens that a rank runs at once.
    """

    parts: Sequence[Part]
    tokenization: Tokenization
    batch_size: int
    buffer: int
    seed: int
    rank: int = 0
    world_size: int = 1
    taken: int = 0
    most_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.buffer < 1:
            raise UsageError(f"`stream_buffer` must be 1 or more, got {self.buffer}.")
        if len(self.parts) > 1 and any(part.weight is None for part in self.parts):
            raise UsageError("A mixture of streams needs a `weight` for every part: how long they are nobody knows.")

    def __iter__(self) -> Iterator[StreamedBatch]:
        """Batches from where ``taken`` stands."""
        items, taken = self._mixed(), 0
        for _ in range(self.taken):
            next(items)
            taken += 1
        while True:
            batch: list[TokenizedExample] = []
            records: list[list[dict[str, Any]]] = [[] for _ in self.parts]
            rows, fruitless = [0] * len(self.parts), 0
            while len(batch) < self.batch_size:
                drawn = [next(items) for _ in range(self.batch_size - len(batch))]
                taken += len(drawn)
                for part, item, result in self._tokenized(drawn):
                    rows[part] += item.first
                    records[part].append(record(item.row, result))
                    if not isinstance(result, UnusableRow):
                        batch.append(result[0])
                        fruitless = 0
                    else:
                        fruitless += 1
                if fruitless > MAX_FRUITLESS:
                    raise UsageError(f"Of the last {fruitless:,} rows of the stream none could be used: {result}")
            num_tokens = np.array([example.num_tokens for example in batch])
            pieces = assignments(num_tokens, self.world_size, self.most_tokens)[self.rank]
            share = collate_pieces([[batch[place] for place in piece] for piece in pieces])
            yield StreamedBatch(share, taken, rows, [*map(records_table, records)])

    def _tokenized(self, drawn: list[tuple[int, Item]]) -> Iterator[tuple[int, Item, Any]]:
        results = self.tokenization([item.content for _, item in drawn if isinstance(item.content, PreferenceExample)])
        for part, item in drawn:
            yield part, item, next(results) if isinstance(item.content, PreferenceExample) else item.content

    def _mixed(self) -> Iterator[tuple[int, Item]]:
        """Items of all parts, each part drawn with its weight."""
        streams = [self._shuffled(part, f"{self.seed} {place}") for place, part in enumerate(self.parts)]
        weights = [part.weight or 1.0 for part in self.parts]
        chance = random.Random(f"{self.seed} parts")
        while True:
            (part,) = chance.choices(range(len(streams)), weights)
            yield part, next(streams[part])

    def _shuffled(self, part: Part, seed: str) -> Iterator[Item]:
        turn = 0
        while True:
            chance, buffer = random.Random(f"{seed} {turn}"), list[Item]()
            for item in _items(part):
                if len(buffer) < self.buffer:
                    buffer.append(item)
                    continue
                place = chance.randrange(len(buffer))
                yield buffer[place]
                buffer[place] = item
            chance.shuffle(buffer)
            yield from buffer
            turn += 1


class StreamLoader:
    """A loader of streamed batches whose place is part of Lightning's checkpoints.

    Args:
        stream: Where batches come from.
        num_batches: Batches after which an epoch ends.
        reports: One a part, which count what is handed out.
        strict: Whether to stop where an example cannot be used.
        num_workers: 1 reads and tokenises in a process of its own, 0 in this one.
        pin_memory: Whether batches lie in memory from which a GPU copies fast.
    """

    def __init__(
        self,
        stream: ShuffledStream,
        num_batches: int,
        reports: Sequence[DataReport],
        *,
        strict: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if num_workers > 1:
            raise UsageError(f"A stream is read by one process: `num_workers` must be 0 or 1, got {num_workers}.")
        self.stream, self.num_batches, self.reports, self.strict = stream, num_batches, reports, strict
        self._position = 0
        self._started = self._said = False
        self._make: Callable[[], DataLoader] = lambda: DataLoader(
            _Guarded(self.stream),
            batch_size=None,
            collate_fn=as_it_is,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=outlive_notices,
        )

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the epoch after loading a state, else as many batches as an epoch has."""
        if self._started or self._position >= self.num_batches:
            self._position = 0
        self._started = True
        for streamed in self._make():
            if isinstance(streamed, UsageError):
                raise streamed
            self._position += 1
            self.stream.taken = streamed.taken
            for report, rows, records in zip(self.reports, streamed.rows, streamed.records, strict=True):
                report.rows += rows
                report.count(records)
                if self.strict:
                    report.refuse_drops()
            self._say_what_runs_alone(streamed.batch)
            yield streamed.batch
            if self._position >= self.num_batches:
                return

    def _say_what_runs_alone(self, batch: Batch) -> None:
        most = self.stream.most_tokens
        longest = max(len(piece.input_ids) for piece in batch.pieces)
        if most is not None and longest > most and not self._said:
            self._said = True
            rank_zero_info(
                f"train: an example has {longest:,} tokens, more than the {most:,} that are to be run at once; those "
                "that have are run alone."
            )

    def state_dict(self) -> dict[str, Any]:
        """Batches handed out in this epoch, and where the stream stands behind them."""
        stream = self.stream
        fixed = {"seed": stream.seed, "batch_size": stream.batch_size, "buffer": stream.buffer}
        return {"position": self._position, "taken": stream.taken, **fixed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the last batch that was handed out.

        Raises:
            UsageError: If the order is another than it was.
        """
        for name, key in (("batch_size", "batch_size"), ("buffer", "stream_buffer")):
            if state.get(name) != getattr(self.stream, name):
                raise UsageError(
                    f"The checkpoint stands in data with `data.init_args.{key}` {state.get(name)}, now it is "
                    f"{getattr(self.stream, name)}: the order would be another. Use the same, or start anew from its "
                    "weights."
                )
        self._position, self.stream.taken, self.stream.seed = state["position"], state["taken"], state["seed"]
        self._started = False


@dataclass
class _Guarded(IterableDataset):
    """A stream that hands a mistake out where it ends: thrown by a worker it would come as that worker's traceback."""

    stream: ShuffledStream

    def __iter__(self) -> Iterator[StreamedBatch | UsageError]:
        try:
            yield from self.stream
        except UsageError as error:
            yield error


def first_examples(parts: Sequence[Part], tokenization: Tokenization, num_examples: int) -> list[TokenizedExample]:
    """The first usable examples of some sources, the sources in turn."""
    found: list[TokenizedExample] = []
    for place, part in enumerate(parts):
        wanted = num_examples * (place + 1) // len(parts)
        first = (item.content for item in islice(_items(part), MAX_FRUITLESS))
        items = (content for content in first if isinstance(content, PreferenceExample))
        while len(found) < wanted and (chunk := list(islice(items, wanted - len(found)))):
            found += [result[0] for result in tokenization(chunk) if not isinstance(result, UnusableRow)]
    return found


def _items(part: Part) -> Iterator[Item]:
    source = part.opened()
    for number, items in begin(source.stream(), part.format, str(source)).examples():
        yield from (Item(number, place == 0, content) for place, content in enumerate(items))
