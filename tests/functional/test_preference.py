"""Each formula against `math` alone, and the identities that tie the formulas to each other."""

import itertools
import math

import pytest
import torch

from dpo_lightning.functional.preference import (
    best_of_k_nll,
    bradley_terry_nll,
    discopop_loss,
    exo_pair_loss,
    hinge_preference_loss,
    implicit_rewards,
    plackett_luce_nll,
    quantile_margins,
    robust_bradley_terry_nll,
    squared_preference_loss,
)

MARGINS = [-3.0, -0.5, 0.0, 0.5, 3.0]


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def log_sigmoid(margin):
    return -math.log1p(math.exp(-margin))


def ranking(*rewards):
    """Loss of one ranking without absent responses."""
    return plackett_luce_nll(double([rewards]), torch.ones(1, len(rewards), dtype=torch.bool)).item()


def gradient_of(function, values):
    leaf = values.clone().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


def test_implicit_rewards_are_beta_log_ratios():
    rewards = implicit_rewards(double([[-3.0, -5.0]]), double([[-4.0, -1.0]]), beta=0.5)
    assert rewards.tolist() == [[0.5, -2.0]]


@pytest.mark.parametrize(
    ("margin", "label_smoothing", "expected"),
    [
        (0.0, 0.0, math.log(2)),  # a coin flip
        (1.0, 0.0, math.log1p(math.exp(-1.0))),
        (-2.0, 0.0, math.log1p(math.exp(2.0))),
        (0.0, 0.3, math.log(2)),
        (1.0, 0.25, 0.75 * math.log1p(math.exp(-1.0)) + 0.25 * math.log1p(math.exp(1.0))),
    ],
)
def test_bradley_terry_by_hand(margin, label_smoothing, expected):
    assert bradley_terry_nll(double([margin]), label_smoothing).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.4])
def test_conservative_loss_is_the_expectation_over_flipped_labels(epsilon):
    margin = double(MARGINS)
    expected = (1 - epsilon) * bradley_terry_nll(margin) + epsilon * bradley_terry_nll(-margin)
    torch.testing.assert_close(bradley_terry_nll(margin, epsilon), expected)


@pytest.mark.parametrize(
    ("margin", "epsilon", "expected"),
    [
        (0.0, 0.2, math.log(2)),
        (1.0, 0.1, (-0.9 * log_sigmoid(1.0) + 0.1 * log_sigmoid(-1.0)) / 0.8),
        (4.0, 0.4, (-0.6 * log_sigmoid(4.0) + 0.4 * log_sigmoid(-4.0)) / 0.2),  # below zero, as the estimate may be
    ],
)
def test_robust_loss_by_hand(margin, epsilon, expected):
    assert robust_bradley_terry_nll(double([margin]), epsilon).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.4])
def test_robust_loss_under_flipped_labels_is_unbiased(epsilon):
    # Theorem of arXiv:2403.00409: its expectation over flips is the loss under true labels.
    margin = double(MARGINS)
    right, flipped = (robust_bradley_terry_nll(sign * margin, epsilon) for sign in (1, -1))
    torch.testing.assert_close((1 - epsilon) * right + epsilon * flipped, bradley_terry_nll(margin))


@pytest.mark.parametrize(
    ("log_ratio", "tau", "expected"), [(0.0, 0.1, 25.0), (5.0, 0.1, 0.0), (-1.0, 0.5, 4.0), (7.0, 0.1, 4.0)]
)
def test_squared_loss_by_hand(log_ratio, tau, expected):
    assert squared_preference_loss(double([log_ratio]), tau).item() == pytest.approx(expected)


@pytest.mark.parametrize(("margin", "expected"), [(-2.0, 3.0), (0.0, 1.0), (0.25, 0.75), (1.0, 0.0), (9.0, 0.0)])
def test_hinge_by_hand(margin, expected):
    assert hinge_preference_loss(double([margin])).item() == expected


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("epsilon", [1e-3, 0.2])
def test_exo_by_hand_is_a_divergence(margin, epsilon):
    right = 1 / (1 + math.exp(-margin))
    expected = right * math.log(right / (1 - epsilon)) + (1 - right) * math.log((1 - right) / epsilon)
    assert exo_pair_loss(double([margin]), epsilon).item() == pytest.approx(expected, rel=1e-12)
    assert expected > 0


