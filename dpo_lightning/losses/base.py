"""What every loss offers, and what losses of pairs have in common."""

# No file of this folder postpones its annotations: jsonargparse reads those of a base class with the names of the
# subclass's file, so a user's file would have to import ClassVar without using it.
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

    A subclass says by class attributes what it needs of the models and of the batch:

    - ``needs_reference``: it compares the policy with a reference. Where it does not, no reference is built and
      ``reference`` is ``None``.
    - ``needs_collision``, ``needs_kl``: it reads ``Logps.collision``, ``Logps.kl`` of the policy.
    - ``needs_tokens``: it reads ``Logps.token`` of policy and reference.
    - ``couples_batch``: the loss of an example depends on the others of its batch.
    - ``compares_responses``: its rewards are what it trains; where not, a mixture takes its rewards from another part.
    - ``part_names``: the names that ``parts`` gives.
    - ``num_sums``: how many sums over all training examples it keeps, as ``sums`` gives them for a batch.
    - ``part_names``: names of its ``parts``.
    """

    needs_reference: ClassVar[bool] = True
    needs_collision: ClassVar[bool] = False
    needs_kl: ClassVar[bool] = False
    needs_tokens: ClassVar[bool] = False
    couples_batch: ClassVar[bool] = False
    compares_responses: ClassVar[bool] = True
    num_sums: ClassVar[int] = 0
    part_names: tuple[str, ...] = ()

    @abstractmethod
    def __call__(self, policy: Logps, reference: Logps | None, sums: Tensor | None = None) -> Tensor:
        """One differentiable loss an example, fp32 or wider, shape ``(B,)``.

        Args:
            policy: Log-probabilities of the policy.
            reference: Those of the reference, without gradient.
            sums: Over all training examples so far, shape ``(num_sums,)``; a loss without any need not take them.
        """

    @abstractmethod
    def rewards(self, policy: Logps, reference: Logps | None) -> Tensor:
        """Implicit reward of every response, shape ``(B, K)``; 0 where a response is absent."""

    def sums(self, policy: Logps, reference: Logps | None) -> Tensor:
        """What a training batch adds to the sums, without gradient, shape ``(num_sums,)``."""
        return policy.total.new_zeros(0)

    def parts(self, policy: Logps, reference: Logps | None, sums: Tensor | None = None) -> dict[str, Tensor]:
        """Parts that are worth a curve of their own, unweighted, by name, each of shape ``(B,)``."""
        return {}


class PairLoss(PreferenceLoss):
    """A loss of two responses, the best and the next; an example without the next has a loss of 0."""

    def __call__(self, policy: Logps, reference: Logps | None, sums: Tensor | None = None) -> Tensor:
        """One loss an example, 0 where there is no second response, shape ``(B,)``; needs K = 2."""
        require_pairs(self, policy)
        return torch.where(policy.length[:, 1] > 0, self.pair_loss(policy, reference, sums), 0.0)

    @abstractmethod
    def pair_loss(self, policy: Logps, reference: Logps | None, sums: Tensor | None) -> Tensor:
        """Loss of pairs, shape ``(B,)``; finite where the second response is absent."""


class PairwiseLoss(PairLoss):
    """A loss of the margin between the best response and the next."""

    def pair_loss(self, policy: Logps, reference: Logps | None, sums: Tensor | None) -> Tensor:
        """Loss of the reward margin."""
        rewards = self.rewards(policy, reference)
        return self.margin_loss(rewards[:, 0] - rewards[:, 1])

    @abstractmethod
    def margin_loss(self, margin: Tensor) -> Tensor:
        """Loss of reward margins, shape ``(B,)`` to ``(B,)``."""


@dataclass(frozen=True, kw_only=True)
class LogRatioLoss(PreferenceLoss):
    """A loss whose rewards are beta times the log-ratios of policy and reference.

    Args:
        beta: Strength of the pull towards the reference; larger stays closer.
    """

    advice: ClassVar[str] = "0.1 is usual"  # what an error recommends

    beta: float = 0.1

    def __post_init__(self) -> None:
        require(self.beta > 0, "beta", "positive", self.beta, self.advice)

    def rewards(self, policy: Logps, reference: Logps | None) -> Tensor:
        """Beta times the log-ratio, shape ``(B, K)``."""
        return implicit_rewards(policy, reference, self.beta)


def implicit_rewards(policy: Logps, reference: Logps | None, beta: float) -> Tensor:
    """Beta times the log-ratio of policy and reference, fp32 or wider, shape ``(B, K)``."""
    assert reference is not None, "a loss with `needs_reference` was called without one"
    return preference.implicit_rewards(widen(policy.total), widen(reference.total), beta)


def widen(values: Tensor) -> Tensor:
    """Values in fp32, or in their own dtype where that is wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def require_pairs(loss: PreferenceLoss, policy: Logps) -> None:
    """Refuse rankings where a loss knows pairs alone."""
    if policy.total.shape[1] != 2:
        raise UsageError(
            f"{type(loss).__name__} compares two responses, but this batch has up to {policy.total.shape[1]} a "
            "prompt. Keep the two best by `data.num_responses: 2`, or use PlackettLuceLoss for whole rankings."
        )


def require(value: bool, name: str, expected: str, got: object, remedy: str) -> None:
    """Refuse a constant without meaning, in words."""
    if not value:
        raise UsageError(f"`{name}` must be {expected}, got {got}; {remedy}.")


def check_label_smoothing(value: float) -> None:
    """Refuse what is no rate of flipped labels."""
    remedy = "at one half labels say nothing; beyond it, swap chosen and rejected"
    require(0 <= value < 0.5, "label_smoothing", "in [0, 0.5)", value, remedy)
