"""Estimates and their uncertainty where several measurements belong to one prompt. NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, log, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z95 = 1.959963984540054  # 0.975 quantile of the standard normal


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


def clustered_mean(values: ArrayLike, groups: ArrayLike) -> Estimate:
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


def rate_interval(values: ArrayLike, groups: ArrayLike) -> Interval:
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
    z2 = Z95**2 / effective
    middle, half = rate + z2 / 2, sqrt(z2 * rate * (1 - rate) + z2**2 / 4)
    return Interval(max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2)))


def best_of_n(scores: Sequence[float], n: int) -> float:
    r"""Expected highest score among n of K samples drawn without putting back: unbiased for n fresh samples.

    .. math:: \sum_{i=n}^{K} s_{(i)} \binom{i - 1}{n - 1} \Big/ \binom{K}{n}

    with scores sorted upwards: the i-th is the highest of so many of the :math:`\binom{K}{n}` subsets. It is the
    estimator of Nakano et al. 2021 (arXiv:2112.09332, appendix I).

    Args:
        scores: Of the K samples of a prompt.
        n: Number of samples among which the best is taken, 1 to K.
    """
    assert 1 <= n <= len(scores)
    total = comb(len(scores), n)
    # Exact integers first: the coefficients of hundreds of samples are beyond float64.
    weights = [comb(i - 1, n - 1) / total for i in range(n, len(scores) + 1)]
    return float(np.dot(weights, np.sort(np.asarray(scores, dtype=float))[n - 1 :]))


def best_of_n_kl(n: int) -> float:
    r"""Upper bound of the KL of best of n from the sampled model: :math:`\log n - (n - 1) / n`, in nats.

    Exact where no two samples are equal (Beirami et al. 2024, arXiv:2401.01879); else the KL is smaller.
    """
    return log(n) - (n - 1) / n


def agreement(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """How far two raters agree on each comparison: 1 the same verdict, 0 the opposite, one half where one ties.

    Args:
        first: Verdicts 1, 0 or 0.5 of a rater, shape ``(n,)``.
        second: Those of another, same shape.
    """
    return 1 - np.abs(np.asarray(first, dtype=float) - np.asarray(second, dtype=float))


def cohen_kappa(first: ArrayLike, second: ArrayLike) -> float | None:
    r"""Agreement beyond chance, :math:`(p_o - p_e) / (1 - p_e)`, with :func:`agreement` as the weights.

    That is Cohen's kappa with linear weights (Cohen 1968) over the ordered verdicts 0, 0.5, 1; without ties his
    plain kappa (1960). None where chance alone agrees always, as both raters say the same of everything.

    Args:
        first: Verdicts 1, 0 or 0.5 of a rater, shape ``(n,)``.
        second: Those of another, same shape.
    """
    observed = float(agreement(first, second).mean())
    by_chance = float(agreement(np.asarray(first, dtype=float)[:, None], np.asarray(second, dtype=float)).mean())
    return None if by_chance == 1 else (observed - by_chance) / (1 - by_chance)


def _deviations(values: ArrayLike, groups: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values, and the sum over each group of their deviations from the mean."""
    value = np.asarray(values, dtype=float)
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    return value, np.bincount(index, weights=value - value.mean()).astype(np.float64)