@pytest.mark.parametrize(("margin", "tau"), [(-3.0, 0.05), (-0.02, 0.05), (0.0, 0.5), (0.03, 0.05), (3.0, 0.05)])
def test_discopop_by_hand(margin, tau):
    blend = 1 / (1 + math.exp(-margin / tau))
    expected = (1 - blend) * math.log1p(math.exp(-margin)) + blend * math.exp(-margin)
    assert discopop_loss(double([margin]), tau).item() == pytest.approx(expected, rel=1e-12)


def test_discopop_is_logistic_on_the_left_and_exponential_on_the_right():
    assert discopop_loss(double([-5.0]), 0.05).item() == pytest.approx(math.log1p(math.exp(5.0)))
    assert discopop_loss(double([5.0]), 0.05).item() == pytest.approx(math.exp(-5.0))


def test_quantile_margins_by_hand():
    # Counted: 3, 1, 2 against 0, 5, -1, which in order are -1, 0, 5.
    counted = torch.tensor([True, True, False, True])
    got = quantile_margins(double([3.0, 1.0, 99.0, 2.0]), double([0.0, 5.0, -99.0, -1.0]), counted)
    assert got.tolist() == [3.0 - 5.0, 1.0 - -1.0, 0.0, 2.0 - 0.0]


def test_gradients_of_quantile_margins_reach_both_samples():
    first, second = double([3.0, 1.0, 2.0]).requires_grad_(), double([0.0, 5.0, -1.0]).requires_grad_()
    counted = torch.tensor([True, True, True])
    assert torch.autograd.gradcheck(lambda u, v: quantile_margins(u, v, counted), (first, second))
    (quantile_margins(first, second, counted) * double([1.0, 10.0, 100.0])).sum().backward()
    assert first.grad.tolist() == [1.0, 10.0, 100.0]
    assert second.grad.tolist() == [-100.0, -1.0, -10.0]


def test_a_ranking_of_three_by_hand():
    a, b, c = math.exp(1.0), math.exp(-0.5), math.exp(0.2)
    expected = -math.log(a / (a + b + c)) - math.log(b / (b + c))
    assert ranking(1.0, -0.5, 0.2) == pytest.approx(expected, rel=1e-12)


def test_absent_responses_take_no_part_in_a_ranking():
    rewards = double([[1.0, -0.5, 0.2], [0.7, 0.1, 99.0], [3.0, -99.0, 99.0]])
    present = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    expected = [ranking(1.0, -0.5, 0.2), math.log1p(math.exp(-0.6)), 0.0]
    torch.testing.assert_close(plackett_luce_nll(rewards, present), double(expected))
    gradient = gradient_of(lambda values: plackett_luce_nll(values, present), rewards)
    assert torch.equal(gradient != 0, torch.tensor([[True] * 3, [True, True, False], [False] * 3]))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_likelihoods_of_all_rankings_sum_to_one(count):
    rewards = [0.3, -1.2, 2.0, 0.7][:count]
    likelihoods = [math.exp(-ranking(*order)) for order in itertools.permutations(rewards)]
    assert sum(likelihoods) == pytest.approx(1.0, rel=1e-12)


def test_a_ranking_of_two_is_bradley_terry():
    rewards = double([[a, b] for a, b in itertools.product(MARGINS, MARGINS)])
    got = plackett_luce_nll(rewards, torch.ones_like(rewards, dtype=torch.bool))
    torch.testing.assert_close(got, bradley_terry_nll(rewards[:, 0] - rewards[:, 1]))


