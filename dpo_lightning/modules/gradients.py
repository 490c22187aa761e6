"""What is said about all gradients together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """2-norm of all gradients together, on their device."""
    return torch.nn.utils.get_total_norm(gradients)
