"""Log-probabilities of given tokens, without ever holding tokens times vocabulary.

The output head and the log-softmax run on chunks of rows, in fp32 or wider, and are computed again in backward:
what is kept between the two is one number a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpo_lightning.functional.head import Head, HeadGradients, Outputs, product_dtype


def token_logps(
    hidden: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    r"""Log-probability of each target under the output head.

    .. math:: z_n = s \, (W h_n + b), \quad z_n \leftarrow c \tanh(z_n / c), \quad
              \log p_n = z_{n, y_n} - \log \sum_v e^{z_{n, v}}

    Matrix products run in the dtype of ``hidden`` (under autocast, in autocast's), everything behind them in fp32,
    or in fp64 where ``hidden`` is.

    Args:
        hidden: Hidden states that predict the targets, shape ``(N, D)``; logits, ``(N, V)``, without a weight.
        target: Token ids, int64, shape ``(N,)``.
        weight: Output head, shape ``(V, D)``.
        bias: Bias of the output head, shape ``(V,)``.
        scale: Factor of the logits (Cohere; Granite has its inverse).
        softcap: Logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).
        chunk_bytes: Bound on the memory that logits take at any time; by default one that suits the device.

    Returns:
        Log-probabilities in nats, fp32 or wider, shape ``(N,)``.
    """
    return _TokenLogps.apply(hidden, target, weight, bias, scale, softcap, chunk_bytes)


def sum_by_owner(values: Tensor, owner: Tensor, shape: torch.Size) -> Tensor:
    """Sums of ``values`` (N,) over the sequences that own them, (B, K); ``owner`` is ``example * K + response``."""
    return values.new_zeros(shape.numel()).index_add(0, owner, values).view(shape)


class _TokenLogps(torch.autograd.Function):
    """Rows in chunks; backward recomputes the logits of a chunk and turns them into their gradient in place."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        target: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        chunk_bytes: int | None,
    ) -> Tensor:
        ctx.dtype, ctx.constants, ctx.chunk_bytes = product_dtype(hidden), (scale, softcap), chunk_bytes
        with torch.autocast(hidden.device.type, enabled=False):
            head = Head(Outputs(hidden, weight, bias, scale, softcap), ctx.dtype)
            logps = hidden.new_empty(hidden.shape[0], dtype=head.wide)
            normalizer = torch.empty_like(logps)
            for chunk in head.chunks(chunk_bytes):
                logits = head.logits(chunk)
                normalizer[chunk] = logits.logsumexp(-1)
                logps[chunk] = logits.gather(-1, target[chunk, None])[:, 0] - normalizer[chunk]
        ctx.save_for_backward(hidden, target, weight, bias, normalizer)
        return logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, target, weight, bias, normalizer = ctx.saved_tensors
        needs_hidden, _, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        with torch.autocast(hidden.device.type, enabled=False):
            head = Head(Outputs(hidden, weight, bias, *ctx.constants), ctx.dtype)
            gradients = HeadGradients(head, (needs_hidden, needs_weight, needs_bias))
            for chunk in head.chunks(ctx.chunk_bytes):
                logits = head.logits(chunk)
                slope = head.slope(logits)
                # d log p_y / d z_v = [v = y] - p_v
                grad_logits = logits.sub_(normalizer[chunk, None]).exp_().mul_(-grad[chunk, None])
                grad_logits.scatter_add_(-1, target[chunk, None], grad[chunk, None].to(head.wide))
                gradients.add(chunk, grad_logits, slope)
        grad_hidden, grad_weight, grad_bias = gradients.result()
        return grad_hidden, None, grad_weight, grad_bias, None, None, None
