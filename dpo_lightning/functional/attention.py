"""Ragged causal attention: many sequences in one stream of tokens, sharing prefixes.

Sequence s owns the queries ``[start, end)`` of the stream and attends to the keys ``prefix + [start, end)``,
causally and aligned at the end (bottom right). With the prompt of a preference example as prefix of its second
and later responses, the prompt's hidden states are computed once, however many responses there are.

Two ways compute the same thing: a variable-length flash kernel, one call for the whole stream (CUDA, 16-bit),
and scaled dot-product attention block by block (everything else).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_lightning.functional.layout import RaggedLayout
from dpo_lightning.functional.varlen import varlen_attention

# What a call costs by itself, in multiply-adds of attention that take as long, by kind of device.
CALL = {"cpu": 2**17, "cuda": 2**28}
# Up to so many keys the CPU computes 16-bit attention, forward and backward together, faster in fp32.
WIDE_UP_TO = 256


def ragged_causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: RaggedLayout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of every sequence of a stream to its prefix and itself.

    Args:
        query: Shape ``(T, H, head size)``.
        key: Shape ``(T, H_kv, head size)``; ``H_kv`` divides ``H`` (grouped-query attention).
        value: Shape ``(T, H_kv, value head size)``.
        layout: Which tokens attend to which.
        scale: Factor of the scores before softmax.
        window: Sliding window in positions: a token sees itself and the ``window - 1`` before it.
        softcap: Scores become ``softcap * tanh(scores / softcap)`` (Gemma 2, arXiv:2408.00118, section 2).
        sinks: One learned logit a head that takes probability and gives nothing (gpt-oss), shape ``(H,)``.
        dropout: Probability with which an attention weight is dropped.

    Returns:
        Shape ``(T, H, value head size)``.
    """
    plain = softcap is not None or sinks is not None
    if not plain and not dropout:
        out = varlen_attention(query, key, value, layout, scale, window)
        if out is not None:
            return out
    overhead = CALL.get(query.device.type, CALL["cpu"]) // query[0].numel()
    blocks, query_index, key_index, restore = layout.blocks(overhead, window, masked=plain)
    queries = _gather(query, query_index).split([len(block.sequences) * block.query for block in blocks])
    keys, values = (
        _gather(states, key_index).split([len(block.sequences) * block.key for block in blocks])
        for states in (key, value)
    )
    outputs = []
    for block, *states in zip(blocks, queries, keys, values, strict=True):
        # (sequences, heads, length, size)
        q, k, v = (part.unflatten(0, (len(block.sequences), -1)).transpose(1, 2) for part in states)
        if plain:
            out = plain_attention(q, k, v, block.mask, scale=scale, softcap=softcap, sinks=sinks, dropout=dropout)
        else:
            out = _sdpa(q, k, v, block.mask, scale=scale, dropout=dropout)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return _gather(torch.cat(outputs), restore)


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention written out, softmax in fp32 or wider, for what no fused kernel has: score softcap and sinks.

    Shapes ``(..., H, query, head size)`` and ``(..., H_kv, key, head size)``; ``mask`` is true where allowed.
    """
    key, value = _repeat_heads(key, query.shape[-3]), _repeat_heads(value, query.shape[-3])
    scores = (query @ key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        # Not minus infinity: a padded query may have no key at all, and its NaN would spread through the values.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        sink_column = sinks.to(scores).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink_column], -1)
    weights = scores.softmax(-1)
    if sinks is not None:
        weights = weights[..., :-1]
    weights = F.dropout(weights, dropout, training=dropout > 0)
    return weights.to(value.dtype) @ value


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float, dropout: float) -> Tensor:
    """Causal where ``mask`` is ``None``; states (sequences, heads, length, size)."""
    dtype, on_cpu, heads = query.dtype, query.device.type == "cpu", query.shape[1]
    if not on_cpu:  # where not every kernel knows groups of heads
        key, value = _repeat_heads(key, heads), _repeat_heads(value, heads)
    elif dtype.itemsize < 4 and key.shape[2] <= WIDE_UP_TO:
        query, key, value = query.float(), key.float(), value.float()
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=heads != key.shape[1],
    ).to(dtype)


def _gather(states: Tensor, index: Tensor | None) -> Tensor:
    return states if index is None else states.index_select(0, index)


def _repeat_heads(states: Tensor, heads: int) -> Tensor:
    """Key or value heads repeated to as many as the query has, (..., H_kv, length, size) -> (..., H, length, size)."""
    groups = heads // states.shape[-3]
    return states if groups == 1 else states.repeat_interleave(groups, dim=-3)
