"""The output head on chunks of rows: logits in fp32 or wider, and what their gradient means for hidden states and head.

Logits of a whole batch never exist: what is kept between forward and backward is a few numbers a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Chunks that are too small let a GPU wait for the head's weights, which every chunk reads anew.
CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**30}


class Outputs(NamedTuple):
    r"""Hidden states and the head that makes logits of them.

    .. math:: z_n = s \, (W h_n + b), \quad z_n \leftarrow c \tanh(z_n / c)

    Attributes:
        hidden: Shape ``(N, D)``; logits, shape ``(N, V)``, where there is no weight.
        weight: Shape ``(V, D)``; None where a model has made logits by itself.
        bias: Shape ``(V,)``.
        scale: Factor of the logits (Cohere; Granite has its inverse).
        softcap: Logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).
    """

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


class Head:
    """A head at work, in the dtype in which its matrix products run.

    Args:
        outputs: What it works on.
        dtype: Dtype of the products; by default that of autocast, or of the hidden states.
    """

    def __init__(self, outputs: Outputs, dtype: torch.dtype | None = None) -> None:
        self.hidden, self.weight, self.bias, self.scale, self.softcap = outputs
        self.dtype = product_dtype(self.hidden) if dtype is None else dtype
        self.wide = torch.promote_types(self.hidden.dtype, torch.float32)
        self._cast_weight = None if self.weight is None else self.weight.to(self.dtype)

    def logits(self, chunk: slice) -> Tensor:
        """Logits of some rows in the wide dtype; a tensor of its own, which the caller may overwrite."""
        if self._cast_weight is None:
            logits = self.hidden[chunk].to(self.wide, copy=True)
        else:
            logits = (self.hidden[chunk].to(self.dtype) @ self._cast_weight.t()).to(self.wide)
        if self.bias is not None:
            logits += self.bias
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh_(logits.div_(self.softcap))
        return logits

    def slope(self, logits: Tensor) -> Tensor | None:
        """Derivative of the softcap where logits came out of it."""
        return None if self.softcap is None else 1 - (logits / self.softcap).square_()

    def chunks(self, chunk_bytes: int | None) -> list[slice]:
        """Rows in pieces whose logits, in the compute dtype, in fp32 and in one temporary, stay within a bound."""
        bound = chunk_bytes or CHUNK_BYTES.get(self.hidden.device.type, CHUNK_BYTES["cpu"])
        vocabulary = self.hidden.shape[1] if self.weight is None else self.weight.shape[0]
        rows = max(1, bound // (vocabulary * 12))
        return [slice(start, start + rows) for start in range(0, self.hidden.shape[0], rows)]


class HeadGradients:
    """Gradients of hidden states and head, chunk by chunk.

    Args:
        head: The head.
        needs: Whether hidden states, weight and bias need theirs.
    """

    def __init__(self, head: Head, needs: tuple[bool, bool, bool]) -> None:
        self.head, self.needs_weight = head, needs[1]
        self.hidden = torch.empty_like(head.hidden) if needs[0] else None
        self.weight: Tensor | None = None
        self.bias = torch.zeros_like(head.bias, dtype=head.wide) if needs[2] and head.bias is not None else None

    def add(self, chunk: slice, grad_logits: Tensor, slope: Tensor | None) -> None:
        """Take in the gradient of a chunk's logits, which is overwritten."""
        head = self.head
        if slope is not None:
            grad_logits.mul_(slope)
        if head.scale != 1.0:
            grad_logits.mul_(head.scale)
        cast = grad_logits.to(head.dtype)
        if self.hidden is not None:
            self.hidden[chunk] = grad_logits if head._cast_weight is None else cast @ head._cast_weight
        if self.needs_weight:
            product = cast.t() @ head.hidden[chunk].to(head.dtype)
            self.weight = product.to(head.wide) if self.weight is None else self.weight.add_(product)
        if self.bias is not None:
            self.bias += grad_logits.sum(0)

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden states, weight and bias, in their dtypes."""
        weight = None
        if self.needs_weight and self.head.weight is not None:
            total = torch.zeros_like(self.head.weight) if self.weight is None else self.weight  # without any row
            weight = total.to(self.head.weight.dtype)
        bias = None if self.bias is None or self.head.bias is None else self.bias.to(self.head.bias.dtype)
        return self.hidden, weight, bias


def product_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype in which products with hidden states run: autocast's where it is on, else their own."""
    device_type = hidden.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
