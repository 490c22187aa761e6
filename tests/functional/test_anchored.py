"""Losses of both rewards against `math` alone, and where each of them draws a response."""

import math

import pytest
import torch

from dpo_lightning.functional import anchored

REWARDS = [(-2.0, 1.0), (0.0, 0.0), (0.5, -0.25), (3.0, -4.0)]
SHIFT = 0.75


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def log_sigmoid(value):
    return -math.log1p(math.exp(-value))


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def bco(chosen, rejected):
    return anchored.bco_pair_loss(chosen, rejected, double(SHIFT))


def sppo(chosen, rejected):
    return anchored.sppo_hard_loss(chosen, rejected, 0.25)


def positive(chosen, rejected):
    return anchored.positive_margin(chosen, rejected, 3.0)


@pytest.mark.parametrize(("chosen", "rejected"), REWARDS)
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (anchored.nca_pair_loss, lambda w, r: -log_sigmoid(w) - 0.5 * log_sigmoid(-w) - 0.5 * log_sigmoid(-r)),
        (bco, lambda w, r: -log_sigmoid(w - SHIFT) - log_sigmoid(-(r - SHIFT))),
        (sppo, lambda w, r: (w - 2.0) ** 2 + (r + 2.0) ** 2),
        (anchored.apo_zero_loss, lambda w, r: 1 - sigmoid(w) + sigmoid(r)),
        (anchored.apo_down_loss, lambda w, r: sigmoid(w) + 1 - sigmoid(w - r)),
        (positive, lambda w, r: w - r - 3.0 * max(0.0, -w)),
    ],
    ids=["nca", "bco", "sppo", "apo_zero", "apo_down", "positive"],
)
def test_by_hand(function, expected, chosen, rejected):
    got = function(double([chosen]), double([rejected])).item()
    assert got == pytest.approx(expected(chosen, rejected), rel=1e-12)


@pytest.mark.parametrize(
    "function", [anchored.nca_pair_loss, bco, sppo, anchored.apo_zero_loss, anchored.apo_down_loss, positive]
)
def test_gradients_equal_finite_differences(function):
    chosen, rejected = (double(values).requires_grad_() for values in ([-2.0, 0.3, 3.0], [1.0, 0.4, -4.0]))
    assert torch.autograd.gradcheck(function, (chosen, rejected))


def slope(function, chosen):
    """Derivative in the chosen response's reward."""
    leaf = double([chosen]).requires_grad_()
    function(leaf, double([0.0])).sum().backward()
    return leaf.grad.item()


def test_nca_holds_chosen_rewards_where_dpo_would_let_them_rise_for_ever():
    # -log s(r) - log s(-r) / 2 is least where s(r) = 2/3.
    assert slope(anchored.nca_pair_loss, math.log(2)) == pytest.approx(0.0, abs=1e-12)
    assert slope(anchored.nca_pair_loss, 0.0) < 0 < slope(anchored.nca_pair_loss, 2.0)


def test_sppo_is_least_where_a_win_is_worth_half_of_one_over_beta():
    assert slope(sppo, 2.0) == pytest.approx(0.0)


def test_the_positive_margin_falls_faster_where_chosen_responses_become_rarer():
    assert slope(positive, 1.0) == 1.0
    assert slope(positive, -1.0) == 1.0 + 3.0


@pytest.mark.parametrize("function", [anchored.nca_pair_loss, bco, anchored.apo_zero_loss, anchored.apo_down_loss])
def test_extreme_rewards_stay_finite_in_fp32(function):
    chosen, rejected = (torch.tensor(values) for values in ([-1e4, -1e4, 1e4, 1e4], [-1e4, 1e4, -1e4, 1e4]))
    value = function(chosen.requires_grad_(), rejected)
    value.sum().backward()
    assert value.isfinite().all()
    assert chosen.grad.isfinite().all()
