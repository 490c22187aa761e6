"""A reference that follows the policy: TR-DPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dpo_lightning.errors import UsageError
from dpo_lightning.models.policy import CausalPolicy
from dpo_lightning.references.base import Circumstances, FrozenPolicy, Reference


@dataclass(frozen=True, kw_only=True)
class Synced(Reference):
    """A copy of the policy that is drawn towards it again and again: TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656.

    Every interval optimizer steps reference = alpha policy + (1 - alpha) reference; alpha 1 is the paper's hard
    update, less its soft one. The reference is in every checkpoint.

    Args:
        alpha: Share of the policy in the new reference; the paper finds 0.5 to 0.6 best for soft updates.
        interval: Optimizer steps between updates; for hard updates the paper uses 256 to 512.
    """

    alpha: float = 0.6
    interval: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise UsageError(f"`alpha` must be in (0, 1], got {self.alpha}; for a fixed reference use FrozenCopy.")
        if self.interval < 1:
            raise UsageError(f"`interval` must be 1 or more, got {self.interval}.")

    @property
    def is_initial_policy(self) -> bool:
        """True: only later does it change."""
        return True

    def build(self, found: Circumstances) -> SyncedPolicy:
        """A deep copy."""
        return SyncedPolicy(found.copy(), self.alpha, self.interval)


class SyncedPolicy(FrozenPolicy):
    """A frozen policy that takes up weights of the trained one.

    Args:
        policy: The policy to freeze.
        alpha: Share of the trained policy at an update.
        interval: Optimizer steps between updates.
    """

    in_checkpoints: ClassVar[bool] = True

    def __init__(self, policy: CausalPolicy, alpha: float, interval: int) -> None:
        super().__init__(policy)
        self.alpha, self.interval = alpha, interval

    @torch.no_grad()
    def after_step(self, policy: CausalPolicy, step: int) -> None:
        """Update every ``interval`` steps."""
        if step % self.interval == 0:
            for mine, theirs in zip(self.policy.parameters(), policy.parameters(), strict=True):
                if theirs.requires_grad:
                    mine.lerp_(theirs.to(mine.dtype), self.alpha)
