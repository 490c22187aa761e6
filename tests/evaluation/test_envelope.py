import numpy as np
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
    curve = [Vertex(0, 0, 0.1), Vertex(1, 1, 0.1), Vertex(3, 2, 0.5)]
    assert reward_at(curve, 1) == (1, 0.1)
    # a quarter of the way from (1, 1) to (3, 2): 1.25; its error 3/4 of 0.1 and 1/4 of 0.5
    assert reward_at(curve, 1.5) == pytest.approx((1.25, 0.2))
    assert reward_at(curve, 99) == (2, 0.5)
    assert reward_at(curve, -1) is None
    assert reward_at([], 1) is None
    assert reward_at([Vertex(0, 0), Vertex(2, 1, 0.1)], 1) == (0.5, None)  # nobody knows what the first one's is


def test_advantage_by_hand():
    first = [Vertex(0, 0, 0.1), Vertex(1, 2, 0.3), Vertex(4, 2, 0.3)]
    second = [Vertex(0, 0, 0.2), Vertex(2, 1, 0.0)]
    # gaps at KL 0, 1, 2: 0, 1.5, 1; areas 0.75 and 1.25 over a range of 2
    # errors there: 0.1 + 0.2, 0.3 + 0.1, 0.3 + 0; areas 0.35 and 0.35
    assert advantage(first, second) == pytest.approx((0, 2, 1, 0, 1.5, 0.35))
    assert advantage(second, first) == pytest.approx((0, 2, -1, -1.5, 0, 0.35))
    assert advantage(first, [Vertex(0, 0), Vertex(2, 1, 0.0)]).se is None


@pytest.mark.parametrize("shared", [-1, 0, 0.5, 1])
def test_errors_are_bounds_whatever_the_points_share(shared):
    """Measurements of two methods with noise of a given correlation: how far what is told of them really scatters."""
    rng = np.random.default_rng(0)
    own, other = rng.standard_normal((2, 4000))
    along = np.stack([own, shared * own + (1 - shared**2) ** 0.5 * other])
    first = [[Vertex(0, a, 0.1), Vertex(1, 1 + b, 0.3)] for a, b in (along * [[0.1], [0.3]]).T]
    across = [[Vertex(0, a, 0.2), Vertex(1, b, 0.2)] for a, b in zip(*(0.2 * along[::-1]), strict=True)]
    between = [reward_at(curve, 0.25) for curve in first]
    assert np.std([reward for reward, _ in between]) < 1.03 * between[0][1]
    leads = [advantage(one, two) for one, two in zip(first, across, strict=True)]
    assert np.std([lead.mean for lead in leads]) < 1.03 * leads[0].se
    if shared == 1:  # and no more than they need to be
        assert np.std([reward for reward, _ in between]) > 0.97 * between[0][1]


def test_no_advantage_without_a_common_range_of_kl():
    assert advantage(corners((0, 0), (1, 1)), corners((2, 1), (3, 1))) is None
    assert advantage(corners((0, 0)), []) is None
    assert advantage(corners((0, 0), (2, 1)), corners((2, 3), (3, 4))) == pytest.approx((2, 2, -2, -2, -2, 0.2))


def test_levels_are_round_and_within_the_envelope():
    assert levels(corners((0.3, 0), (12, 1))) == [0.5, 1, 2, 5, 10]
    assert levels(corners((0, 0), (50, 1)), most=3) == [10, 20, 50]
    assert levels([]) == []
