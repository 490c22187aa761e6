"""Ragged causal attention: many sequences in one stream of tokens, sharing prefixes.

Sequence s owns the queries ``[start, end)`` of the stream and attends to the keys ``prefix + [start, end)``,
causally and aligned at the end (bottom right). With the prompt of a preference example as prefix of its second
and later responses, the prompt's hidden states are computed once, however many responses there are.

Two ways compute the same thing: a variable-length flash kernel, one call for the whole stream (CUDA, 16-bit),
and a loop of scaled dot-product attention over the sequences (everything else).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RaggedLayout:
    """Which tokens of a stream attend to which; the same object serves every layer of a forward pass.

    Args:
        spans: One row ``(query start, query end, prefix start, prefix end)`` a sequence, int64, shape ``(S, 4)``.
            The query spans partition the stream in order.
        key_index: Flat positions of the keys of all sequences, prefix before own tokens, shape
            ``(sum of key lengths,)``; ``None`` where no sequence has a prefix and keys are the stream itself.
        max_query: Most queries in a sequence.
        max_key: Most keys in a sequence.
    """

    spans: Tensor
    key_index: Tensor | None
    max_query: int
    max_key: int
    _masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def cu_query(self) -> Tensor:
        """Cumulative query lengths, int32, shape ``(S + 1,)``, on the device of the spans."""
        return F.pad(torch.cumsum(self.spans[:, 1] - self.spans[:, 0], 0), (1, 0)).int()

    @functools.cached_property
    def cu_key(self) -> Tensor:
        """Cumulative key lengths, int32, shape ``(S + 1,)``, on the device of the spans."""
        start, end, prefix_start, prefix_end = self.spans.unbind(1)
        return F.pad(torch.cumsum(end - start + prefix_end - prefix_start, 0), (1, 0)).int()

    @functools.cached_property
    def lengths(self) -> list[tuple[int, int]]:
        """Query and key length of every sequence, on the host (one synchronisation if the spans are on a GPU)."""
        return [(end - start, end - start + stop - begin) for start, end, begin, stop in self.spans.tolist()]

    def gather_keys(self, states: Tensor) -> Tensor:
        """Rows of ``states`` (T, H, head size) in the order in which the sequences read them."""
        return states if self.key_index is None else states.index_select(0, self.key_index)

    def mask(self, query: int, key: int, window: int | None, device: torch.device) -> Tensor:
        """Boolean mask (query, key), true where attention is allowed; kept, because every layer asks again."""
        if (query, key, window) not in self._masks:
            self._masks[query, key, window] = causal_mask(query, key, window, device)
        return self._masks[query, key, window]


def causal_mask(query: int, key: int, window: int | None, device: torch.device) -> Tensor:
    """Causal mask aligned at the bottom right, true where attention is allowed, shape ``(query, key)``.

    Args:
        query: Number of queries; they are the last of the keys.
        key: Number of keys.
        window: A query sees itself and the ``window - 1`` positions before it; ``None`` for all.
        device: Where the mask is made.
    """
    distance = torch.arange(key - query, key, device=device)[:, None] - torch.arange(key, device=device)
    allowed = distance >= 0
    return allowed if window is None else allowed & (distance < window)


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
        out = _varlen(query, key, value, layout, scale, window)
        if out is not None:
            return out
    lengths = layout.lengths
    queries = query.split([q for q, _ in lengths])
    keys = layout.gather_keys(key).split([k for _, k in lengths])
    values = layout.gather_keys(value).split([k for _, k in lengths])
    outputs = []
    for (q, k), *states in zip(lengths, queries, keys, values, strict=True):
        query_s, key_s, value_s = (part.transpose(0, 1) for part in states)
        sliding = window if window is not None and window < k else None
        mask = None if q == k and sliding is None and not plain else layout.mask(q, k, sliding, query.device)
        if plain:
            out = plain_attention(
                query_s, key_s, value_s, mask, scale=scale, softcap=softcap, sinks=sinks, dropout=dropout
            )
        else:
            out = _sdpa(query_s, key_s, value_s, mask, scale=scale, dropout=dropout)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


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


def varlen_applies(query: Tensor, value: Tensor) -> bool:
    """Whether the flash kernel can take these states: Ampere or later, 16-bit, head size a multiple of 8."""
    head_size = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and head_size == value.shape[-1]
        and head_size % 8 == 0
        and head_size <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def varlen_keywords(
    parameters: Collection[str], *, head_size: int, grouped: bool, scale: float, window: int | None
) -> dict[str, Any] | None:
    """Keywords that ask a version of the kernel for causal attention.

    torch 2.10 has ``is_causal`` and no ``scale``; later versions have ``scale``, ``window_size = (left, right)``
    and, last, ``enable_gqa``.

    Args:
        parameters: Names of the kernel's parameters.
        head_size: Size of a head, whose inverse root is the default scale.
        grouped: Whether there are fewer key heads than query heads.
        scale: Factor of the scores.
        window: Sliding window, or ``None``.

    Returns:
        The keywords; ``None`` where this version has no sliding window and one is asked for. A scale or a grouping
        that the version does not know is missing from the keywords: the caller folds it into the states.
    """
    if "window_size" in parameters:
        keywords: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0)}
    elif window is None:
        keywords = {"is_causal": True}
    else:
        return None
    if "scale" in parameters and scale != head_size**-0.5:
        keywords["scale"] = scale
    if grouped and "enable_gqa" in parameters:
        keywords["enable_gqa"] = True
    return keywords


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: RaggedLayout, scale: float, window: int | None
) -> Tensor | None:
    """The whole stream in one call of the kernel, or ``None`` where it does not apply."""
    kernel, head_size, heads = _varlen_kernel(), query.shape[-1], query.shape[-2]
    if kernel is None or not varlen_applies(query, value):
        return None
    grouped = heads != key.shape[-2]
    parameters = inspect.signature(kernel).parameters
    keywords = varlen_keywords(parameters, head_size=head_size, grouped=grouped, scale=scale, window=window)
    if keywords is None:
        return None
    key, value = layout.gather_keys(key), layout.gather_keys(value)
    if grouped and "enable_gqa" not in keywords:
        key, value = (states.repeat_interleave(heads // states.shape[-2], dim=-2) for states in (key, value))
    if "scale" not in keywords and scale != head_size**-0.5:
        query = query * (scale * head_size**0.5)
    return kernel(query, key, value, layout.cu_query, layout.cu_key, layout.max_query, layout.max_key, **keywords)


@functools.cache
def _varlen_kernel() -> Callable[..., Any] | None:
    """``varlen_attn`` of this PyTorch; ``None`` where it has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float, dropout: float) -> Tensor:
    """Causal where ``mask`` is ``None``; states (H, length, head size)."""
    heads = query.shape[0]
    return F.scaled_dot_product_attention(
        query[None],
        _repeat_heads(key, heads)[None],
        _repeat_heads(value, heads)[None],
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=dropout,
        scale=scale,
    )[0]


def _repeat_heads(states: Tensor, heads: int) -> Tensor:
    """Key or value heads repeated to as many as the query has, (..., H_kv, length, size) -> (..., H, length, size)."""
    groups = heads // states.shape[-3]
    return states if groups == 1 else states.repeat_interleave(groups, dim=-3)
