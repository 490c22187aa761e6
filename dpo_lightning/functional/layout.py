"""Which tokens of a stream attend to which, and how their sequences are put together for computation."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Block(NamedTuple):
    """Sequences of like shape, padded at their ends to one.

    Attributes:
        sequences: Their numbers in the stream.
        query: Queries of the longest.
        key: Keys of the longest.
        mask: Which keys a query may see, shape ``(sequences, 1, query, key)``; None where that is plain causality.
            Queries that fill up see what the last of their sequence sees.
    """

    sequences: list[int]
    query: int
    key: int
    mask: Tensor | None


class Blocks(NamedTuple):
    """All sequences of a stream in blocks.

    Attributes:
        blocks: The blocks.
        query_index: Flat positions of the queries, block after block; None where that is the stream as it is.
        key_index: Flat positions of their keys; None where that is the stream as it is.
        restore: Where each token of the stream stands among the queries, shape ``(T,)``; None with ``query_index``.
    """

    blocks: list[Block]
    query_index: Tensor | None
    key_index: Tensor | None
    restore: Tensor | None


@dataclass(frozen=True)
class RaggedLayout:
    """Which tokens of a stream attend to which; the same object serves every layer of a forward pass.

    Args:
        spans: One row ``(query start, query end, prefix start, prefix end)`` a sequence, int64, shape ``(S, 4)``.
            The query spans partition the stream in order.
        key_index: Flat positions of the keys of all sequences, prefix before own tokens, shape
            ``(sum of key lengths,)``; ``None`` where no sequence has a prefix and keys are the stream itself.
        max_query: Most queries in a sequence.
        max_key: Most keys in a sequence.
    """

    spans: Tensor
    key_index: Tensor | None
    max_query: int
    max_key: int
    _blocks: dict[tuple[int, int | None, bool], Blocks] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def cu_query(self) -> Tensor:
        """Cumulative query lengths, int32, shape ``(S + 1,)``, on the device of the spans."""
        return F.pad(torch.cumsum(self.spans[:, 1] - self.spans[:, 0], 0), (1, 0)).int()

    @functools.cached_property
    def cu_key(self) -> Tensor:
        """Cumulative key lengths, int32, shape ``(S + 1,)``, on the device of the spans."""
        start, end, prefix_start, prefix_end = self.spans.unbind(1)
        return F.pad(torch.cumsum(end - start + prefix_end - prefix_start, 0), (1, 0)).int()

    @functools.cached_property
    def lengths(self) -> list[tuple[int, int]]:
        """Query and key length of every sequence, on the host (one synchronisation if the spans are on a GPU)."""
        return [(end - start, end - start + stop - begin) for start, end, begin, stop in self.spans.tolist()]

    def gather_keys(self, states: Tensor) -> Tensor:
        """Rows of ``states`` (T, H, head size) in the order in which the sequences read them."""
        return states if self.key_index is None else states.index_select(0, self.key_index)

    def blocks(self, overhead: int, window: int | None = None, *, masked: bool = False) -> Blocks:
        """The sequences in blocks; kept, because every layer asks again.

        Args:
            overhead: What a block costs by itself, in query-key pairs.
            window: A query sees itself and the ``window - 1`` positions before it; ``None`` for all.
            masked: Whether plain causality needs a mask too.
        """
        window = window if window is not None and window < self.max_key else None
        if (overhead, window, masked) not in self._blocks:
            self._blocks[overhead, window, masked] = self._in_blocks(overhead, window, masked)
        return self._blocks[overhead, window, masked]

    def _in_blocks(self, overhead: int, window: int | None, masked: bool) -> Blocks:
        device, groups = self.spans.device, grouped(self.lengths, overhead)
        query, key = torch.tensor(self.lengths, device=device).unbind(1)
        blocks, query_index, key_index = [], [], []
        restore = torch.empty(int(self.spans[-1, 1]), dtype=torch.int64, device=device)
        place = 0
        for numbers in groups:
            longest = max(self.lengths[s][0] for s in numbers), max(self.lengths[s][1] for s in numbers)
            column, queries, keys = torch.arange(longest[1], device=device), query[numbers, None], key[numbers, None]
            row = torch.minimum(column[: longest[0]], queries - 1)
            position = row + keys - queries
            plain = not masked and window is None and all(self.lengths[s][0] == self.lengths[s][1] for s in numbers)
            mask = None if plain else causal_mask(position, column, window)[:, None]
            blocks.append(Block(numbers, *longest, mask))
            flat = self.spans[numbers, :1] + row
            query_index.append(flat.flatten())
            key_index.append((self.cu_key[numbers, None] + torch.minimum(column, keys - 1)).flatten())
            # Where a padding query repeats a token, the token itself comes first and has to win.
            own = column[: longest[0]] < queries
            restore[flat[own]] = place + torch.arange(flat.numel(), device=device).view(flat.shape)[own]
            place += flat.numel()
        if len(groups) == len(self.lengths):
            return Blocks(blocks, None, self.key_index, None)
        keys = torch.cat(key_index)
        return Blocks(blocks, torch.cat(query_index), keys if self.key_index is None else self.key_index[keys], restore)


def grouped(lengths: Sequence[tuple[int, int]], overhead: int) -> list[list[int]]:
    """Sequences in groups for which padding costs less than computing each by itself.

    Args:
        lengths: Query and key length of every sequence.
        overhead: What a computation costs by itself, in query-key pairs.

    Returns:
        Numbers of the sequences of each group; the sequences in order where every group has one.
    """

    def shape(s: int) -> tuple[bool, int, int]:
        query, key = lengths[s]
        return query < key, -key, -query

    groups: list[list[int]] = []
    longest, area = 0, 0
    for s in sorted(range(len(lengths)), key=shape):
        query, key = lengths[s]
        if groups:
            first = lengths[groups[-1][0]]
            members, padded = len(groups[-1]) + 1, max(longest, query) * first[1]
            same_kind = (query < key) == (first[0] < first[1])
            if same_kind and members * padded - area - query * key <= overhead * (members - 1):
                groups[-1].append(s)
                longest, area = max(longest, query), area + query * key
                continue
        groups.append([s])
        longest, area = query, query * key
    return groups if len(groups) < len(lengths) else [[s] for s in range(len(lengths))]


def causal_mask(position: Tensor, column: Tensor, window: int | None) -> Tensor:
    """Which keys a query may see, shape ``(*position.shape, len(column))``.

    Args:
        position: Where queries stand among their keys.
        column: The keys, 0, 1, ...
        window: A query sees itself and the ``window - 1`` positions before it; ``None`` for all.
    """
    distance = position[..., None] - column
    allowed = distance >= 0
    return allowed if window is None else allowed & (distance < window)
