import itertools
import math
import tracemalloc

import numpy as np
import pytest

from dpo_lightning.evaluation.statistics import (
    agreement,
    best_of_n,
    best_of_n_kl,
    between_groups_sd,
    clustered_mean,
    cohen_kappa,
    rate_interval,
)


def test_each_measurement_a_group_gives_the_plain_standard_error():
    # values 1, 2, 3, 6: mean 3, squares of deviations 4 + 1 + 0 + 9 = 14, s^2 = 14/3, se = sqrt(14/3/4)
    assert clustered_mean([1, 2, 3, 6], range(4)) == pytest.approx((3, math.sqrt(14 / 12)))


def test_groups_of_one_size_give_the_standard_error_of_their_means():
    # means 1 and 4: s^2 = 4.5, se = sqrt(4.5 / 2) = 1.5
    assert clustered_mean([0, 2, 3, 5], ["a", "a", "b", "b"]) == pytest.approx((2.5, 1.5))


def test_groups_of_unequal_size_by_hand():
    # mean 3; deviations of a: -3 + -1 = -4, of b: 4; se^2 = 2/1 * (16 + 16) / 9
    assert clustered_mean([0, 2, 7], [5, 5, 9]) == pytest.approx((3, math.sqrt(64 / 9)))


def test_a_measurement_repeated_says_nothing_new():
    values, groups = [1.0, 2.0, 4.0], [0, 1, 2]
    assert clustered_mean(values * 5, groups * 5) == pytest.approx(clustered_mean(values, groups))


def test_one_group_has_no_standard_error():
    assert clustered_mean([1, 2], [0, 0]) == (1.5, None)


def test_the_standard_error_is_the_spread_of_means_over_repetitions():
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 4)
    found = [
        clustered_mean(generator.normal(size=40)[groups] + generator.normal(size=160), groups) for _ in range(2000)
    ]
    means, errors = np.array(found).T
    assert errors.mean() == pytest.approx(means.std(), rel=0.05)  # two standard errors of a spread of 2000 is 3 %
    assert means.std() == pytest.approx(math.sqrt((1 + 1 / 4) / 40), rel=0.05)


def test_rates_are_wilsons_interval_where_each_prompt_has_one():
    # 8 of 10, z = 1.96: the interval that textbooks print
    assert rate_interval([1] * 8 + [0] * 2, range(10)) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_rates_at_the_ends_have_an_interval_all_the_same():
    z2 = 1.959963984540054**2
    assert rate_interval([1] * 5, range(5)) == pytest.approx((5 / (5 + z2), 1))
    assert rate_interval([0] * 5, range(5)) == pytest.approx((0, z2 / (5 + z2)))
    assert rate_interval([1] * 10, [0, 1, 2, 3, 4] * 2) == pytest.approx((5 / (5 + z2), 1))  # five prompts, not ten
    low, high = rate_interval([0.5] * 20, range(20))
    assert low < 0.31 < 0.69 < high


def test_rates_of_repeated_measurements_are_no_surer():
    values = [1, 1, 0, 1, 0.5, 0]
    once, thrice = rate_interval(values, range(6)), rate_interval(values * 3, list(range(6)) * 3)
    assert thrice.low == pytest.approx(once.low, abs=0.02)
    assert thrice.high == pytest.approx(once.high, abs=0.02)


@pytest.mark.parametrize(("rate", "ties"), [(0.5, 0.0), (0.9, 0.0), (0.6, 0.5)])
def test_the_interval_holds_the_truth_19_times_in_20(rate, ties):
    """Prompts of their own rates (Beta with mean ``rate``), four measurements each."""
    generator, held = np.random.default_rng(1), 0
    groups = np.repeat(np.arange(50), 4)
    for _ in range(600):
        wins = generator.random(200) < generator.beta(4 * rate, 4 * (1 - rate), size=50)[groups]
        values = np.where(generator.random(200) < ties, 0.5, wins)
        low, high = rate_interval(values, groups)
        held += low <= (1 - ties) * rate + ties * 0.5 <= high
    assert held / 600 > 0.925  # 0.95 less nearly three standard errors of 600 trials


def test_best_of_n_by_hand():
    # of 1, 2, 4 the pairs have maxima 2, 4, 4
    assert best_of_n([4, 1, 2], 2) == pytest.approx(10 / 3)
    assert best_of_n([4, 1, 2], 1) == pytest.approx(7 / 3)
    assert best_of_n([4, 1, 2], 3) == 4


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_best_of_n_is_the_mean_maximum_over_all_subsets(n):
    scores = np.round(np.random.default_rng(n).normal(size=8), 1)  # with equal ones among them
    expected = np.mean([max(subset) for subset in itertools.combinations(scores, n)])
    assert best_of_n(scores, n) == pytest.approx(expected)


