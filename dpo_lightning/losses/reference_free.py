"""Losses without a reference."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dpo_lightning.batch import Logps
from dpo_lightning.functional import likelihoods, preference
from dpo_lightning.losses.base import PairwiseLoss, PreferenceLoss, require, require_pairs, widen


@dataclass(frozen=True, kw_only=True)
class NLLLoss(PreferenceLoss):
    """Negative log-likelihood of the best response: supervised fine-tuning, mostly as a part of a MixedLoss.

    Args:
        length_normalized: Whether it is a mean over the response's tokens instead of their sum.
    """

    needs_reference: ClassVar[bool] = False
    compares_responses: ClassVar[bool] = False

    length_normalized: bool = True

    def __call__(self, policy: Logps, reference: Logps | None, sums: Tensor | None = None) -> Tensor:
        """One loss an example, whether or not there is a second response, shape ``(B,)``."""
        return -self.rewards(policy, reference)[:, 0]

    def rewards(self, policy: Logps, reference: Logps | None) -> Tensor:
        """Log-probability, a token where length-normalised, shape ``(B, K)``."""
        total = widen(policy.total)
        return likelihoods.mean_logp(total, policy.length) if self.length_normalized else total


@dataclass(frozen=True, kw_only=True)
class SimPOLoss(PairwiseLoss):
    """Simple preference optimization without a reference, Meng et al. 2024, arXiv:2405.14734, Eq. 6.

    Args:
        beta: Factor of the mean log-probability of a response; the paper uses 2.0 to 2.5.
        gamma: Margin by which the best response should lead; the paper uses 0.3 to 1.6.
    """

    needs_reference: ClassVar[bool] = False

    beta: float = 2.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        require(self.beta > 0, "beta", "positive", self.beta, "the paper uses 2.0 to 2.5")
        require(self.gamma >= 0, "gamma", "zero or more", self.gamma, "the paper uses 0.3 to 1.6")

    def rewards(self, policy: Logps, reference: Logps | None) -> Tensor:
        """Beta times the mean log-probability of a token, shape ``(B, K)``."""
        return self.beta * likelihoods.mean_logp(widen(policy.total), policy.length)

    def margin_loss(self, margin: Tensor) -> Tensor:
        """Bradley-Terry likelihood of leading by gamma."""
        return preference.bradley_terry_nll(margin - self.gamma)


class SupervisedPairLoss(PairwiseLoss):
    """A loss of pairs beside the likelihood of the best response, which counts without a second one too."""

    needs_reference: ClassVar[bool] = False

    def __call__(self, policy: Logps, reference: Logps | None, sums: Tensor | None = None) -> Tensor:
        """Loss of the pair plus negative log-likelihood of the best response, shape ``(B,)``."""
        return super().__call__(policy, reference, sums) + self.supervised_loss(policy)

    def supervised_loss(self, policy: Logps) -> Tensor:
        """Negative log-likelihood of a token of the best response, shape ``(B,)``."""
        return NLLLoss()(policy, None)


@dataclass(frozen=True, kw_only=True)
class ORPOLoss(SupervisedPairLoss):
    """Odds ratio preference optimization (ORPO), Hong et al. 2024, arXiv:2403.07691, Eq. 6 and 7.

    Supervised fine-tuning on the best response that keeps the odds of the other down.

    Args:
        lambda_: Weight of the odds ratio beside the likelihood; the paper uses 0.1.
    """

    lambda_: float = 0.1

    def __post_init__(self) -> None:
        require(self.lambda_ > 0, "lambda_", "positive", self.lambda_, "the paper uses 0.1; for SFT use NLLLoss")

    def rewards(self, policy: Logps, reference: Logps | None) -> Tensor:
        """Log-odds of the mean probability of a token, shape ``(B, K)``."""
        odds = likelihoods.log_odds(likelihoods.mean_logp(widen(policy.total), policy.length))
        return torch.where(policy.length > 0, odds, 0.0)

    def margin_loss(self, margin: Tensor) -> Tensor:
        """Weighted Bradley-Terry likelihood of the log-odds ratio."""
        return self.lambda_ * preference.bradley_terry_nll(margin)


@dataclass(frozen=True, kw_only=True)
class CPOLoss(SupervisedPairLoss):
    """Contrastive preference optimization (CPO), Xu et al. 2024, arXiv:2401.08417.

    DPO with a uniform reference, beside supervised fine-tuning on the best response.

    Args:
        beta: Factor of the log-probability of a response.
        alpha: Weight of the best response's likelihood; the paper uses 1.
        length_normalized: Whether that likelihood is a mean over tokens, as in the authors' code, instead of a sum.
    """

    beta: float = 0.1
    alpha: float = 1.0
    length_normalized: bool = True

    def __post_init__(self) -> None:
        require(self.beta > 0, "beta", "positive", self.beta, "the paper uses 0.1")
        require(self.alpha >= 0, "alpha", "zero or more", self.alpha, "the paper uses 1")

    def rewards(self, policy: Logps, reference: Logps | None) -> Tensor:
        """Beta times the log-probability, shape ``(B, K)``."""
        return self.beta * widen(policy.total)

    def margin_loss(self, margin: Tensor) -> Tensor:
        """Bradley-Terry likelihood of the labels."""
        return preference.bradley_terry_nll(margin)

    def supervised_loss(self, policy: Logps) -> Tensor:
        """Weighted negative log-likelihood of the best response, shape ``(B,)``."""
        return self.alpha * NLLLoss(length_normalized=self.length_normalized)(policy, None)


@dataclass(frozen=True, kw_only=True)
class UnlikelihoodLoss(PreferenceLoss):
    """Unlikelihood, a baseline of DPO, Rafailov et al. 2023, arXiv:2305.18290, section 6.

    Supervised fine-tuning on the best response that makes the other unlikely. Nothing bounds how unlikely: at larger
    alpha and with many steps the policy comes apart.

    Args:
        alpha: Weight of the other response; the paper tries 0.05 to 1.
    """

    needs_reference: ClassVar[bool] = False

    alpha: float = 0.1

    def __post_init__(self) -> None:
        require(self.alpha > 0, "alpha", "positive", self.alpha, "the paper tries 0.05 to 1; for SFT use NLLLoss")

    def __call__(self, policy: Logps, reference: Logps | None, sums: Tensor | None = None) -> Tensor:
        """One loss an example, shape ``(B,)``; without a second response that of the best alone. Needs K = 2."""
        require_pairs(self, policy)
        chosen, rejected = self.rewards(policy, reference).unbind(1)
        return likelihoods.unlikelihood_nll(chosen, rejected, self.alpha)

    def rewards(self, policy: Logps, reference: Logps | None) -> Tensor:
        """Log-probability, shape ``(B, K)``."""
        return torch.where(policy.length > 0, widen(policy.total), 0.0)
