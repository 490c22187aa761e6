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
        se: Standard error of the reward; None where it is not known.
    """

    kl: float
    reward: float
    se: float | None = None


class Advantage(NamedTuple):
    """What one envelope has over another at equal KL, where both are defined.

    Attributes:
        low: Least KL that both reach, in nats.
        high: Largest.
        mean: Mean difference of rewards over this range of KL.
        least: Smallest difference in it.
        most: Largest.
        se: Upper bound of the standard error of the mean difference; None where errors are not known.
    """

    low: float
    high: float
    mean: float
    least: float
    most: float
    se: float | None = None


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
        vertex = Vertex(point.kl, point.reward, point.reward_se)
        if vertex.kl > end or (hull and vertex.kl == hull[-1].kl):
            continue
        while len(hull) > 1 and _is_below(hull[-2], hull[-1], vertex):
            hull.pop()
        hull.append(vertex)
    farthest = max((point.kl for point in points), default=0.0)
    return [*hull, hull[-1]._replace(kl=farthest)] if farthest > end else hull


def reward_at(curve: Sequence[Vertex], kl: float) -> tuple[float, float | None] | None:
    r"""Reward of an envelope within a KL, and its standard error; None below the least KL that it knows.

    Beyond the best point it stays: nobody has to spend all of a KL. Between two points the error is
    :math:`(1 - s) \sigma_a + s \sigma_b` at the share s of the way: the upper bound whatever their correlation, which
    no file tells and which is positive for points on the same prompts, as a prompt that is easy for one policy is so
    for the next. It is the error of rewards alone; KL is taken as it was measured.
    """
    if not curve or kl < curve[0].kl:
        return None
    if kl >= curve[-1].kl:
        return curve[-1].reward, curve[-1].se
    right = next(index for index, vertex in enumerate(curve) if vertex.kl > kl)
    a, b = curve[right - 1], curve[right]
    share = (kl - a.kl) / (b.kl - a.kl)
    se = None if a.se is None or b.se is None else a.se + share * (b.se - a.se)
    return a.reward + share * (b.reward - a.reward), se


def advantage(first: Sequence[Vertex], second: Sequence[Vertex]) -> Advantage | None:
    r"""What the first envelope has over the second at equal KL; None where they share no range of KL.

    The range ends where the shorter of the two does: what lies beyond nobody measured. The mean difference is a sum of
    rewards with weights, so whatever their correlations its error is at most the sum of their errors with the sizes of
    these weights, and that at most the mean of :math:`\sigma_1 + \sigma_2` over the range. Errors that both envelopes
    share, as those of the same prompts, are really less.
    """
    if not first or not second:
        return None
    low, high = max(first[0].kl, second[0].kl), min(first[-1].kl, second[-1].kl)
    if low > high:
        return None
    places = sorted({low, high, *(vertex.kl for vertex in [*first, *second] if low < vertex.kl < high)})
    both = [(_at(first, kl), _at(second, kl)) for kl in places]
    gaps = [one - other for (one, _), (other, _) in both]
    errors = [one + other for (_, one), (_, other) in both if one is not None and other is not None]
    se = _mean(places, errors) if len(errors) == len(places) else None
    return Advantage(low, high, _mean(places, gaps), min(gaps), max(gaps), se)


def levels(curve: Sequence[Vertex], most: int = 6) -> list[float]:
    """Round values of KL that an envelope spans, from the series 1, 2, 5, 10: the largest of them."""
    series = [round(digit * 10.0**power, 6) for power in range(-4, 5) for digit in (1, 2, 5)]
    return [level for level in series if curve and curve[0].kl <= level <= curve[-1].kl][-most:]


def _at(curve: Sequence[Vertex], kl: float) -> tuple[float, float | None]:
    found = reward_at(curve, kl)
    assert found is not None
    return found


def _mean(places: Sequence[float], values: Sequence[float]) -> float:
    """Mean over a range of what is linear from place to place."""
    if len(places) == 1:
        return values[0]
    pieces = zip(pairwise(places), pairwise(values), strict=True)
    return sum((end - begin) * (left + right) / 2 for (begin, end), (left, right) in pieces) / (places[-1] - places[0])


def _is_below(a: Vertex, b: Vertex, c: Vertex) -> bool:
    """Whether b lies on or below the line from a to c."""
    return (b.reward - a.reward) * (c.kl - a.kl) <= (c.reward - a.reward) * (b.kl - a.kl)
