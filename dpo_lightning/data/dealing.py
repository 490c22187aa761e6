"""Who runs which examples of a global batch: shares of the ranks, and pieces of a share that are run at once.

Neither changes the sum over the batch, only how long ranks wait for each other and how much they hold in memory.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import numpy as np

Places = list[int]


def assignments(num_tokens: np.ndarray, world_size: int, most_tokens: int | None = None) -> list[list[Places]]:
    """The pieces that each rank runs of a global batch.

    All ranks have equally many pieces, at least one, since where weights are divided every forward is run by all of
    them together; where there are too few examples some pieces are empty.

    Args:
        num_tokens: Tokens of each example in the stream, shape ``(B,)``.
        world_size: Number of ranks.
        most_tokens: Tokens that a piece may have; an example that alone has more is a piece of its own.

    Returns:
        For each rank its pieces, as places in the batch; each place once.
    """
    dealt = deal(num_tokens, world_size)
    if most_tokens is None:
        return [[places] for places in dealt]
    count = max(num_pieces(num_tokens[places], most_tokens) for places in dealt)
    return [[[places[place] for place in piece] for piece in split(num_tokens[places], count)] for places in dealt]


def deal(num_tokens: np.ndarray, num_shares: int) -> list[Places]:
    """Places in shares of equal counts, the first ones one more where that does not go, and nearly equal tokens.

    Dealt in turn, unless the heaviest share becomes lighter where the longest that is left goes to the lightest
    share that has room.
    """
    in_turn = [list(range(share, len(num_tokens), num_shares)) for share in range(num_shares)]
    by_weight = _longest_to_lightest(num_tokens, list(map(len, in_turn)))
    return min(in_turn, by_weight, key=lambda dealt: max(_loads(num_tokens, dealt)))


def split(num_tokens: np.ndarray, num_parts: int) -> list[Places]:
    """Places in parts of nearly equal tokens, none of them empty unless there are more parts than places."""
    return _longest_to_lightest(num_tokens, [len(num_tokens)] * num_parts)


def num_pieces(num_tokens: np.ndarray, most_tokens: int) -> int:
    """Fewest parts into which :func:`split` makes nothing too heavy but single examples."""

    def fits(pieces: list[Places]) -> bool:
        loads = _loads(num_tokens, pieces)
        return all(load <= most_tokens or len(piece) == 1 for load, piece in zip(loads, pieces, strict=True))

    least = -(-int(np.minimum(num_tokens, most_tokens).sum()) // most_tokens)
    return next(count for count in range(least, len(num_tokens) + 1) if fits(split(num_tokens, count)))


def runs(weights: np.ndarray, most: int) -> Iterator[slice]:
    """Neighbours whose weights together are at most so much, or a single one that is heavier."""
    ends = np.cumsum(weights)
    start = done = 0
    while start < len(weights):
        stop = max(start + 1, int(np.searchsorted(ends, done + most, side="right")))
        yield slice(start, stop)
        start, done = stop, int(ends[stop - 1])


def _longest_to_lightest(num_tokens: np.ndarray, rooms: Sequence[int]) -> list[Places]:
    shares: list[Places] = [[] for _ in rooms]
    lightest = [(0, share) for share, room in enumerate(rooms) if room]
    for place in np.argsort(-num_tokens, kind="stable").tolist():
        load, share = heapq.heappop(lightest)
        shares[share].append(place)
        if len(shares[share]) < rooms[share]:
            heapq.heappush(lightest, (load + int(num_tokens[place]), share))
    return list(map(sorted, shares))


def _loads(num_tokens: np.ndarray, shares: Sequence[Places]) -> list[int]:
    return [int(num_tokens[share].sum()) for share in shares]
