"""Gradients of weights that may be divided among devices in several ways."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dpo_lightning.models.shard import local

CLOSE_TO_ZERO = 1e-6  # as in torch.nn.utils.clip_grad_norm_


def gradients_of(weights: Iterable[Tensor]) -> list[Tensor]:
    """Those that there are."""
    return [weight.grad for weight in weights if weight.grad is not None]


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """2-norm of all gradients together, the same on all ranks, on the device.

    Args:
        gradients: Any shapes; parts of gradients that are divided among devices count once.
    """
    by_mesh: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        by_mesh.setdefault(gradient.device_mesh if isinstance(gradient, DTensor) else None, []).append(gradient)
    norms = [torch.nn.utils.get_total_norm(of_one) for of_one in by_mesh.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return whole[0] if len(whole) == 1 else torch.nn.utils.get_total_norm(whole)


def clip_by_norm(gradients: Sequence[Tensor], most: float) -> None:
    """Scale gradients so that their norm is at most so much."""
    scale(gradients, (most / (total_norm(gradients) + CLOSE_TO_ZERO)).clamp(max=1.0))


def clip_by_value(gradients: Sequence[Tensor], most: float) -> None:
    """Bring every number into ``[-most, most]``."""
    parts = [local(gradient) for gradient in gradients]
    torch._foreach_clamp_min_(parts, -most)
    torch._foreach_clamp_max_(parts, most)


def scale(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply all by a number that stays on the device."""
    torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
