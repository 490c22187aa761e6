"""Divergence and collision probability of next-token distributions, against plain softmaxes, in bounded memory."""

import math

import pytest
import torch

from dpo_lightning.functional.head import Outputs
from dpo_lightning.functional.vocabulary import log_collision, token_kl

CONSTANTS = {"plain": (1.0, None), "scale": (0.25, None), "softcap": (1.0, 1.5), "both": (3.0, 1.5)}


def outputs(seed, rows=7, width=5, vocabulary=11, bias=True, constants=(1.0, None), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((rows, width), (vocabulary, width))]
    parts.append(torch.randn(vocabulary, generator=generator, dtype=torch.float64))
    hidden, weight, offset = (part.to(dtype).requires_grad_() for part in parts)
    return Outputs(hidden, weight, offset if bias else None, *constants)


def plain_log_softmax(out):
    logits = out.scale * (out.hidden @ out.weight.t() + (0 if out.bias is None else out.bias))
    return (logits if out.softcap is None else out.softcap * (logits / out.softcap).tanh()).log_softmax(-1)


def test_values_by_hand():
    # Distributions 1/2, 1/2 and 1/4, 3/4 as logits over an identity head.
    reference = Outputs(torch.zeros(1, 2), torch.eye(2))
    policy = Outputs(torch.tensor([[0.0, math.log(3)]]), torch.eye(2))
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    torch.testing.assert_close(token_kl(reference, policy), torch.tensor([expected]))
    torch.testing.assert_close(log_collision(policy), torch.tensor([math.log(1 / 16 + 9 / 16)]))


@pytest.mark.parametrize("chunk_bytes", [1, 3 * 12 * 11, 2**27])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("constants", CONSTANTS.values(), ids=CONSTANTS)
def test_values_and_gradients_equal_those_of_plain_softmaxes(constants, bias, chunk_bytes):
    reference, policy = outputs(0, bias=bias), outputs(1, bias=bias, constants=constants)
    parameters = [part for part in policy[:3] if part is not None]
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64)
    expected_logps, logps = plain_log_softmax(reference).detach(), plain_log_softmax(policy)
    expected = (expected_logps.exp() * (expected_logps - logps)).sum(-1)
    value = token_kl(reference, policy, chunk_bytes=chunk_bytes)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(log_collision(policy, chunk_bytes=chunk_bytes), logps.exp().square().sum(-1).log())
    gradients = torch.autograd.grad((value * weights).sum(), parameters)
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * weights).sum(), parameters))


def test_gradients_are_those_of_finite_differences():
    reference, policy = outputs(0), outputs(1, constants=(0.5, 2.0))
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: token_kl(reference, Outputs(hidden, weight, bias, 0.5, 2.0)), policy[:3]
    )


def test_the_reference_gets_no_gradient_and_the_collision_has_none():
    reference, policy = outputs(0), outputs(1)
    token_kl(reference, policy).sum().backward()
    assert all(part.grad is None for part in reference[:3])
    assert all(part.grad is not None for part in policy[:3])
    assert not log_collision(policy).requires_grad


def test_equal_distributions_have_no_divergence_and_no_gradient():
    policy = outputs(1)
    value = token_kl(policy, policy)
    torch.testing.assert_close(value, torch.zeros(7, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(value.sum(), policy.hidden)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_values_are_wide_and_gradients_of_their_own_dtype(dtype):
    reference, policy = outputs(0, dtype=dtype), outputs(1, dtype=dtype)
    value = token_kl(reference, policy)
    assert value.dtype == log_collision(policy).dtype == torch.promote_types(dtype, torch.float32)
    value.sum().backward()
    assert all(part.grad.dtype == dtype for part in policy[:3])


def test_autocast_is_followed():
    reference, policy = outputs(0, dtype=torch.float32), outputs(1, dtype=torch.float32)
    exact = token_kl(reference, policy)
    with torch.autocast("cpu", torch.bfloat16):
        value = token_kl(reference, policy)
    value.sum().backward()
    assert value.dtype == torch.float32
    assert 0 < (value - exact).abs().max() < 0.1
