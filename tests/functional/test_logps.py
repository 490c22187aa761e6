"""Chunked token log-probabilities are log_softmax of the plain logits, value and gradient, in bounded memory."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_lightning.functional.logps import sum_by_owner, token_logps

N, D, V = 10, 8, 37
ROW = 12 * V  # bytes that a row of logits is counted at
CONSTANTS = {
    "plain": {},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 1.5},
    "scale and softcap": {"scale": 3.0, "softcap": 1.5},
}


def inputs(rows=N, width=D, vocabulary=V, dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, offset = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((rows, width), (vocabulary, width), (vocabulary,))
    )
    target = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden, target, weight, offset if bias else None


def plain(hidden, target, weight, bias, scale=1.0, softcap=None):
    logits = hidden @ weight.t()
    logits = scale * (logits if bias is None else logits + bias)
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    return logits.log_softmax(-1)[torch.arange(len(target)), target]


def value_and_gradients(logps, parameters):
    """Gradients of a sum with a weight of its own, and of either sign, for every token."""
    cotangent = torch.linspace(-1, 2, len(logps)).to(logps)
    return [logps, *torch.autograd.grad((logps * cotangent).sum(), parameters)]


def test_a_value_by_hand():
    # logits 2, 0 and 1, then halved: log p = 1 - log(e + 1 + sqrt(e))
    hidden, weight, bias = torch.tensor([[1.0, 2.0]]), torch.eye(3, 2), torch.tensor([1.0, -2.0, 1.0])
    logps = token_logps(hidden, torch.tensor([0]), weight, bias, scale=0.5)
    expected = 1 - math.log(math.e + 1 + math.sqrt(math.e))
    torch.testing.assert_close(logps, torch.tensor([expected]))


@pytest.mark.parametrize("chunk_bytes", [1, ROW, 3 * ROW, 9 * ROW, 10 * ROW, 2**27], ids=lambda size: f"{size // ROW}")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("constants", CONSTANTS.values(), ids=CONSTANTS)
def test_values_and_gradients_equal_log_softmax_of_plain_logits(constants, bias, chunk_bytes):
    hidden, target, weight, offset = inputs(bias=bias)
    parameters = [hidden, weight, offset] if bias else [hidden, weight]
    expected = value_and_gradients(plain(hidden, target, weight, offset, **constants), parameters)
    logps = token_logps(hidden, target, weight, offset, **constants, chunk_bytes=chunk_bytes)
    for got, want in zip(value_and_gradients(logps, parameters), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("constants", CONSTANTS.values(), ids=CONSTANTS)
def test_gradients_equal_finite_differences(constants):
    hidden, target, weight, bias = inputs(5, 3, 7, torch.float64)

    def function(hidden, weight, bias):
        return token_logps(hidden, target, weight, bias, **constants, chunk_bytes=2 * 12 * 7)

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


def test_no_tokens_give_no_log_probabilities_and_no_gradient():
    hidden, target, weight, bias = inputs(rows=0)
    logps = token_logps(hidden, target, weight, bias)
    assert (logps.shape, logps.dtype) == ((0,), torch.float32)
    for gradient, parameter in zip(
        torch.autograd.grad(logps.sum(), (hidden, weight, bias)), (hidden, weight, bias), strict=True
    ):
        assert torch.equal(gradient, torch.zeros_like(parameter))


@pytest.mark.parametrize("frozen", [0, 1, 2], ids=["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient_and_the_others_theirs(frozen):
    hidden, target, weight, bias = inputs()
    parameters = [hidden, weight, bias]
    parameters.pop(frozen).requires_grad_(False)
    expected = value_and_gradients(plain(hidden, target, weight, bias), parameters)
    got = value_and_gradients(token_logps(hidden, target, weight, bias, chunk_bytes=4 * ROW), parameters)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("constants", CONSTANTS.values(), ids=CONSTANTS)
def test_sixteen_bit_weights_have_a_softmax_in_fp32(constants, dtype):
    hidden, target, weight, bias = inputs(dtype=dtype)
    logps = token_logps(hidden, target, weight, bias, **constants, chunk_bytes=4 * ROW)
    assert logps.dtype == torch.float32
    got = value_and_gradients(logps, [hidden, weight, bias])
    assert [gradient.dtype for gradient in got[1:]] == [dtype] * 3
    exact = [part.detach().double().requires_grad_() for part in (hidden, weight, bias)]
    expected = value_and_gradients(plain(exact[0], target, exact[1], exact[2], **constants), exact)
    for value, want in zip(got, expected, strict=True):
        assert (value.double() - want).norm() < 2 * torch.finfo(dtype).eps * want.norm()


def test_gradients_of_bf16_weights_are_summed_over_chunks_in_fp32():
    hidden, target, weight, _ = inputs(400, 8, 5, torch.bfloat16, bias=False)
    exact = weight.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(plain(hidden.double(), target, exact, None).sum(), exact)
    (gradient,) = torch.autograd.grad(token_logps(hidden, target, weight, chunk_bytes=1).sum(), weight)
    assert (gradient - expected).norm() < torch.finfo(torch.bfloat16).eps * expected.norm()


def test_a_softmax_in_bf16_would_be_far_worse():
    hidden, target, weight, _ = inputs(64, 64, 500, torch.bfloat16, bias=False)
    exact = plain(hidden.double(), target, weight.double(), None)
    error = (token_logps(hidden, target, weight) - exact).abs().max()
    in_bf16 = (plain(hidden, target, weight, None) - exact).abs().max()
    assert error < in_bf16 / 2


def test_autocast_multiplies_in_its_dtype_and_keeps_gradients_in_that_of_the_weights():
    hidden, target, weight, bias = inputs()
    expected = value_and_gradients(plain(hidden, target, weight, bias), [hidden, weight, bias])
    with torch.autocast("cpu", torch.bfloat16):
        logps = token_logps(hidden, target, weight, bias, chunk_bytes=4 * ROW)
    assert torch.equal(logps, token_logps(hidden.bfloat16(), target, weight.bfloat16(), bias))
    got = value_and_gradients(logps, [hidden, weight, bias])
    assert {value.dtype for value in got} == {torch.float32}
    for value, want in zip(got, expected, strict=True):
        assert (value - want).norm() < 0.02 * want.norm()


def test_log_probabilities_of_huge_logits_are_finite():
    hidden = torch.tensor([[1e4, 0.0]], requires_grad=True)
    logps = token_logps(hidden.expand(2, 2), torch.tensor([0, 1]), torch.eye(2))
    assert logps.tolist() == [0.0, -1e4]
    logps.sum().backward()
    assert hidden.grad.tolist() == [[-1.0, 1.0]]


class Sizes(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns, views not counted."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out._is_view():
            self.largest = max(self.largest, out.numel() * out.element_size())
        return out


@pytest.mark.parametrize("constants", CONSTANTS.values(), ids=CONSTANTS)
def test_nothing_of_tokens_times_vocabulary_is_ever_made_or_kept(constants):
    rows, width, vocabulary = 96, 4, 1000
    hidden, target, weight, bias = inputs(rows, width, vocabulary)
    chunk_bytes = 12 * vocabulary * 10
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t), Sizes() as ours:
        token_logps(hidden, target, weight, bias, **constants, chunk_bytes=chunk_bytes).sum().backward()
    with Sizes() as theirs:
        plain(hidden, target, weight, bias, **constants).sum().backward()
    assert saved
    assert max(saved) <= max(hidden.numel(), weight.numel())
    assert ours.largest == 10 * vocabulary * 4  # ten rows, so that three such tensors fill the bound
    assert theirs.largest == rows * vocabulary * 4  # what the recorder sees of the plain computation


def test_sums_by_owner_by_hand():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], dtype=torch.float64, requires_grad=True)
    owner = torch.tensor([0, 0, 1, 3, 3, 3])  # the third response of the first example and two of the second are absent
    sums = sum_by_owner(values, owner, torch.Size((2, 3)))
    assert sums.tolist() == [[3.0, 4.0, 0.0], [56.0, 0.0, 0.0]]
    assert sums.dtype == torch.float64
    (gradient,) = torch.autograd.grad((sums * torch.tensor([[1, 2, 3], [4, 5, 6]])).sum(), values)
    assert gradient.tolist() == [1, 1, 2, 4, 4, 4]
