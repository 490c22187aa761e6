"""Weighted sums of losses."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_lightning.batch import Logps
from dpo_lightning.losses.base import PreferenceLoss, require


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """A part of a MixedLoss.

    Args:
        loss: The loss.
        weight: Its weight in the sum; 0 logs it only.
    """

    loss: PreferenceLoss
    weight: float = 1.0

    def __post_init__(self) -> None:
        require(self.weight >= 0, "weight", "zero or more", self.weight, "a part with weight 0 is only logged")


@dataclass(frozen=True, kw_only=True)
class MixedLoss(PreferenceLoss):
    """A weighted sum of losses: RPO, IRPO, MPO and any other; each part is logged by itself, without its weight.

    Rewards and what is made of them (accuracies, margins) are those of the first part that compares responses, which
    NLLLoss does not.

    Args:
        losses: The parts, each a ``loss`` and its ``weight``.
    """

    losses: tuple[Weighted, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "losses", tuple(self.losses))  # a list, where it comes from YAML or a checkpoint
        require(len(self.losses) > 0, "losses", "at least one part", len(self.losses), "as in [{loss: DPOLoss}]")

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """Whether any part does."""
        return any(part.loss.needs_reference for part in self.losses)

    @property
    def needs_collision(self) -> bool:  # type: ignore[override]
        """Whether any part does."""
        return any(part.loss.needs_collision for part in self.losses)

    @property
    def needs_kl(self) -> bool:  # type: ignore[override]
        """Whether any part does."""
        return any(part.loss.needs_kl for part in self.losses)

    @property
    def needs_tokens(self) -> bool:  # type: ignore[override]
        """Whether any part does."""
        return any(part.loss.needs_tokens for part in self.losses)

    @property
    def couples_batch(self) -> bool:  # type: ignore[override]
        """Whether any part does."""
        return any(part.loss.couples_batch for part in self.losses)

    @property
    def compares_responses(self) -> bool:  # type: ignore[override]
        """Whether any part does."""
        return any(part.loss.compares_responses for part in self.losses)

    @property
    def num_sums(self) -> int:  # type: ignore[override]
        """Of all parts together, one behind the other."""
        return sum(part.loss.num_sums for part in self.losses)

    @property
    def part_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Of each part its class without Loss, with a number from the second of a class on: DPO, NLL, DPO2."""
        names = [type(part.loss).__name__.removesuffix("Loss") for part in self.losses]
        counts = [names[:place].count(name) for place, name in enumerate(names)]
        return tuple(f"{name}{count + 1}" if count else name for name, count in zip(names, counts, strict=True))

    def __call__(self, policy: Logps, reference: Logps | None, sums: Tensor | None = None) -> Tensor:
        """Weighted sum of the parts, shape ``(B,)``."""
        values = self.parts(policy, reference, sums).values()
        return torch.stack([part.weight * value for part, value in zip(self.losses, values, strict=True)]).sum(0)

    def rewards(self, policy: Logps, reference: Logps | None) -> Tensor:
        """Those of the first part that compares responses, shape ``(B, K)``."""
        comparing = (part.loss for part in self.losses if part.loss.compares_responses)
        return next(comparing, self.losses[0].loss).rewards(policy, reference)

    def sums(self, policy: Logps, reference: Logps | None) -> Tensor:
        """What a batch adds to the sums of all parts."""
        return torch.cat([part.loss.sums(policy, reference) for part in self.losses])

    def parts(self, policy: Logps, reference: Logps | None, sums: Tensor | None = None) -> dict[str, Tensor]:
        """Each part, unweighted, by its name."""
        counts = [part.loss.num_sums for part in self.losses]
        shares = [None] * len(counts) if sums is None else sums.split(counts)
        values = []
        for part, share in zip(self.losses, shares, strict=True):
            # A loss without sums, such as a user's own, need not take any.
            keywords = {"sums": share} if part.loss.num_sums else {}
            values.append(part.loss(policy, reference, **keywords))
        return dict(zip(self.part_names, values, strict=True))
