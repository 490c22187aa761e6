"""Each slope is the derivative of its divergence's f, worked by `math` alone, and goes on as a line where it must."""

import math
from functools import partial

import pytest
import torch

from dpo_lightning.functional.divergences import (
    LINEAR_FROM,
    alpha_slope,
    forward_kl_slope,
    jensen_shannon_slope,
    reverse_kl_slope,
)

ALPHA = 0.3
LOG_RATIOS = [-3.0, -0.5, 0.0, 0.4, 2.5]
# f of f-DPO's Table 1 with its slope, and the constant that the slope drops.
DIVERGENCES = {
    "reverse_kl": (lambda u: u * math.log(u), reverse_kl_slope, 1.0),
    "forward_kl": (lambda u: -math.log(u), forward_kl_slope, 0.0),
    "jensen_shannon": (lambda u: u * math.log(u) - (u + 1) * math.log((u + 1) / 2), jensen_shannon_slope, 0.0),
    "alpha": (
        lambda u: (u ** (1 - ALPHA) - (1 - ALPHA) * u - ALPHA) / (ALPHA * (ALPHA - 1)),
        partial(alpha_slope, alpha=ALPHA),
        0.0,
    ),
}
every_divergence = pytest.mark.parametrize(("f", "slope", "constant"), DIVERGENCES.values(), ids=DIVERGENCES)


@every_divergence
def test_slopes_are_derivatives(f, slope, constant):
    got = slope(torch.tensor(LOG_RATIOS, dtype=torch.float64)).tolist()
    ratios = [math.exp(log_ratio) for log_ratio in LOG_RATIOS]
    expected = [(f(u * (1 + 1e-6)) - f(u * (1 - 1e-6))) / (2e-6 * u) - constant for u in ratios]
    assert got == pytest.approx(expected, rel=1e-8, abs=1e-8)


@every_divergence
def test_f_is_no_divergence_where_the_models_agree_and_convex(f, slope, constant):
    assert f(1.0) == pytest.approx(0.0)
    grid = torch.linspace(-30, 30, 301, dtype=torch.float64)
    assert (slope(grid).diff() >= 0).all()  # beyond the tangent's beginning too


@pytest.mark.parametrize("log_ratio", [-LINEAR_FROM - 5, -LINEAR_FROM, -LINEAR_FROM + 5])
def test_the_forward_kl_goes_on_as_its_tangent(log_ratio):
    leaf = torch.tensor(log_ratio, dtype=torch.float64, requires_grad=True)
    value = forward_kl_slope(leaf)
    value.backward()
    bound, beyond = min(-log_ratio, LINEAR_FROM), max(-log_ratio - LINEAR_FROM, 0.0)
    assert value.item() == pytest.approx(-math.exp(bound) * (1 + beyond), rel=1e-12)
    assert leaf.grad.item() == pytest.approx(math.exp(bound), rel=1e-12)


def test_the_alpha_divergence_goes_on_as_its_tangent():
    alpha, log_ratio = 0.25, -4 * (LINEAR_FROM + 3)
    got = alpha_slope(torch.tensor(log_ratio, dtype=torch.float64), alpha).item()
    assert got == pytest.approx(-(math.exp(LINEAR_FROM) * 4 - 1) / alpha, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@every_divergence
def test_slopes_of_ten_thousand_nats_have_finite_gradients(f, slope, constant, dtype):
    leaf = torch.tensor([-1e4, 1e4], dtype=dtype, requires_grad=True)
    value = slope(leaf.float())
    value.sum().backward()
    assert value.isfinite().all()
    assert leaf.grad.isfinite().all()
