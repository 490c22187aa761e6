import pytest

from dpo_lightning.evaluation.envelope import Vertex, advantage, envelope, levels, reward_at
from dpo_lightning.evaluation.points import Point


def points(*pairs):
    return [Point(method="m", kl=kl, reward=reward, reward_se=0.1) for kl, reward in pairs]


def corners(*pairs):
    return [Vertex(kl, reward, 0.1) for kl, reward in pairs]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([(0, 0), (1, 1), (2, 1.5)], [(0, 0), (1, 1), (2, 1.5)]),  # concave as it is
        ([(2, 2), (0, 0), (1, 0.5)], [(0, 0), (2, 2)]),  # what lies below a line goes
        ([(0, 0), (1, 1), (2, 2)], [(0, 0), (2, 2)]),  # and what lies on it
        ([(0, 0), (1, 3), (5, 1)], [(0, 0), (1, 3), (5, 3)]),  # beyond the best it stays level
        ([(1, 1), (1, 2), (3, 2.5)], [(1, 2), (3, 2.5)]),
        ([(1, 2), (2, 2)], [(1, 2), (2, 2)]),
        ([(-0.01, 0.2)], [(-0.01, 0.2)]),
        ([], []),
    ],
)
def test_envelopes(given, expected):
    assert envelope(points(*given)) == corners(*expected)


def test_rewards_between_corners_by_hand():
    curve = corners((0, 0), (1, 1), (3, 2))
    assert reward_at(curve, 1) == (1, 0.1)
    # a quarter of the way from (1, 1) to (3, 2): 1.25; its error sqrt((3/4)^2 + (1/4)^2) / 10
    assert reward_at(curve, 1.5) == pytest.approx((1.25, 0.1 * (10 / 16) ** 0.5))
    assert reward_at(curve, 99) == (2, 0.1)
    assert reward_at(curve, -1) is None
    assert reward_at([], 1) is None


def test_advantage_by_hand():
    first, second = corners((0, 0), (1, 2), (4, 2)), corners((0, 0), (2, 1))
    # gaps at KL 0, 1, 2: 0, 1.5, 1; areas 0.75 and 1.25 over a range of 2
    assert advantage(first, second) == pytest.approx((0, 2, 1, 0, 1.5))
    assert advantage(second, first) == pytest.approx((0, 2, -1, -1.5, 0))


def test_no_advantage_without_a_common_range_of_kl():
    assert advantage(corners((0, 0), (1, 1)), corners((2, 1), (3, 1))) is None
    assert advantage(corners((0, 0)), []) is None
    assert advantage(corners((0, 0), (2, 1)), corners((2, 3), (3, 4))) == pytest.approx((2, 2, -2, -2, -2))


def test_levels_are_round_and_within_the_envelope():
    assert levels(corners((0.3, 0), (12, 1))) == [0.5, 1, 2, 5, 10]
    assert levels(corners((0, 0), (50, 1)), most=3) == [10, 20, 50]
    assert levels([]) == []