def test_the_best_of_k_by_hand_is_the_first_factor_of_a_ranking():
    rewards = double([[1.0, -0.5, 0.2], [0.7, 0.1, 99.0], [3.0, -99.0, 99.0]])
    present = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    total = math.exp(1.0) + math.exp(-0.5) + math.exp(0.2)
    expected = [math.log(total) - 1.0, math.log1p(math.exp(-0.6)), 0.0]
    torch.testing.assert_close(best_of_k_nll(rewards, present), double(expected))
    rest = plackett_luce_nll(rewards[:, 1:], present[:, 1:])
    torch.testing.assert_close(best_of_k_nll(rewards, present) + rest, plackett_luce_nll(rewards, present))
    gradient = gradient_of(lambda values: best_of_k_nll(values, present), rewards)
    assert torch.equal(gradient != 0, torch.tensor([[True] * 3, [True, True, False], [False] * 3]))


def test_a_ranking_knows_no_common_shift():
    assert ranking(1.0, -0.5, 0.2) == pytest.approx(ranking(101.0, 99.5, 100.2), rel=1e-12)


@pytest.mark.parametrize(
    "function",
    [
        bradley_terry_nll,
        lambda margin: bradley_terry_nll(margin, 0.2),
        lambda margin: robust_bradley_terry_nll(margin, 0.2),
        lambda margin: squared_preference_loss(margin, 0.1),
        lambda margin: exo_pair_loss(margin, 0.01),
        lambda margin: discopop_loss(margin, 0.9),  # at 0.05 there is a hump at zero
        hinge_preference_loss,
    ],
)
def test_gradients_in_the_margin_equal_finite_differences_and_pull_it_up_at_zero(function):
    assert torch.autograd.gradcheck(function, double(MARGINS).requires_grad_())
    assert gradient_of(function, double([0.0])).item() < 0


def test_gradients_of_rankings_equal_finite_differences():
    rewards = double([[0.3, -1.2, 2.0], [1.0, 1.0, 0.5], [0.2, 0.1, 0.0]]).requires_grad_()
    present = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    assert torch.autograd.gradcheck(lambda values: plackett_luce_nll(values, present), rewards)


def test_the_best_response_is_pulled_up_and_the_worst_pushed_down():
    present = torch.ones(1, 3, dtype=torch.bool)
    gradient = gradient_of(lambda values: plackett_luce_nll(values, present), double([[0.0, 0.0, 0.0]]))
    # d/dr_k of sum_k (logsumexp of the tail - r_k), at equal rewards: shares 1/3 of three, 1/2 of two
    torch.testing.assert_close(gradient, double([[1 / 3 - 1, 1 / 3 + 1 / 2 - 1, 1 / 3 + 1 / 2]]))


def test_extreme_margins_stay_finite_and_right_in_fp32():
    margin = torch.tensor([-1e4, 1e4])
    assert bradley_terry_nll(margin).tolist() == [1e4, 0.0]
    assert gradient_of(bradley_terry_nll, margin).tolist() == [-1.0, 0.0]
    assert exo_pair_loss(margin, 1e-3).tolist() == pytest.approx([-math.log(1e-3), -math.log(1 - 1e-3)], rel=1e-4)
    assert discopop_loss(margin, 0.05).tolist() == [1e4, 0.0]
    for function in (lambda values: exo_pair_loss(values, 1e-3), lambda values: discopop_loss(values, 0.05)):
        assert gradient_of(function, margin).isfinite().all()
    present = torch.ones(2, 3, dtype=torch.bool)
    rewards = torch.tensor([[0.0, 1e4, -1e4], [1e4, 0.0, -1e4]])
    assert best_of_k_nll(rewards, present).tolist() == [1e4, 0.0]
    assert plackett_luce_nll(rewards, present).tolist() == [1e4, 0.0]
    gradient = gradient_of(lambda values: plackett_luce_nll(values, present), rewards)
    # logcumsumexp differentiates by differences of logarithms, and fp32 numbers near 1e4 lie 0.001 apart.
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), atol=1e-3, rtol=0)
