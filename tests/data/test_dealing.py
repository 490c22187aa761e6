"""Whoever runs an example, each is run once: in equal counts, and in nearly equal tokens."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from dpo_lightning.data.dealing import assignments, deal, num_pieces, runs, split

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40).map(np.array)
FEW = st.integers(1, 8)
SETTINGS = settings(derandomize=True, deadline=None, max_examples=200)


def flat(parts) -> list[int]:
    return [place for part in parts for place in part]


def loads(lengths, parts) -> list[int]:
    return [int(lengths[part].sum()) for part in parts]


@given(LENGTHS, FEW)
@SETTINGS
def test_deals_are_partitions_of_equal_counts_and_no_heavier_than_dealing_in_turn(lengths, num_shares):
    dealt = deal(lengths, num_shares)
    in_turn = [list(range(share, len(lengths), num_shares)) for share in range(num_shares)]
    assert sorted(flat(dealt)) == list(range(len(lengths)))
    assert list(map(len, dealt)) == list(map(len, in_turn))
    assert max(loads(lengths, dealt)) <= max(loads(lengths, in_turn))
    assert dealt == [sorted(share) for share in dealt]
    assert deal(lengths, num_shares) == dealt


def test_long_and_short_examples_are_dealt_to_all():
    lengths = np.array([90, 10, 80, 20, 70, 30, 60, 40])  # in turn: 300 and 100
    assert loads(lengths, deal(lengths, 2)) == [200, 200]


def test_equal_examples_are_dealt_in_turn():
    assert deal(np.full(7, 5), 3) == [[0, 3, 6], [1, 4], [2, 5]]


@pytest.mark.parametrize(
    ("world_size", "in_turn_at_least", "at_most"), [(2, 1.08, 1.01), (4, 1.2, 1.02), (8, 1.5, 1.05)]
)
def test_waiting_for_the_heaviest_rank_nearly_ends_on_skewed_lengths(world_size, in_turn_at_least, at_most):
    """Tokens of the heaviest rank over the mean, for global batches of 64 of lognormal lengths."""
    generator = np.random.default_rng(0)
    before, after = [], []
    for _ in range(200):
        lengths = generator.lognormal(5, 0.8, 64).astype(int) + 1
        in_turn = [list(range(share, 64, world_size)) for share in range(world_size)]
        for parts, found in ((in_turn, before), (deal(lengths, world_size), after)):
            found.append(max(loads(lengths, parts)) * world_size / lengths.sum())
    assert np.mean(before) > in_turn_at_least
    assert np.mean(after) < at_most


@given(LENGTHS, FEW, st.integers(1, 120))
@SETTINGS
def test_pieces_are_partitions_of_shares_and_only_single_examples_are_over_the_budget(lengths, world_size, budget):
    given = assignments(lengths, world_size, budget)
    assert [sorted(flat(pieces)) for pieces in given] == deal(lengths, world_size)
    for pieces in given:
        for piece in pieces:
            assert len(piece) <= 1 or lengths[piece].sum() <= budget
    # All ranks alike, where they have examples enough.
    most = max(map(len, given))
    assert [len(pieces) for pieces in given] == [min(most, len(flat(pieces))) for pieces in given]


@given(LENGTHS, st.integers(1, 120))
@SETTINGS
def test_no_fewer_pieces_would_do(lengths, budget):
    count = num_pieces(lengths, budget)
    if count > 1:
        fewer = split(lengths, count - 1)
        assert any(len(piece) > 1 and lengths[piece].sum() > budget for piece in fewer)


def test_what_fits_is_one_piece_in_its_order():
    assert assignments(np.array([3, 9, 4]), 1, 16) == [[[0, 1, 2]]]
    assert assignments(np.array([3, 9, 4]), 1) == [[[0, 1, 2]]]


def test_an_example_over_the_budget_is_alone_and_counts_as_one():
    (pieces,) = assignments(np.array([2, 1000, 3, 4]), 1, 10)
    assert sorted(pieces) == [[0, 2, 3], [1]]


def test_pieces_of_a_share_are_nearly_equal():
    (pieces,) = assignments(np.array([6, 5, 4, 3, 2, 1, 1]), 1, 12)  # 12 and 10 would do as well
    assert loads(np.array([6, 5, 4, 3, 2, 1, 1]), pieces) == [11, 11]


def test_ranks_without_an_example_have_no_piece():
    assert assignments(np.array([5]), 2) == assignments(np.array([5]), 2, 3) == [[[0]], []]


@given(LENGTHS, st.integers(1, 120))
@SETTINGS
def test_runs_are_neighbours_as_long_as_the_budget_allows(lengths, most):
    found = list(runs(lengths, most))
    assert flat(range(len(lengths))[run] for run in found) == list(range(len(lengths)))
    for run, following in zip(found, [*found[1:], None], strict=True):
        total = lengths[run].sum()
        assert total <= most or run.stop - run.start == 1
        assert following is None or total + lengths[following.start] > most
