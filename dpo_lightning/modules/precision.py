"""In what dtype matrices are multiplied, by the Trainer's precision, and where another would do better."""

from __future__ import annotations

import logging

import torch

from dpo_lightning.cpu import multiplies_bfloat16_faster
from dpo_lightning.models.policy import CausalPolicy

log = logging.getLogger(__name__)

FLOAT32 = "32-true"
LARGE = 10_000_000  # parameters from which on products in bfloat16 save more than casting costs


def compute_dtype(precision: str) -> torch.dtype | None:
    """Dtype of matrix products; None where it is that of the weights.

    Args:
        precision: What the Trainer calls it, as in bf16-mixed.
    """
    return {"bf16": torch.bfloat16, "16": torch.float16}.get(precision.partition("-")[0])


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Dtype of matrix products where weights are kept in another."""
    return compute_dtype(precision) if precision.endswith("mixed") else None


def warn_of_rounding(policy: CausalPolicy, precision: str) -> None:
    """Say that weights of 16 bits lose small updates."""
    narrow = any(weight.requires_grad and weight.dtype != torch.float32 for weight in policy.parameters())
    if narrow or precision in ("bf16-true", "16-true"):
        log.warning(
            "All weights are trained in 16 bits, where an update smaller than about 1/256 of a weight is lost to "
            "rounding. Use `policy.dtype: float32` with `trainer.precision: bf16-mixed`."
        )


def recommend_bfloat16(policy: CausalPolicy, precision: str) -> None:
    """Say where a processor would multiply the matrices of a policy faster in bfloat16."""
    large = sum(weight.numel() for weight in policy.parameters()) > LARGE
    if large and compute_dtype(precision) is None and multiplies_bfloat16_faster():
        log.info(
            "This processor multiplies matrices several times faster in bfloat16: `trainer.precision: bf16-mixed` "
            "keeps weights, log-softmax and loss in float32."
        )
