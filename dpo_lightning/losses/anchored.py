"""Losses that hold each response of a pair to an absolute level, not to its rival alone."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dpo_lightning.batch import Logps
from dpo_lightning.functional import anchored, preference
from dpo_lightning.losses.base import LogRatioLoss, PairLoss, require


class AnchoredLoss(LogRatioLoss, PairLoss):
    """A loss of both rewards of a pair, each by itself."""

    def pair_loss(self, policy: Logps, reference: Logps | None, sums: Tensor | None) -> Tensor:
        """Loss of the two rewards."""
        chosen, rejected = self.rewards(policy, reference).unbind(1)
        return self.reward_loss(chosen, rejected)

    @abstractmethod
    def reward_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Loss of the rewards of both responses, each of shape ``(B,)``."""


@dataclass(frozen=True, kw_only=True)
class NCAPairLoss(AnchoredLoss):
    """Noise contrastive alignment on pairs (NCA), Chen et al. 2024, arXiv:2402.05369.

    Each response is told from the reference's by itself, so that chosen ones keep their level.

    Args:
        beta: Strength of the pull towards the reference; the paper uses 0.01.
    """

    advice: ClassVar[str] = "the paper uses 0.01"

    beta: float = 0.01

    def reward_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Noise contrast of each response with the reference."""
        return anchored.nca_pair_loss(chosen, rejected)


@dataclass(frozen=True, kw_only=True)
class SPPOHardLoss(AnchoredLoss):
    """Self-play preference optimization with certain wins (SPPO), Wu et al. 2024, arXiv:2405.00675, Eq. 4.7.

    Args:
        beta: The paper's 1 / eta: log-ratios are drawn to 1 / (2 beta) and -1 / (2 beta); the paper uses 0.001.
    """

    advice: ClassVar[str] = "the paper uses 0.001"

    beta: float = 1e-3

    def reward_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Squared distances from what a win and a defeat are worth."""
        return anchored.sppo_hard_loss(chosen / self.beta, rejected / self.beta, self.beta)


@dataclass(frozen=True, kw_only=True)
class APOZeroLoss(AnchoredLoss):
    """Anchored preference optimization, zero (APO), D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7.

    For chosen responses better than what the model writes: they go up, rejected ones down.

    Args:
        beta: Strength of the pull towards the reference; larger stays closer.
    """

    beta: float = 0.1

    def reward_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Chosen up, rejected down."""
        return anchored.apo_zero_loss(chosen, rejected)


@dataclass(frozen=True, kw_only=True)
class APODownLoss(AnchoredLoss):
    """Anchored preference optimization, down (APO), D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8.

    For chosen responses worse than what the model writes: both go down, rejected ones further.

    Args:
        beta: Strength of the pull towards the reference; larger stays closer.
    """

    beta: float = 0.1

    def reward_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Chosen down, rejected further down."""
        return anchored.apo_down_loss(chosen, rejected)


@dataclass(frozen=True, kw_only=True)
class DPOPositiveLoss(AnchoredLoss):
    """DPO-Positive (Smaug), Pal et al. 2024, arXiv:2402.13228, Eq. 3: chosen responses must not become rarer.

    Args:
        beta: Strength of the pull towards the reference; larger stays closer.
        lambda_: Weight of the chosen response's fall below the reference; the paper uses 50.
    """

    beta: float = 0.3
    lambda_: float = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lambda_ >= 0, "lambda_", "zero or more", self.lambda_, "the paper uses 50; at 0 it is DPO")

    def reward_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Bradley-Terry likelihood of the margin less the penalty; beta scales both."""
        return preference.bradley_terry_nll(anchored.positive_margin(chosen, rejected, self.lambda_))


@dataclass(frozen=True, kw_only=True)
class BCOPairLoss(LogRatioLoss, PairLoss):
    """Binary classifier optimization on pairs (BCO), Jung et al. 2024, arXiv:2404.04656.

    Rewards are classified around their mean over all training examples so far, which checkpoints keep.

    Args:
        beta: Strength of the pull towards the reference; the paper uses 0.01.
    """

    advice: ClassVar[str] = "the paper uses 0.01"
    num_sums: ClassVar[int] = 2

    beta: float = 0.01

    def sums(self, policy: Logps, reference: Logps | None) -> Tensor:
        """Sum of the rewards of all responses, and their number."""
        rewards = self.rewards(policy, reference).detach()
        return torch.stack([rewards.sum(), (policy.length > 0).sum().to(rewards.dtype)])

    def pair_loss(self, policy: Logps, reference: Logps | None, sums: Tensor | None) -> Tensor:
        """Classification around the mean reward, which is 0 before there is one."""
        rewards = self.rewards(policy, reference)
        mean = rewards.new_zeros(()) if sums is None else sums[0] / sums[1].clamp(min=1)
        return anchored.bco_pair_loss(rewards[:, 0], rewards[:, 1], mean.to(rewards))
