"""DPO that minds how long responses are."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dpo_lightning.batch import Logps
from dpo_lightning.functional.likelihoods import desensitized_logps, mean_logp
from dpo_lightning.losses.base import require, widen
from dpo_lightning.losses.pairwise import DPOLoss


@dataclass(frozen=True, kw_only=True)
class LengthNormalizedDPOLoss(DPOLoss):
    """Length-normalised DPO as in Tülu 3, Lambert et al. 2024, arXiv:2411.15124: DPO of log-ratios a token.

    Args:
        beta: Strength of the pull towards the reference; Tülu 3 uses 5.
        label_smoothing: Probability that a label is wrong, in [0, 0.5); 0 trusts every label.
    """

    advice: ClassVar[str] = "Tülu 3 uses 5"

    beta: float = 5.0

    def rewards(self, policy: Logps, reference: Logps | None) -> Tensor:
        """Beta times the log-ratio a token, shape ``(B, K)``."""
        return mean_logp(super().rewards(policy, reference), policy.length)


@dataclass(frozen=True, kw_only=True)
class RDPOLoss(DPOLoss):
    """Length-regularised DPO (R-DPO), Park et al. 2024, arXiv:2403.19159: a token costs alpha.

    The policy maximises a reward less alpha times the length, so the reward behind a policy is beta times the
    log-ratio plus alpha times the length: a pair is learned less the longer its chosen response is.

    Args:
        beta: Strength of the pull towards the reference; larger stays closer.
        alpha: Nats that a token of a response costs.
        label_smoothing: Probability that a label is wrong, in [0, 0.5); 0 trusts every label.
    """

    alpha: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha >= 0, "alpha", "zero or more", self.alpha, "at 0 it is DPO")

    def rewards(self, policy: Logps, reference: Logps | None) -> Tensor:
        """Beta times the log-ratio plus alpha times the length, shape ``(B, K)``."""
        rewards = super().rewards(policy, reference)
        return rewards + self.alpha * policy.length.to(rewards.dtype)


@dataclass(frozen=True, kw_only=True)
class LDDPOLoss(DPOLoss):
    """Length-desensitised DPO (LD-DPO), Liu et al. 2024, arXiv:2409.06411.

    What the longer response has beyond the length of the shorter counts less.

    Args:
        beta: Strength of the pull towards the reference; larger stays closer.
        ld_alpha: What a token counts beyond the length of the shorter response, in [0, 1]; 1 is DPO. Of policy and
            reference alike.
        label_smoothing: Probability that a label is wrong, in [0, 0.5); 0 trusts every label.
    """

    needs_tokens: ClassVar[bool] = True

    ld_alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.ld_alpha <= 1, "ld_alpha", "in [0, 1]", self.ld_alpha, "the paper advises 0.5; 1 is DPO")

    def rewards(self, policy: Logps, reference: Logps | None) -> Tensor:
        """Beta times the log-ratio in which surplus tokens count less, shape ``(B, K)``."""
        assert reference is not None, "a loss with `needs_reference` was called without one"
        return super().rewards(self._desensitized(policy), self._desensitized(reference))

    def _desensitized(self, logps: Logps) -> Logps:
        assert logps.token is not None, "log-probabilities came without their tokens"
        assert logps.owner is not None
        total = desensitized_logps(widen(logps.token), logps.owner, logps.length, self.ld_alpha)
        return logps._replace(total=total)
