"""Where ragged attention meets transformers: one attention implementation, registered under one name.

A model whose ``attn_implementation`` is :data:`ATTENTION` reads a stream when its forward is given
``ragged_layout=``, and behaves as with scaled dot-product attention otherwise, so that the same object generates,
scores padded rows, and scores streams.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpo_lightning.functional.attention import plain_attention, ragged_causal_attention
from dpo_lightning.functional.layout import RaggedLayout

ATTENTION = "dpo_lightning"

_attend = ragged_causal_attention


def keep_attention_out_of_graphs() -> None:
    """Have compiled layers call attention between their graphs: what it does depends on the lengths of a batch."""
    global _attend
    _attend = torch.compiler.disable(ragged_causal_attention)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    ragged_layout: RaggedLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, states (batch, heads, length, size); returns (batch, length, heads, size)."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if ragged_layout is not None:
        if torch.is_autocast_enabled(query.device.type):
            # Rotary positions leave queries and keys in fp32 beside 16-bit values.
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        out = _attend(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            ragged_layout,
            scale=scale,
            window=sliding_window,
            softcap=softcap,
            sinks=s_aux,
            dropout=dropout,
        )
        return out[None], None
    if softcap is None and s_aux is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    out = plain_attention(query, key, value, attention_mask, scale=scale, softcap=softcap, sinks=s_aux, dropout=dropout)
    return out.transpose(1, 2).contiguous(), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Boolean masks, always written out: the paths behind :func:`plain_attention` cannot infer a missing one."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def stream_mask(device: torch.device) -> Tensor:
    """What a stream passes as attention mask: four-dimensional, so transformers hands it on and makes none."""
    return torch.zeros(1, 1, 1, 1, device=device)


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, _mask)
