"""Estimates and their uncertainty where several measurements belong to one prompt, of NumPy arrays."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from math import comb, log, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpo_lightning.metrics import wilson_interval


class Estimate(NamedTuple):
    """A mean.

    Attributes:
        mean: Over all measurements, each counting the same.
        se: Its standard error; None of a single group, whose like nobody has seen.
    """

    mean: float
    se: float | None


class Interval(NamedTuple):
    """Where a mean lies, with 95 % confidence."""

    low: float
    high: float


def clustered_mean(values: ArrayLike, groups: Iterable[Hashable]) -> Estimate:
    r"""Mean with a standard error that holds where measurements of one group are alike.

    .. math:: SE^2 = \frac{G}{G - 1} \frac{1}{n^2} \sum_g \Big( \sum_{i \in g} (v_i - \bar v) \Big)^2

    The cluster-robust variance of Liang and Zeger 1986 for a mean, with the usual factor for few groups. Groups of
    one size give the standard error of their means, :math:`s_{\bar v_g} / \sqrt G`.

    Args:
        values: Measurements, shape ``(n,)``.
        groups: The group of each, any labels, shape ``(n,)``.
    """
    value, sums = _deviations(values, groups)
    count = len(sums)
    if count < 2:
        return Estimate(float(value.mean()), None)
    return Estimate(float(value.mean()), sqrt(count / (count - 1) * float(sums @ sums)) / len(value))


def between_groups_sd(groups: Iterable[ArrayLike]) -> float | None:
    r"""Standard deviation of the groups' true means, without the noise of the measurements that tell them.

    .. math:: \sqrt{\max\Big(0,\; s^2(\bar v_g) - \frac{1}{G} \sum_g s_g^2 / n_g\Big)}

    with unbiased variances: that of the measured means, less the mean variance that measuring gives them, as in a
    one-way analysis of variance. Its square is unbiased but for the 0, whatever the groups' sizes and spreads.

    Args:
        groups: Measurements of each group, shape ``(n_g,)``.

    Returns:
        None of a single group, and where a group has a single measurement, whose noise nobody knows.
    """
    values = [np.asarray(group, dtype=float) for group in groups]
    if len(values) < 2 or min(map(len, values)) < 2:
        return None
    noise = np.mean([value.var(ddof=1) / len(value) for value in values])
    return sqrt(max(0.0, float(np.var([value.mean() for value in values], ddof=1) - noise)))


def rate_interval(values: ArrayLike, groups: Iterable[Hashable]) -> Interval:
    r"""95 % interval of a rate whose measurements are 1, 0, or between for ties; it stays within [0, 1].

    Wilson 1927 with an effective number of measurements :math:`n' = n / d` (Dean and Pagano 2015), where the design
    effect d, at least 1, is the clustered variance of the mean over the one that ungrouped measurements would have.
    Where all are equal no variance is seen, and every group counts as one measurement. A tie counts like a coin
    flipped, which makes the interval wider than need be, never narrower.

    .. math:: \frac{p + z^2 / 2n' \pm z \sqrt{p (1 - p) / n' + z^2 / 4n'^2}}{1 + z^2 / n'}

    Args:
        values: Measurements in [0, 1], shape ``(n,)``.
        groups: The group of each, any labels, shape ``(n,)``.
    """
    value, sums = _deviations(values, groups)
    rate, count, size = float(value.mean()), len(sums), len(value)
    spread = float(((value - rate) ** 2).sum())
    if spread > 0 and count > 1:
        effective = size / max(1.0, count / (count - 1) * float(sums @ sums) / (size / (size - 1) * spread))
    else:
        effective = count
    low, high = wilson_interval(rate, effective)
    return Interval(max(0.0, low), min(1.0, high))


def best_of_n(scores: Sequence[float], n: int, measured: Sequence[float] | None = None) -> float:
    r"""What the sample of the highest score is worth among n of K, the mean over all choices of n of them.

    .. math:: \sum_{i=n}^{K} r_{(i)} \binom{i - 1}{n - 1} \Big/ \binom{K}{n}

    with samples sorted upwards by score: the i-th is the highest of so many of the :math:`\binom{K}{n}` subsets.
    Samples of one score share what falls to them evenly. It is unbiased for n fresh samples, the estimator of Nakano et
    al. 2021 (arXiv:2112.09332, appendix I).

    Args:
        scores: Of the K samples of a prompt, by which the best is chosen.
        n: Number of samples among which the best is taken, 1 to K.
        measured: What each sample is worth; its score unless given.
    """
    assert 1 <= n <= len(scores)
    worth = np.asarray(scores if measured is None else measured, dtype=float)
    total = comb(len(scores), n)
    # Exact integers first: the coefficients of hundreds of samples are beyond float64.
    weights = [comb(i - 1, n - 1) / total for i in range(1, len(scores) + 1)]
    _, start, place, alike = np.unique(np.sort(scores), return_index=True, return_inverse=True, return_counts=True)
    shared = np.add.reduceat(weights, start) / alike
    return float(np.dot(shared[place], worth[np.argsort(scores)]))


def best_of_n_kl(n: int) -> float:
    r"""Upper bound of the KL of best of n from the sampled model: :math:`\log n - (n - 1) / n`, in nats.

    Exact where no two samples are equal (Beirami et al. 2024, arXiv:2401.01879); else the KL is smaller.
    """
    return log(n) - (n - 1) / n


def agreement(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """How far two raters agree on each comparison, 1 less the distance of their verdicts.

    That is 1 for the same verdict, 0 for the opposite, one half where one of them ties.

    Args:
        first: Verdicts of a rater between 0 and 1, one half a tie, shape ``(n,)``.
        second: Those of another, same shape.
    """
    return 1 - np.abs(np.asarray(first, dtype=float) - np.asarray(second, dtype=float))


def cohen_kappa(first: ArrayLike, second: ArrayLike) -> float | None:
    r"""Agreement beyond chance, :math:`(p_o - p_e) / (1 - p_e)`, with :func:`agreement` as the weights.

    That is Cohen's kappa with linear weights (Cohen 1968) over verdicts between 0 and 1, such as 0, 0.5, 1 or the
    quarters that a judge asked in both orders gives; where none is but 0 and 1 his plain kappa (1960). None where
    chance alone agrees always, as both raters say the same of everything.

    Args:
        first: Verdicts of a rater between 0 and 1, one half a tie, shape ``(n,)``.
        second: Those of another, same shape.
    """
    observed = float(agreement(first, second).mean())
    by_chance = 1 - _distance(np.sort(np.asarray(first, dtype=float)), np.sort(np.asarray(second, dtype=float)))
    return None if by_chance == 1 else (observed - by_chance) / (1 - by_chance)


def _distance(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    r"""Mean distance of all values of one from all of another, both sorted.

    It is :math:`\int F (1 - G) + G (1 - F)` of their distribution functions, which change at their values alone.
    """
    values = np.unique(np.concatenate([first, second]))
    f, g = (np.searchsorted(one, values[:-1], side="right") / len(one) for one in (first, second))
    return float((np.diff(values) * (f * (1 - g) + g * (1 - f))).sum())


def _deviations(values: ArrayLike, groups: Iterable[Hashable]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values, and the sum over each group of their deviations from the mean."""
    value = np.asarray(values, dtype=float)
    codes: dict[Hashable, int] = {}
    index = [codes.setdefault(group, len(codes)) for group in groups]
    return value, np.bincount(index, weights=value - value.mean()).astype(np.float64)
