"""How much reward a method gives for a KL, and how much more another gives for the same. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from dpo_lightning.evaluation.points import Point

BASELINE = "DPO"


class Vertex(NamedTuple):
    """A corner of an envelope.

    Attributes:
        kl: In nats.
        reward: Most that is had for it.
        se: Standard error of the reward, 0 where it is not known.
    """

    kl: float
    reward: float
    se: float = 0.0


class Advantage(NamedTuple):
    """What one envelope has over another at equal KL, where both are defined.

    Attributes:
        low: Least KL that both reach, in nats.
        high: Largest.
        mean: Mean difference of rewards over this range of KL.
        least: Smallest difference in it.
        most: Largest.
    """

    low: float
    high: float
    mean: float
    least: float
    most: float


def envelope(points: Sequence[Point]) -> list[Vertex]:
    """The least concave curve above some points, by ascending KL; beyond the best point it stays level.

    All of it can be had: a coin that chooses between two policies for every prompt has a reward on the straight line
    between theirs, and by the convexity of KL no more than the KL on that line. Of noisy points it takes the lucky
    ones, so of more points it is a little higher.
    """
    best = max((point.reward for point in points), default=0.0)
    end = min((point.kl for point in points if point.reward == best), default=0.0)
    hull: list[Vertex] = []
    for point in sorted(points, key=lambda point: (point.kl, -point.reward)):
        vertex = Vertex(point.kl, point.reward, point.reward_se or 0.0)
        if vertex.kl > end or (hull and vertex.kl == hull[-1].kl):
            continue
        while len(hull) > 1 and _is_below(hull[-2], hull[-1], vertex):
            hull.pop()
        hull.append(vertex)
    farthest = max((point.kl for point in points), default=0.0)
    return [*hull, hull[-1]._replace(kl=farthest)] if farthest > end else hull


def reward_at(curve: Sequence[Vertex], kl: float) -> tuple[float, float] | None:
    """Reward of an envelope within a KL, and its standard error; None below the least KL that it knows.

    Beyond the best point it stays: nobody has to spend all of a KL.
    """
    if not curve or kl < curve[0].kl:
        return None
    if kl >= curve[-1].kl:
        return curve[-1].reward, curve[-1].se
    right = next(index for index, vertex in enumerate(curve) if vertex.kl > kl)
    a, b = curve[right - 1], curve[right]
    share = (kl - a.kl) / (b.kl - a.kl)
    se = ((1 - share) ** 2 * a.se**2 + share**2 * b.se**2) ** 0.5
    return a.reward + share * (b.reward - a.reward), se


def advantage(first: Sequence[Vertex], second: Sequence[Vertex]) -> Advantage | None:
    """What the first envelope has over the second at equal KL; None where they share no range of KL.

    The range ends where the shorter of the two does: what lies beyond nobody measured.
    """
    if not first or not second:
        return None
    low, high = max(first[0].kl, second[0].kl), min(first[-1].kl, second[-1].kl)
    if low > high:
        return None
    places = sorted({low, high, *(vertex.kl for vertex in [*first, *second] if low < vertex.kl < high)})
    gaps = [_reward(first, kl) - _reward(second, kl) for kl in places]
    pieces = zip(pairwise(places), pairwise(gaps), strict=True)
    area = sum((end - begin) * (left + right) / 2 for (begin, end), (left, right) in pieces)
    return Advantage(low, high, area / (high - low) if high > low else gaps[0], min(gaps), max(gaps))


def levels(curve: Sequence[Vertex], most: int = 6) -> list[float]:
    """Round values of KL that an envelope spans, from the series 1, 2, 5, 10: the largest of them."""
    series = [round(digit * 10.0**power, 6) for power in range(-4, 5) for digit in (1, 2, 5)]
    return [level for level in series if curve and curve[0].kl <= level <= curve[-1].kl][-most:]


def _reward(curve: Sequence[Vertex], kl: float) -> float:
    found = reward_at(curve, kl)
    assert found is not None
    return found[0]


def _is_below(a: Vertex, b: Vertex, c: Vertex) -> bool:
    """Whether b lies on or below the line from a to c."""
    return (b.reward - a.reward) * (c.kl - a.kl) <= (c.reward - a.reward) * (b.kl - a.kl)