def test_best_of_n_of_many_samples_does_not_overflow():
    scores = np.arange(2000) / 2000
    assert best_of_n(scores, 1000) == pytest.approx((1000 / 1001) * (2001 / 2000) - 1 / 2000, abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_best_of_n_by_another_number_is_the_mean_over_all_subsets_with_equal_ones_sharing(n):
    generator = np.random.default_rng(n)
    scores, worth = generator.integers(0, 4, size=7), generator.normal(size=7)
    expected = []
    for subset in itertools.combinations(range(7), n):
        best = max(scores[list(subset)])
        expected.append(np.mean([worth[place] for place in subset if scores[place] == best]))
    assert best_of_n(scores, n, worth) == pytest.approx(np.mean(expected))


def test_bound_of_best_of_n():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(4) == pytest.approx(1.38629 - 0.75, abs=1e-5)


def test_the_bound_is_reached_where_no_two_samples_are_equal():
    """Best of n of a uniform order over m outcomes: the i-th is taken with probability (i^n - (i-1)^n) / m^n."""
    rank, m, n = np.arange(1, 20001), 20000, 4
    taken = (rank / m) ** n - ((rank - 1) / m) ** n
    exact = float((taken * np.log(taken * m)).sum())
    assert exact == pytest.approx(best_of_n_kl(n), abs=1e-3)
    assert exact < best_of_n_kl(n)


def test_agreement_and_kappa_by_hand():
    first, second = [1, 1, 0, 0], [1, 0, 0, 0]
    assert agreement(first, second).tolist() == [1, 0, 1, 1]
    # p_o = 3/4; p_e = 1/2 * 1/4 + 1/2 * 3/4 = 1/2
    assert cohen_kappa(first, second) == pytest.approx(0.5)
    assert agreement([0.5, 0.5, 1], [1, 0.5, 0]).tolist() == [0.5, 1, 0]


def test_kappa_with_ties_is_cohens_with_linear_weights():
    """Cicchetti and Allison's weights 1 - |i - j| / 2 over the table of verdicts, worked out cell by cell."""
    first, second = [0, 0, 0.5, 1, 1, 0.5, 0], [0, 0.5, 0.5, 1, 0, 1, 0]
    table = np.zeros((3, 3))
    for a, b in zip(first, second, strict=True):
        table[int(2 * a), int(2 * b)] += 1 / 7
    weights = 1 - np.abs(np.subtract.outer(np.arange(3), np.arange(3))) / 2
    observed = (weights * table).sum()
    chance = (weights * np.outer(table.sum(1), table.sum(0))).sum()
    assert cohen_kappa(first, second) == pytest.approx((observed - chance) / (1 - chance))


def test_kappa_ends():
    assert cohen_kappa([1, 0, 1], [1, 0, 1]) == 1
    assert cohen_kappa([1, 0, 1, 0], [0, 1, 0, 1]) == -1
    assert cohen_kappa([1, 1], [1, 1]) is None


def test_kappa_of_quarters_is_that_of_all_pairs_and_of_many_takes_little_memory():
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 5, size=(2, 60)) / 4
    observed, chance = agreement(first, second).mean(), agreement(first[:, None], second).mean()
    assert cohen_kappa(first, second) == pytest.approx((observed - chance) / (1 - chance))
    many = generator.random((2, 20_000))
    assert _peak(lambda: cohen_kappa(*many)) < 20_000_000  # bytes; a table of all pairs has 3.2 billion


def test_the_names_of_groups_may_be_long():
    values, groups = [0, 1] * 200, [f"{number // 2}{'x' * (100_000 if number == 0 else 1)}" for number in range(400)]
    assert _peak(lambda: rate_interval(values, groups)) < 1_000_000
    assert rate_interval(values, groups) == rate_interval(values, [0, 1, *(2 + i // 2 for i in range(398))])


def _peak(call):
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_spread_of_groups_by_hand():
    # means 1 and 4, variance 4.5; each group has a variance of 2 and two measurements
    assert between_groups_sd([[0, 2], [3, 5]]) == pytest.approx(3.5**0.5)
    # means 1, 4 and 7, variance 9; noise 2 / 2, 1 / 3 and 0
    assert between_groups_sd([[0, 2], [3, 4, 5], [7, 7]]) == pytest.approx((9 - 4 / 9) ** 0.5)
    assert between_groups_sd([[0, 2], [2, 0]]) == 0
    assert between_groups_sd([[0, 2]]) is None
    assert between_groups_sd([[0, 2], [1]]) is None


@pytest.mark.parametrize("sizes", [[2], [2, 3, 9]])
@pytest.mark.parametrize("truth", [0.0, 0.5])
def test_spread_of_groups_is_without_the_noise_of_measurements(truth, sizes):
    """Unit noise, which at two measurements a group would make the means differ by 0.7 where the groups are alike."""
    rng = np.random.default_rng(0)
    offsets = truth * rng.standard_normal(4000)
    groups = [offset + rng.standard_normal(sizes[place % len(sizes)]) for place, offset in enumerate(offsets)]
    found = between_groups_sd(groups)
    assert found**2 == pytest.approx(truth**2, abs=0.06)  # three standard errors and more
