"""The order of batches depends on seed and epoch alone, ranks share it, and a loader goes on where it stopped."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from dpo_lightning.batch import MicroBatches, PreferenceBatch, Window
from dpo_lightning.data.example import TokenizedExample
from dpo_lightning.data.loader import GlobalBatchSampler, ResumableLoader
from dpo_lightning.errors import UsageError


class Rows(list):
    """Examples in memory, numbered, with as many tokens as asked for."""

    def __init__(self, num_tokens: np.ndarray) -> None:
        super().__init__(TokenizedExample([1], [[2] * (num - 1)], row) for row, num in enumerate(num_tokens))

    def __getitems__(self, indices: list[int]) -> list[TokenizedExample]:
        return [self[index] for index in indices]


def loader(
    num: int = 11, batch_size: int = 4, *, seed: int = 0, num_workers: int = 0, shuffle: bool = True, lengths=None,
    **kwargs,
):  # fmt: skip
    names = ("rank", "world_size", "most_tokens", "num_scored", "accumulated", "max_batches")
    ranks = {name: kwargs.pop(name) for name in names if name in kwargs}
    lengths = np.full(num, 4) if lengths is None else np.array(lengths)
    sampler = GlobalBatchSampler([(num, num)], lengths, batch_size, shuffle=shuffle, seed=seed, **ranks)
    return ResumableLoader(Rows(lengths), sampler, num_workers=num_workers, **kwargs)


def rows(batches) -> list[list[int]]:
    """Row numbers of each batch."""
    return [[row for piece in batch.pieces for row in piece.row.tolist()] for batch in batches]


def epochs(source: ResumableLoader, num: int) -> list[list[list[int]]]:
    return [rows(source) for _ in range(num)]


def flat(epoch: list[list[int]]) -> list[int]:
    return [row for batch in epoch for row in batch]


def mixed(*parts: tuple[int, int], batch_size: int = 4, shuffle: bool = True, epoch: int = 0, **kwargs):
    """A loader over sources of given sizes, of which an epoch takes so many."""
    lengths = np.full(sum(size for size, _ in parts), 2)
    sampler = GlobalBatchSampler(parts, lengths, batch_size, shuffle=shuffle, **kwargs)
    return ResumableLoader(Rows(lengths), sampler, epoch=epoch)


def resumed(state, **kwargs) -> ResumableLoader:
    """A new loader, of another seed, from a state that went through a file."""
    fresh = loader(seed=99, **kwargs)
    fresh.load_state_dict(json.loads(json.dumps(state)))
    return fresh


def test_every_epoch_is_a_permutation_of_its_own():
    orders = [flat(epoch) for epoch in epochs(loader(), 5)]
    assert all(sorted(order) == list(range(11)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5


def test_seed_and_epoch_alone_fix_the_order():
    assert epochs(loader(seed=3), 3) == epochs(loader(seed=3), 3)
    assert flat(rows(loader(seed=3))) != flat(rows(loader(seed=4)))
    assert epochs(loader(seed=3), 3)[2] == rows(loader(seed=3, epoch=2))
    # The epoch is no part of the seed: the second epoch of one seed is not the first of the next.
    assert epochs(loader(seed=3), 2)[1] != rows(loader(seed=4))


def test_large_seeds_are_seeds():
    assert sorted(flat(rows(loader(seed=2**64 - 1)))) == list(range(11))
    assert rows(loader(seed=2**64 - 1)) != rows(loader(seed=2**64 - 2))


def test_without_shuffling_the_order_is_that_of_the_rows():
    assert epochs(loader(shuffle=False), 2) == 2 * [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("num", "batch_size"), [(11, 4), (12, 4), (13, 4), (3, 4), (4, 1)])
def test_length_is_the_number_of_batches(num, batch_size, shuffle):
    source = loader(num, batch_size, shuffle=shuffle)
    batches = rows(source)
    assert len(source) == len(batches) == -(-num // batch_size)
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert sorted(flat(batches)) == list(range(num))


@pytest.mark.parametrize(
    ("num", "batch_size", "world_size"), [(24, 8, 2), (24, 8, 4), (26, 8, 2), (28, 8, 4), (8, 8, 8)]
)
def test_ranks_partition_each_global_batch(num, batch_size, world_size):
    for epoch in range(2):
        whole = rows(loader(num, batch_size, epoch=epoch))
        shares = [
            rows(loader(num, batch_size, epoch=epoch, rank=rank, world_size=world_size)) for rank in range(world_size)
        ]
        assert {len(share) for share in shares} == {len(whole)}
        for batch, *parts in zip(whole, *shares, strict=True):
            assert {len(part) for part in parts} == {len(batch) // world_size}
            assert sorted(flat(parts)) == sorted(batch)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("num", "last"), [(12, [2, 2]), (11, [2, 1]), (9, [1, 0]), (1, [1, 0])])
def test_ranks_cover_everything_once_in_equally_many_batches(num, last, shuffle):
    shares = [rows(loader(num, shuffle=shuffle, rank=rank, world_size=2)) for rank in range(2)]
    assert sorted(flat(shares[0]) + flat(shares[1])) == list(range(num))
    full = (num - 1) // 4
    assert [[len(batch) for batch in share[full:]] for share in shares] == [[size] for size in last]


def test_a_rank_without_examples_gets_a_batch_of_none():
    *_, last = loader(5, rank=1, world_size=2)
    assert last.length.shape == (0, 2)
    assert len(last.input_ids) == last.max_query == 1
    assert len(last.source) == len(last.row) == len(last.digest) == 0


# Windows: what an optimizer step is the mean over.


def test_batches_say_what_their_step_is_the_mean_over():
    scored = np.arange(11)
    windows = [batch.window for batch in loader(shuffle=False, num_scored=scored, accumulated=2)]
    assert windows == [Window(8, sum(range(8)), 2), Window(8, sum(range(8)), 2), Window(3, 8 + 9 + 10, 2)]


def test_windows_end_where_the_trainer_ends_the_epoch():
    batches = loader(20, shuffle=False, num_scored=np.ones(20, int), accumulated=2, max_batches=3)
    assert [batch.window.examples for batch in islice(iter(batches), 3)] == [8, 8, 4]


def test_windows_are_those_of_all_ranks_and_pieces_and_the_same_after_resuming():
    settings = {"num_scored": np.arange(11), "accumulated": 3}
    whole = [batch.window for batch in loader(**settings)]
    for rank in range(2):
        assert [b.window for b in loader(rank=rank, world_size=2, most_tokens=5, **settings)] == whole
    source = loader(**settings)
    rows(islice(iter(source), 1))
    assert [batch.window for batch in resumed(source.state_dict(), **settings)] == whole[1:]


def test_where_nothing_is_trained_there_are_no_windows():
    assert {batch.window for batch in loader(shuffle=False)} == {None}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_goes_on_with_the_very_next_batch(num_workers):
    kwargs = {"num_workers": num_workers}
    expected = epochs(loader(), 4)
    for done in (0, 1, 2):  # whole epochs before
        source = loader(**kwargs)
        assert epochs(source, done) == expected[:done]
        for position in (1, 2):  # and batches of the next
            begun = iter(source)
            rows(islice(begun, position))
            after = resumed(source.state_dict(), **kwargs)
            assert rows(after) == expected[done][position:]
            assert epochs(after, 3 - done) == expected[done + 1 :]
            source = loader(epoch=done, **kwargs)


def test_the_state_counts_the_batches_handed_out():
    source = loader()
    begun = iter(source)
    order = {"seed": 0, "num_examples": 11, "batch_size": 4}
    assert source.state_dict() == {"epoch": 0, "position": 0, **order}
    next(begun)
    assert source.state_dict() == {"epoch": 0, "position": 1, **order}
    rows(begun)
    assert source.state_dict() == {"epoch": 0, "position": 3, **order}


@pytest.mark.parametrize(("name", "value"), [("num_examples", 12), ("batch_size", 2)])
def test_other_data_or_batches_cannot_be_continued(name, value):
    source = loader()
    with pytest.raises(UsageError, match=rf"in the middle of an epoch with .*{value}, now .* Use the same data and"):
        source.load_state_dict({**source.state_dict(), name: value})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_stopped_at_the_end_of_an_epoch_begins_the_next(num_workers):
    expected = epochs(loader(), 3)
    source = loader(num_workers=num_workers)
    rows(source)
    after = resumed(source.state_dict(), num_workers=num_workers)
    assert epochs(after, 2) == expected[1:]


def test_a_loader_that_has_not_begun_begins_at_the_beginning():
    source = loader()
    assert epochs(resumed(source.state_dict()), 2) == epochs(loader(), 2)


def test_a_loader_in_use_can_be_put_back():
    source = loader()
    first = epochs(source, 2)
    source.load_state_dict({**source.state_dict(), "epoch": 0, "position": 1})
    assert epochs(source, 2) == [first[0][1:], first[1]]


def test_a_resumed_loader_can_be_stopped_again():
    expected = flat(epochs(loader(), 2))
    seen, state = [], loader().state_dict()
    for _ in expected:
        source = resumed(state)
        seen += rows(islice(iter(source), 1))
        state = source.state_dict()
    assert seen == expected


def test_an_epoch_that_the_trainer_ends_early_is_over():
    expected = [epoch[:2] for epoch in epochs(loader(), 3)]
    source = loader(max_batches=2)
    assert [rows(islice(iter(source), 2)) for _ in range(2)] == expected[:2]
    after = resumed(source.state_dict(), max_batches=2)
    assert rows(islice(iter(after), 2)) == expected[2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_iteration_left_behind_does_not_disturb_the_next(num_workers):
    source = loader(num_workers=num_workers)
    next(iter(source))
    assert epochs(source, 2) == epochs(loader(), 3)[1:]


def test_ranks_go_on_from_the_state_of_rank_0_and_in_another_number():
    expected = epochs(loader(num=12), 2)
    sources = [loader(num=12, rank=rank, world_size=2) for rank in range(2)]
    for source in sources:
        rows(islice(iter(source), 1))
    assert sources[0].state_dict() == sources[1].state_dict()
    halves = [resumed(sources[0].state_dict(), num=12, rank=rank, world_size=2) for rank in range(2)]
    whole = resumed(sources[0].state_dict(), num=12)
    assert rows(whole) == expected[0][1:]
    for batch, *parts in zip(expected[0][1:], *map(rows, halves), strict=True):
        assert sorted(flat(parts)) == sorted(batch)


# Several sources.


def test_an_epoch_takes_so_many_of_each_source():
    source = mixed((20, 3), (5, 5), (7, 2))
    assert len(source) == 3
    seen = [flat(epoch) for epoch in epochs(source, 200)]
    for epoch in seen:
        assert len(set(epoch)) == len(epoch) == 10
        assert [sum(low <= row < high for row in epoch) for low, high in ((0, 20), (20, 25), (25, 32))] == [3, 5, 2]
    # Which of them, and in which order, is another matter every time.
    assert len(set(map(tuple, seen))) == 200
    assert len({frozenset(epoch) for epoch in seen}) > 190
    counts = Counter(row for epoch in seen for row in epoch)
    assert all(10 <= counts[row] <= 60 for row in range(20))  # 30 on the mean
    assert all(counts[row] == 200 for row in range(20, 25))
    assert all(30 <= counts[row] <= 90 for row in range(25, 32))  # 57 on the mean


def test_sources_are_mixed_within_an_epoch():
    places = [
        place for epoch in epochs(mixed((50, 50), (50, 50)), 20) for place, row in enumerate(flat(epoch)) if row < 50
    ]
    assert 47 < sum(places) / len(places) < 52
    assert max(places) - min(places) > 90


def test_sources_taken_whole_are_a_permutation():
    assert sorted(flat(rows(mixed((3, 3), (8, 8))))) == list(range(11))
    # One source alone is in the order that it always had: golden losses hang on it.
    for epoch in range(2):
        order = torch.randperm(11, generator=torch.Generator().manual_seed(3 * 1_000_003 + epoch)).tolist()
        assert flat(rows(mixed((11, 11), seed=3, epoch=epoch))) == order


def test_without_shuffling_sources_stand_behind_each_other():
    source = mixed((4, 2), (9, 3), shuffle=False)
    assert epochs(source, 2) == 2 * [[[0, 1, 4, 5], [6]]]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_partition_mixed_batches(world_size):
    for epoch in range(3):
        parts = (20, 5), (9, 9)
        whole = rows(mixed(*parts, epoch=epoch))
        shares = [rows(mixed(*parts, epoch=epoch, rank=rank, world_size=world_size)) for rank in range(world_size)]
        assert [len(batch) for batch in whole] == [4, 4, 4, 2]
        for batch, *together in zip(whole, *shares, strict=True):
            assert sorted(flat(together)) == sorted(batch)


def test_a_mixed_loader_goes_on_with_the_very_next_batch():
    parts = (20, 5), (9, 9)
    expected = epochs(mixed(*parts), 3)
    source = mixed(*parts)
    rows(source)
    rows(islice(iter(source), 2))
    after = mixed(*parts, seed=99)
    after.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert epochs(after, 2) == [expected[1][2:], expected[2]]
    # Other shares are other data.
    with pytest.raises(UsageError, match="with training examples 14, now training examples 15"):
        mixed((20, 6), (9, 9)).load_state_dict(source.state_dict())


def test_the_place_in_a_stream_is_none_in_an_epoch():
    state = {"position": 1, "taken": 4, "seed": 0, "batch_size": 4, "buffer": 9}
    with pytest.raises(UsageError, match="with training examples None, now training examples 11"):
        loader().load_state_dict(state)


# Pieces.


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_heavy_share_comes_in_pieces_and_a_light_one_whole(num_workers):
    lengths = [2, 9, 4, 3, 30, 2, 2, 2]
    batches = list(loader(8, lengths=lengths, shuffle=False, most_tokens=10, num_workers=num_workers))
    assert [[piece.row.tolist() for piece in batch.pieces] for batch in batches] == [[[1], [0, 2, 3]], [[4], [5, 6, 7]]]
    assert all(isinstance(batch, MicroBatches) for batch in batches)
    assert [batch.joined([piece.row for piece in batch.pieces]).tolist() for batch in batches] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]
    whole = list(loader(8, lengths=lengths, shuffle=False, most_tokens=18))
    assert [isinstance(batch, PreferenceBatch) for batch in whole] == [True, False]
    assert whole[0].joined([whole[0].row]).tolist() == [0, 1, 2, 3]


def test_pieces_change_neither_order_nor_place():
    lengths = np.random.default_rng(0).integers(2, 40, 30)
    whole, split = (loader(30, lengths=lengths, most_tokens=most) for most in (None, 50))
    begun = [iter(source) for source in (whole, split)]
    for _ in range(4):
        one, other = map(next, begun)
        assert len(other.pieces) > 1
        assert sorted(flat(rows([one]))) == sorted(flat(rows([other])))
    assert whole.state_dict() == split.state_dict()


def test_ranks_have_equally_many_pieces():
    lengths = [30, 2, 2, 2, 2, 2, 2, 2]  # dealt 30 + 6 and 8
    shares = [next(iter(loader(8, 8, lengths=lengths, rank=rank, world_size=2, most_tokens=10))) for rank in (0, 1)]
    assert [len(batch.pieces) for batch in shares] == [2, 2]
    assert sorted(flat(rows(shares))) == list(range(8))
