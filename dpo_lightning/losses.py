"""Losses: frozen dataclasses that choose a formula and its constants.

A loss takes log-probabilities of policy and reference and returns one number an example; it knows no model and no
reduction. A user's own loss is a subclass of :class:`PreferenceLoss` or :class:`PairwiseLoss` in a file of their
own, named by ``class_path`` in YAML.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dpo_lightning.batch import Logps
from dpo_lightning.errors import UsageError
from dpo_lightning.functional import preference


class PreferenceLoss(ABC):
    """What every preference loss offers.

    A subclass says by ``needs_reference`` whether it compares the policy with a reference; where it does not,
    no reference is built and ``reference`` is ``None``.
    """

    needs_reference: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, policy: Logps, reference: Logps | None) -> Tensor:
        """One differentiable loss an example, fp32 or wider, shape ``(B,)``."""

    @abstractmethod
    def rewards(self, policy: Logps, reference: Logps | None) -> Tensor:
        """Implicit reward of every response, shape ``(B, K)``; 0 where a response is absent."""


class PairwiseLoss(PreferenceLoss):
    """A loss of the margin between the best response and the next."""

    def __call__(self, policy: Logps, reference: Logps | None) -> Tensor:
        """One loss an example, 0 where there is no second response, shape ``(B,)``; needs K = 2."""
        if policy.total.shape[1] != 2:
            raise UsageError(
                f"{type(self).__name__} compares two responses, but this batch has up to {policy.total.shape[1]} a "
                "prompt. Keep the two best by `data.num_responses: 2`, or use PlackettLuceLoss for whole rankings."
            )
        rewards = self.rewards(policy, reference)
        return torch.where(policy.length[:, 1] > 0, self.margin_loss(rewards[:, 0] - rewards[:, 1]), 0.0)

    @abstractmethod
    def margin_loss(self, margin: Tensor) -> Tensor:
        """Loss of reward margins, shape ``(B,)`` to ``(B,)``."""


def implicit_rewards(policy: Logps, reference: Logps | None, beta: float) -> Tensor:
    """Beta times the log-ratio of policy and reference, fp32 or wider, shape ``(B, K)``."""
    assert reference is not None, "a loss with `needs_reference` was called without one"
    wide = torch.promote_types(policy.total.dtype, torch.float32)
    return preference.implicit_rewards(policy.total.to(wide), reference.total.to(wide), beta)


def _require(value: bool, name: str, expected: str, got: object, remedy: str) -> None:
    if not value:
        raise UsageError(f"`{name}` must be {expected}, got {got}; {remedy}.")


@dataclass(frozen=True, kw_only=True)
class DPOLoss(PairwiseLoss):
    """Direct preference optimization, Rafailov et al. 2023, arXiv:2305.18290; with label smoothing, conservative DPO.

    Args:
        beta: Strength of the pull towards the reference; larger stays closer.
        label_smoothing: Probability that a label is wrong, in [0, 0.5); 0 trusts every label.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _require(self.beta > 0, "beta", "positive", self.beta, "for a loss without a reference use SimPOLoss")
        _check_label_smoothing(self.label_smoothing)

    def rewards(self, policy: Logps, reference: Logps | None) -> Tensor:
        """Beta times the log-ratio, shape ``(B, K)``."""
        return implicit_rewards(policy, reference, self.beta)

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
        _require(self.tau > 0, "tau", "positive", self.tau, "0.1 is usual")

    def rewards(self, policy: Logps, reference: Logps | None) -> Tensor:
        """Tau times the log-ratio (of means where length-normalised), shape ``(B, K)``."""
        rewards = implicit_rewards(policy, reference, self.tau)
        return rewards / policy.length.clamp(min=1) if self.length_normalized else rewards

    def margin_loss(self, margin: Tensor) -> Tensor:
        """Squared distance of the log-ratio margin from its target."""
        return preference.squared_preference_loss(margin / self.tau, self.tau)


@dataclass(frozen=True, kw_only=True)
class HingeLoss(PairwiseLoss):
    """Hinge on the reward margin: SLiC-HF (arXiv:2305.10425) normalised by a reference, as in RSO (arXiv:2309.06657).

    Args:
        beta: Inverse of the log-ratio margin at which a pair is good enough.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        _require(self.beta > 0, "beta", "positive", self.beta, "pairs count until their log-ratio margin is 1 / beta")

    def rewards(self, policy: Logps, reference: Logps | None) -> Tensor:
        """Beta times the log-ratio, shape ``(B, K)``."""
        return implicit_rewards(policy, reference, self.beta)

    def margin_loss(self, margin: Tensor) -> Tensor:
        """Zero from a margin of one."""
        return preference.hinge_preference_loss(margin)


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
        _require(self.beta > 0, "beta", "positive", self.beta, "the paper uses 2.0 to 2.5")
        _require(self.gamma >= 0, "gamma", "zero or more", self.gamma, "the paper uses 0.3 to 1.6")

    def rewards(self, policy: Logps, reference: Logps | None) -> Tensor:
        """Beta times the mean log-probability of a token, shape ``(B, K)``."""
        wide = torch.promote_types(policy.total.dtype, torch.float32)
        return self.beta * policy.total.to(wide) / policy.length.clamp(min=1)

    def margin_loss(self, margin: Tensor) -> Tensor:
        """Bradley-Terry likelihood of leading by gamma."""
        return preference.bradley_terry_nll(margin - self.gamma)


@dataclass(frozen=True, kw_only=True)
class PlackettLuceLoss(PreferenceLoss):
    """DPO for whole rankings, Rafailov et al. 2023, arXiv:2305.18290, appendix A.3; any K, at K = 2 it is DPO.

    Args:
        beta: Strength of the pull towards the reference; larger stays closer.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        _require(self.beta > 0, "beta", "positive", self.beta, "0.1 is usual")

    def __call__(self, policy: Logps, reference: Logps | None) -> Tensor:
        """One loss an example, shape ``(B,)``."""
        return preference.plackett_luce_nll(self.rewards(policy, reference), policy.length > 0)

    def rewards(self, policy: Logps, reference: Logps | None) -> Tensor:
        """Beta times the log-ratio, shape ``(B, K)``."""
        return implicit_rewards(policy, reference, self.beta)


def _check_label_smoothing(value: float) -> None:
    remedy = "at one half labels say nothing; beyond it, swap chosen and rejected"
    _require(0 <= value < 0.5, "label_smoothing", "in [0, 0.5)", value, remedy)
