"""Log-probabilities of given tokens, without ever holding tokens times vocabulary.

The output head and the log-softmax run on chunks of rows, in fp32 or wider, and are computed again in backward:
what is kept between the two is one number a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 128 * 2**20


def token_logps(
    hidden: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    r"""Log-probability of each target under the output head.

    .. math:: z_n = s \, (W h_n + b), \quad z_n \leftarrow c \tanh(z_n / c), \quad
              \log p_n = z_{n, y_n} - \log \sum_v e^{z_{n, v}}

    Matrix products run in the dtype of ``hidden`` (under autocast, in autocast's), everything behind them in fp32,
    or in fp64 where ``hidden`` is.

    Args:
        hidden: Hidden states that predict the targets, shape ``(N, D)``.
        target: Token ids, int64, shape ``(N,)``.
        weight: Output head, shape ``(V, D)``.
        bias: Bias of the output head, shape ``(V,)``.
        scale: Factor of the logits (Cohere; Granite has its inverse).
        softcap: Logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).
        chunk_bytes: Bound on the memory that logits take at any time.

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
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        chunk_bytes: int,
    ) -> Tensor:
        device_type = hidden.device.type
        autocast = torch.is_autocast_enabled(device_type)
        ctx.dtype = torch.get_autocast_dtype(device_type) if autocast else hidden.dtype
        ctx.scale, ctx.softcap = scale, softcap
        # A chunk's logits in the compute dtype, in fp32, and one temporary of the softmax.
        ctx.rows = max(1, chunk_bytes // (weight.shape[0] * 12))
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logps = hidden.new_empty(hidden.shape[0], dtype=wide)
        normalizer = torch.empty_like(logps)
        with torch.autocast(device_type, enabled=False):
            cast_weight = weight.to(ctx.dtype)
            for start in range(0, hidden.shape[0], ctx.rows):
                chunk = slice(start, start + ctx.rows)
                logits = _logits(hidden[chunk], cast_weight, bias, scale, softcap, ctx.dtype, wide)
                normalizer[chunk] = logits.logsumexp(-1)
                logps[chunk] = logits.gather(-1, target[chunk, None])[:, 0] - normalizer[chunk]
        ctx.save_for_backward(hidden, target, weight, bias, normalizer)
        return logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, target, weight, bias, normalizer = ctx.saved_tensors
        wide = normalizer.dtype
        needs_hidden, _, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            cast_weight = weight.to(ctx.dtype)
            for start in range(0, hidden.shape[0], ctx.rows):
                chunk = slice(start, start + ctx.rows)
                logits = _logits(hidden[chunk], cast_weight, bias, ctx.scale, ctx.softcap, ctx.dtype, wide)
                slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap).square_()
                # d log p_y / d z_v = [v = y] - p_v
                grad_logits = logits.sub_(normalizer[chunk, None]).exp_().mul_(-grad[chunk, None])
                grad_logits.scatter_add_(-1, target[chunk, None], grad[chunk, None].to(wide))
                if slope is not None:
                    grad_logits.mul_(slope)
                if ctx.scale != 1.0:
                    grad_logits.mul_(ctx.scale)
                cast_grad = grad_logits.to(ctx.dtype)
                if grad_hidden is not None:
                    grad_hidden[chunk] = cast_grad @ cast_weight
                if grad_weight is not None:
                    grad_weight += cast_grad.t() @ hidden[chunk].to(ctx.dtype)
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, None, grad_weight, grad_bias, None, None, None


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    dtype: torch.dtype,
    wide: torch.dtype,
) -> Tensor:
    """Logits of a chunk in the wide dtype; a tensor of its own, which the caller may overwrite."""
    logits = (hidden.to(dtype) @ weight.t()).to(wide)
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    if softcap is not None:
        logits = softcap * torch.tanh_(logits.div_(softcap))
    return logits
