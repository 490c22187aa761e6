"""What is made of token log-probabilities, by hand."""

import math

import pytest
import torch

from dpo_lightning.functional.likelihoods import alignment_weights, desensitized_logps, log_odds, mean_logp


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def test_means_over_tokens_are_zero_where_there_are_none():
    got = mean_logp(double([[-6.0, -1.0], [-2.0, 0.0]]), torch.tensor([[3, 2], [4, 0]]))
    assert got.tolist() == [[-2.0, -0.5], [-0.5, 0.0]]


@pytest.mark.parametrize("probability", [1e-300, 1e-8, 0.1, 0.5, 0.9, 1 - 1e-8])
def test_log_odds_by_hand(probability):
    expected = math.log(probability) - math.log1p(-probability)
    got = log_odds(double([math.log(probability)])).item()
    assert got == pytest.approx(expected, rel=1e-7, abs=1e-7)  # of 1 - 1e-8 a float knows the first eight digits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_log_odds_stay_finite_rise_and_have_finite_gradients(dtype):
    logp = torch.tensor([-1e4, -100.0, -1.0, -1e-3, -1e-6, -1e-12, -1e-30, 0.0], dtype=dtype, requires_grad=True)
    odds = log_odds(logp)
    odds.sum().backward()
    assert odds.isfinite().all()
    assert (odds.diff() >= 0).all()
    assert logp.grad.isfinite().all()
    # At impossible events log-odds are the log-probability; at certain ones, minus the log of the closest to 1.
    assert odds[0] == -1e4
    assert odds[-1].item() == pytest.approx(-math.log(torch.finfo(dtype).eps), rel=1e-5)


def test_gradients_of_log_odds_equal_finite_differences():
    assert torch.autograd.gradcheck(log_odds, double([-5.0, -1.0, -0.1, -0.01]).requires_grad_())


TOKEN = [-1.0, -2.0, -4.0, -3.0, -5.0, -6.0, -7.0, -8.0, -9.0]
LENGTH = [[3, 1, 0], [1, 2, 2]]
OWNER = [0, 0, 0, 1, 3, 4, 4, 5, 5]


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (1.0, [[-7.0, -3.0, 0.0], [-5.0, -13.0, -17.0]]),
        (0.5, [[-1.0 - 0.5 * 6.0, -3.0, 0.0], [-5.0, -6.0 - 0.5 * 7.0, -8.0 - 0.5 * 9.0]]),
        (0.0, [[-1.0, -3.0, 0.0], [-5.0, -6.0, -8.0]]),
    ],
)
def test_tokens_beyond_the_shortest_response_that_is_there_count_less(alpha, expected):
    got = desensitized_logps(double(TOKEN), torch.tensor(OWNER), torch.tensor(LENGTH), alpha)
    assert got.tolist() == expected


def test_alpha_keeps_the_precision_of_fp64():
    got = desensitized_logps(double([-1.0, -3.0, -2.0]), torch.tensor([0, 0, 1]), torch.tensor([[2, 1]]), 0.1)
    assert got[0, 0].item() == pytest.approx(-1.3, rel=1e-15)


def test_alignment_weights_by_hand():
    collision = double([-0.5, -1.0, -1.5, -2.0, -0.5, -0.5, -0.5, -0.5, -0.5])
    got = alignment_weights(double(TOKEN), collision, torch.tensor(OWNER), torch.tensor(LENGTH))
    first = math.exp((-0.5 - 1.0 - 2.5) / 3) * math.exp(-1.0)
    second = math.exp(-4.5) * math.exp((-5.5 - 6.5) / 2) * math.exp((-7.5 - 8.5) / 2)
    assert got.tolist() == pytest.approx([first, second], rel=1e-12)


def test_samples_of_the_policy_have_a_mean_log_weight_of_its_divergence_from_collisions():
    # Of a uniform distribution every token is as likely as a collision, so weights are 1.
    size = 7
    token = torch.full((5,), -math.log(size), dtype=torch.float64)
    got = alignment_weights(token, token, torch.tensor([0, 0, 0, 1, 1]), torch.tensor([[3, 2]]))
    assert got.item() == pytest.approx(1.0)
