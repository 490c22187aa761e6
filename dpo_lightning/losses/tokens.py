"""Losses that look at the distributions behind each token, not at the responses' log-probabilities alone."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dpo_lightning.batch import Logps
from dpo_lightning.functional import preference
from dpo_lightning.functional.likelihoods import alignment_weights
from dpo_lightning.functional.logps import sum_by_owner
from dpo_lightning.losses.base import LogRatioLoss, PairwiseLoss, implicit_rewards, require, widen
from dpo_lightning.losses.pairwise import DPOLoss


@dataclass(frozen=True, kw_only=True)
class WPOLoss(DPOLoss):
    """Weighted preference optimization (WPO), Zhou et al. 2024, arXiv:2406.11827, with sampled alignment.

    DPO in which a pair counts as much as its responses look like the policy's own.

    Args:
        beta: Strength of the pull towards the reference; the paper uses 0.01.
        max_weight: Largest weight of a pair; the authors' code has 1, their equation none.
        label_smoothing: Probability that a label is wrong, in [0, 0.5); 0 trusts every label.
    """

    advice: ClassVar[str] = "the paper uses 0.01"
    needs_collision: ClassVar[bool] = True

    beta: float = 0.01
    max_weight: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = self.max_weight is None or self.max_weight > 0
        require(positive, "max_weight", "positive or none", self.max_weight, "the authors' code has 1")

    def pair_loss(self, policy: Logps, reference: Logps | None, sums: Tensor | None) -> Tensor:
        """DPO loss times the pair's weight, which has no gradient."""
        weights = self.weights(policy)
        return weights * super().pair_loss(policy, reference, sums)

    def weights(self, policy: Logps) -> Tensor:
        """How much like the policy's own samples both responses are, shape ``(B,)``."""
        assert policy.collision is not None, "a loss with `needs_collision` was called without it"
        assert policy.token is not None
        assert policy.owner is not None
        token, collision = widen(policy.token.detach()), widen(policy.collision)
        weights = alignment_weights(token, collision, policy.owner, policy.length)
        return weights if self.max_weight is None else weights.clamp(max=self.max_weight)


@dataclass(frozen=True, kw_only=True)
class TDPO1Loss(LogRatioLoss, PairwiseLoss):
    """Token-level DPO (TDPO1), Zeng et al. 2024, arXiv:2404.11999.

    The KL divergence of the policy from the reference along a response is part of its reward.

    Args:
        beta: Strength of the pull towards the reference; larger stays closer.
    """

    needs_kl: ClassVar[bool] = True

    beta: float = 0.1

    def rewards(self, policy: Logps, reference: Logps | None) -> Tensor:
        """Beta times the log-ratio plus the KL divergence along the response, shape ``(B, K)``."""
        return super().rewards(policy, reference) + self.beta * sequence_kl(policy)

    def margin_loss(self, margin: Tensor) -> Tensor:
        """Bradley-Terry likelihood of the labels."""
        return preference.bradley_terry_nll(margin)


@dataclass(frozen=True, kw_only=True)
class TDPO2Loss(TDPO1Loss):
    """Token-level DPO with a weighted, one-sided KL difference (TDPO2), Zeng et al. 2024, arXiv:2404.11999.

    The divergence along chosen responses has no gradient: rejected ones are drawn to its level.

    Args:
        beta: Strength of the pull towards the reference; larger stays closer.
        alpha: Weight of the KL difference; the paper uses 0.5.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha >= 0, "alpha", "zero or more", self.alpha, "the paper uses 0.5; at 0 it is DPO")

    def pair_loss(self, policy: Logps, reference: Logps | None, sums: Tensor | None) -> Tensor:
        """Bradley-Terry likelihood of the margin less the weighted KL difference."""
        rewards = implicit_rewards(policy, reference, self.beta)
        chosen, rejected = sequence_kl(policy).unbind(1)
        difference = self.beta * (rejected - chosen.detach())
        return self.margin_loss(rewards[:, 0] - rewards[:, 1] - self.alpha * difference)


def sequence_kl(policy: Logps) -> Tensor:
    r"""KL divergence of the policy from the reference along each response, shape ``(B, K)``.

    .. math:: D_{SeqKL}(x, y; \pi_{ref} \| \pi) = \sum_t D_{KL} \left(
              \pi_{ref}(\cdot \mid x, y_{<t}) \, \| \, \pi(\cdot \mid x, y_{<t}) \right)
    """
    assert policy.kl is not None, "a loss with `needs_kl` was called without it"
    assert policy.owner is not None
    return sum_by_owner(widen(policy.kl), policy.owner, policy.length.shape)
