"""The variable-length flash kernel: attention of a whole stream in one call (CUDA, 16-bit)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from dpo_lightning.functional.layout import RaggedLayout


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: RaggedLayout, scale: float, window: int | None
) -> Tensor | None:
    """The whole stream in one call of the kernel, or ``None`` where it does not apply; states (T, H, size)."""
    kernel, head_size, heads = varlen_kernel(), query.shape[-1], query.shape[-2]
    if kernel is None or not varlen_applies(query, value):
        return None
    grouped = heads != key.shape[-2]
    keywords = varlen_keywords(_parameters(kernel), head_size=head_size, grouped=grouped, scale=scale, window=window)
    if keywords is None:
        return None
    key, value = layout.gather_keys(key), layout.gather_keys(value)
    if grouped and "enable_gqa" not in keywords:
        key, value = (states.repeat_interleave(heads // states.shape[-2], dim=-2) for states in (key, value))
    if "scale" not in keywords and scale != head_size**-0.5:
        query = query * (scale * head_size**0.5)
    return kernel(query, key, value, layout.cu_query, layout.cu_key, layout.max_query, layout.max_key, **keywords)


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


@functools.cache
def varlen_kernel() -> Callable[..., Any] | None:
    """``varlen_attn`` of this PyTorch; ``None`` where it has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@functools.cache
def _parameters(kernel: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(kernel).parameters)
