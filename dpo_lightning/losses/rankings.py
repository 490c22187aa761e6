"""Losses of more than two responses."""

from dataclasses import dataclass

from torch import Tensor

from dpo_lightning.batch import Logps
from dpo_lightning.functional import preference
from dpo_lightning.losses.base import LogRatioLoss


@dataclass(frozen=True, kw_only=True)
class PlackettLuceLoss(LogRatioLoss):
    """DPO for whole rankings, Rafailov et al. 2023, arXiv:2305.18290, appendix A.3; any K, at K = 2 it is DPO.

    Args:
        beta: Strength of the pull towards the reference; larger stays closer.
    """

    beta: float = 0.1

    def __call__(self, policy: Logps, reference: Logps | None, sums: Tensor | None = None) -> Tensor:
        """One loss an example, shape ``(B,)``."""
        return preference.plackett_luce_nll(self.rewards(policy, reference), policy.length > 0)


@dataclass(frozen=True, kw_only=True)
class SoftmaxDPOLoss(LogRatioLoss):
    """DPO of the best response against all others (S-DPO), Chen et al. 2024, arXiv:2406.09215; at K = 2 it is DPO.

    Args:
        beta: Strength of the pull towards the reference; larger stays closer.
    """

    beta: float = 0.1

    def __call__(self, policy: Logps, reference: Logps | None, sums: Tensor | None = None) -> Tensor:
        """One loss an example, whatever the order of the others, shape ``(B,)``."""
        return preference.best_of_k_nll(self.rewards(policy, reference), policy.length > 0)
