"""Losses that compare distributions of log-ratios over a batch, quantile by quantile."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dpo_lightning.batch import Logps
from dpo_lightning.functional import preference
from dpo_lightning.losses.base import LogRatioLoss, PairLoss, check_label_smoothing, widen


@dataclass(frozen=True, kw_only=True)
class AOTLoss(LogRatioLoss, PairLoss):
    """Alignment by optimal transport (AOT), Melnyk et al. 2024, arXiv:2406.05882.

    The policy's margins log pi(chosen) - log pi(rejected) in a batch are compared with the reference's, each with the
    one of its rank; the loss stands at the example whose policy margin it is. Batches should be large: in a batch of
    one it is DPO.

    Args:
        beta: Strength of the pull towards the reference; the paper uses 0.01.
        label_smoothing: Probability that a label is wrong, in [0, 0.5); 0 trusts every label.
    """

    advice: ClassVar[str] = "the paper uses 0.01"
    couples_batch: ClassVar[bool] = True

    beta: float = 0.01
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_label_smoothing(self.label_smoothing)

    def pair_loss(self, policy: Logps, reference: Logps | None, sums: Tensor | None) -> Tensor:
        """Bradley-Terry likelihood of leading at every quantile."""
        first, second = self.samples(policy, reference)
        margin = preference.quantile_margins(first, second, policy.length[:, 1] > 0)
        return preference.bradley_terry_nll(self.beta * margin, self.label_smoothing)

    def samples(self, policy: Logps, reference: Logps | None) -> tuple[Tensor, Tensor]:
        """The sample that should lead and the one that should follow, in nats, each of shape ``(B,)``."""
        assert reference is not None, "a loss with `needs_reference` was called without one"
        ours, theirs = widen(policy.total), widen(reference.total)
        return ours[:, 0] - ours[:, 1], theirs[:, 0] - theirs[:, 1]


@dataclass(frozen=True, kw_only=True)
class AOTUnpairedLoss(AOTLoss):
    """Alignment by optimal transport of unpaired samples (AOT unpaired), Melnyk et al. 2024, arXiv:2406.05882.

    The log-ratios of the chosen responses of a batch are compared with those of its rejected ones, whatever their
    prompts, each with the one of its rank. The loss stands at the example whose chosen response it is.

    Args:
        beta: Strength of the pull towards the reference; the paper uses 0.01.
        label_smoothing: Probability that a label is wrong, in [0, 0.5); 0 trusts every label.
    """

    def samples(self, policy: Logps, reference: Logps | None) -> tuple[Tensor, Tensor]:
        """Log-ratios of chosen and of rejected responses."""
        assert reference is not None, "a loss with `needs_reference` was called without one"
        chosen, rejected = (widen(policy.total) - widen(reference.total)).unbind(1)
        return chosen, rejected
