"""Losses of the margin between the log-ratios of two responses."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dpo_lightning.batch import Logps
from dpo_lightning.functional import divergences, preference
from dpo_lightning.functional.likelihoods import mean_logp
from dpo_lightning.losses.base import LogRatioLoss, PairwiseLoss, check_label_smoothing, implicit_rewards, require

Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"]


@dataclass(frozen=True, kw_only=True)
class DPOLoss(LogRatioLoss, PairwiseLoss):
    """Direct preference optimization, Rafailov et al. 2023, arXiv:2305.18290; with label smoothing, conservative DPO.

    Args:
        beta: Strength of the pull towards the reference; larger stays closer.
        label_smoothing: Probability that a label is wrong, in [0, 0.5); 0 trusts every label.
    """

    advice: ClassVar[str] = "for a loss without a reference use SimPOLoss"

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_label_smoothing(self.label_smoothing)

    def margin_loss(self, margin: Tensor) -> Tensor:
        """Bradley-Terry likelihood of the labels."""
        return preference.bradley_terry_nll(margin, self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class RobustDPOLoss(DPOLoss):
    """Robust DPO, Chowdhury et al. 2024, arXiv:2403.00409: unbiased where labels are flipped at a known rate.

    Args:
        beta: Strength of the pull towards the reference; larger stays closer.
        label_smoothing: The rate at which labels are flipped, in [0, 0.5).
    """

    label_smoothing: float = 0.1

    def margin_loss(self, margin: Tensor) -> Tensor:
        """Loss corrected for flipped labels."""
        return preference.robust_bradley_terry_nll(margin, self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class FDPOLoss(LogRatioLoss, PairwiseLoss):
    """DPO under another divergence (f-DPO), Wang et al. 2023, arXiv:2309.16240; under the reverse KL it is DPO.

    Exponentials of the forward KL and of alpha go on as their tangent from an exponent of 10.

    Args:
        beta: Strength of the pull towards the reference; larger stays closer.
        divergence: What the policy is kept close by; from reverse_kl, which seeks modes, to forward_kl, which covers.
        alpha: Of the alpha divergence, in (0, 1): near 0 it is the reverse KL, near 1 the forward KL. No other has it.
    """

    beta: float = 0.1
    divergence: Divergence = "jensen_shannon"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        known = tuple(self._slopes())
        require(
            self.divergence in known,
            "divergence",
            "one of " + ", ".join(known),
            self.divergence,
            "jensen_shannon is the middle",
        )
        require(0 < self.alpha < 1, "alpha", "in (0, 1)", self.alpha, "for its ends use reverse_kl or forward_kl")

    def rewards(self, policy: Logps, reference: Logps | None) -> Tensor:
        """Beta times the divergence's slope at the log-ratio, shape ``(B, K)``."""
        slope = self._slopes()[self.divergence]
        return torch.where(policy.length > 0, self.beta * slope(implicit_rewards(policy, reference, 1.0)), 0.0)

    def margin_loss(self, margin: Tensor) -> Tensor:
        """Bradley-Terry likelihood of the labels."""
        return preference.bradley_terry_nll(margin)

    def _slopes(self) -> dict[str, Callable[[Tensor], Tensor]]:
        return {
            "reverse_kl": divergences.reverse_kl_slope,
            "forward_kl": divergences.forward_kl_slope,
            "jensen_shannon": divergences.jensen_shannon_slope,
            "alpha": partial(divergences.alpha_slope, alpha=self.alpha),
        }


@dataclass(frozen=True, kw_only=True)
class IPOLoss(PairwiseLoss):
    """Identity preference optimization, Azar et al. 2023, arXiv:2310.12036.

    Both objectives exist in the wild: the paper sums log-probabilities over a response; its authors later advised
    to divide them by the response's length.

    Args:
        tau: Strength of the pull towards the reference; the log-ratio margin is drawn to 1 / (2 tau).
        length_normalized: Whether log-ratios are means over tokens instead of sums.
    """

    tau: float = 0.1
    length_normalized: bool = False

    def __post_init__(self) -> None:
        require(self.tau > 0, "tau", "positive", self.tau, "0.1 is usual")

    def rewards(self, policy: Logps, reference: Logps | None) -> Tensor:
        """Tau times the log-ratio (of means where length-normalised), shape ``(B, K)``."""
        rewards = implicit_rewards(policy, reference, self.tau)
        return mean_logp(rewards, policy.length) if self.length_normalized else rewards

    def margin_loss(self, margin: Tensor) -> Tensor:
        """Squared distance of the log-ratio margin from its target."""
        return preference.squared_preference_loss(margin / self.tau, self.tau)


@dataclass(frozen=True, kw_only=True)
class HingeLoss(LogRatioLoss, PairwiseLoss):
    """Hinge on the reward margin: SLiC-HF (arXiv:2305.10425) normalised by a reference, as in RSO (arXiv:2309.06657).

    Args:
        beta: Inverse of the log-ratio margin at which a pair is good enough.
    """

    advice: ClassVar[str] = "pairs count until their log-ratio margin is 1 / beta"

    beta: float = 0.1

    def margin_loss(self, margin: Tensor) -> Tensor:
        """Zero from a margin of one."""
        return preference.hinge_preference_loss(margin)


@dataclass(frozen=True, kw_only=True)
class EXOPairLoss(LogRatioLoss, PairwiseLoss):
    """Efficient exact optimization on pairs (EXO), Ji et al. 2024, arXiv:2402.00856, Eq. 16.

    Args:
        beta: Strength of the pull towards the reference; larger stays closer.
        label_smoothing: Probability that a label is wrong, in (0, 0.5).
    """

    beta: float = 0.1
    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = "the divergence from a certain label is infinite; 0.001 is usual"
        require(0 < self.label_smoothing < 0.5, "label_smoothing", "in (0, 0.5)", self.label_smoothing, remedy)

    def margin_loss(self, margin: Tensor) -> Tensor:
        """Divergence of the model's pair distribution from the smoothed label."""
        return preference.exo_pair_loss(margin, self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class DiscoPOPLoss(LogRatioLoss, PairwiseLoss):
    """Log-ratio modulated loss (DiscoPOP), found by a language model, Lu et al. 2024, arXiv:2406.08414, Eq. 5.

    Args:
        beta: Strength of the pull towards the reference; the paper uses 0.05.
        tau: Width of the blend from the logistic to the exponential loss, in (0, 1).
    """

    beta: float = 0.05
    tau: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.tau < 1, "tau", "in (0, 1)", self.tau, "beyond 1 it explodes; the paper uses 0.05")

    def margin_loss(self, margin: Tensor) -> Tensor:
        """Blend of logistic and exponential loss."""
        return preference.discopop_loss(margin, self.tau)
