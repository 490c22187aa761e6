"""What is said about the whole next-token distribution at a position, again in chunks of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpo_lightning.functional.head import Head, HeadGradients, Outputs, product_dtype


def token_kl(reference: Outputs, policy: Outputs, *, chunk_bytes: int | None = None) -> Tensor:
    r"""Divergence of two next-token distributions at every row, differentiable in the policy.

    .. math:: D_n = \sum_v \pi_{ref}(v) \left( \log \pi_{ref}(v) - \log \pi(v) \right)

    Its sum over a response is the sequential KL divergence of TDPO (arXiv:2404.11999, Eq. 9).

    Args:
        reference: Hidden states and head of the reference, which gets no gradient.
        policy: Those of the policy, row by row at the same positions.
        chunk_bytes: Bound on the memory that the logits of either take at any time; by default one that suits the
            device.

    Returns:
        Divergences in nats, fp32 or wider, shape ``(N,)``.
    """
    constants = (policy.scale, policy.softcap)
    return _TokenKL.apply(policy.hidden, policy.weight, policy.bias, constants, reference, chunk_bytes)


@torch.no_grad()
def log_collision(outputs: Outputs, *, chunk_bytes: int | None = None) -> Tensor:
    r"""Log of the probability that two draws from a next-token distribution agree, without gradient.

    .. math:: \log \sum_v \pi(v)^2

    The weights of WPO (arXiv:2406.11827) measure a token's probability against it.

    Args:
        outputs: Hidden states and head.
        chunk_bytes: Bound on the memory that logits take at any time; by default one that suits the device.

    Returns:
        Values in nats, at most 0, fp32 or wider, shape ``(N,)``.
    """
    dtype = product_dtype(outputs.hidden)
    with torch.autocast(outputs.hidden.device.type, enabled=False):
        head = Head(outputs, dtype)
        values = outputs.hidden.new_empty(outputs.hidden.shape[0], dtype=head.wide)
        for chunk in head.chunks(chunk_bytes):
            values[chunk] = head.logits(chunk).log_softmax(-1).mul_(2).logsumexp(-1)
    return values


class _TokenKL(torch.autograd.Function):
    """Rows in chunks; backward recomputes the logits of both."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        constants: tuple[float, float | None],
        reference: Outputs,
        chunk_bytes: int | None,
    ) -> Tensor:
        ctx.dtype, ctx.constants, ctx.chunk_bytes = product_dtype(hidden), constants, chunk_bytes
        ctx.reference_constants = (reference.scale, reference.softcap)
        with torch.autocast(hidden.device.type, enabled=False):
            head, frozen = Head(Outputs(hidden, weight, bias, *constants), ctx.dtype), Head(reference, ctx.dtype)
            values = hidden.new_empty(hidden.shape[0], dtype=head.wide)
            for chunk in head.chunks(chunk_bytes):
                expected = frozen.logits(chunk).log_softmax(-1)
                difference = expected - head.logits(chunk).log_softmax(-1)
                values[chunk] = (expected.exp_() * difference).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, reference.hidden, reference.weight, reference.bias)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *frozen_parts = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            head = Head(Outputs(hidden, weight, bias, *ctx.constants), ctx.dtype)
            frozen = Head(Outputs(*frozen_parts, *ctx.reference_constants), ctx.dtype)
            gradients = HeadGradients(head, (needs_hidden, needs_weight, needs_bias))
            for chunk in head.chunks(ctx.chunk_bytes):
                logits = head.logits(chunk)
                slope = head.slope(logits)
                # d D / d z_v = pi(v) - pi_ref(v)
                grad_logits = logits.softmax(-1).sub_(frozen.logits(chunk).softmax(-1)).mul_(grad[chunk, None])
                gradients.add(chunk, grad_logits, slope)
        return *gradients.result(), None, None, None
