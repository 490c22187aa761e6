"""Metrics that are exact: sums and counts over every example of every rank, never a mean of batch means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from torchmetrics import Metric

from dpo_lightning.batch import Logps


class PreferenceMetrics(Metric):
    """Loss, rewards, accuracies, margins and log-probabilities under the names that dashboards know.

    Chosen is the best response, rejected the mean over the others. The accuracy of an example is the share of its
    pairs that the rewards order rightly; a tie counts one half. An example without a second response counts for what
    is said of chosen alone, and for the loss.

    Args:
        part_names: Parts of the loss that are followed one by one.
    """

    full_state_update = False

    sums: Tensor
    counts: Tensor

    def __init__(self, part_names: Sequence[str] = ()) -> None:
        super().__init__()
        self.part_names = tuple(part_names)
        self.names = (
            *("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
            *("logps/chosen", "logps/rejected", *(f"loss/{name}" for name in self.part_names)),
        )
        self.add_state("sums", torch.zeros(len(self.names)), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(self.names)), dist_reduce_fx="sum")

    def update(
        self, loss: Tensor, rewards: Tensor, policy: Logps, parts: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        """Add a batch.

        Args:
            loss: Losses, shape ``(B,)``.
            rewards: Implicit rewards, shape ``(B, K)``.
            policy: The policy's log-probabilities, shape ``(B, K)``.
            parts: What the loss is made of, by name, shape ``(B,)`` each; the same names in every batch.
        """
        others = policy.length[:, 1:] > 0
        every, paired = torch.ones_like(loss, dtype=torch.bool), others.any(1)
        rejected_rewards = _mean(rewards[:, 1:], others)
        values = (
            (loss, every),
            (rewards[:, 0], every),
            (rejected_rewards, paired),
            (pair_accuracy(rewards, policy.length > 0), paired),
            (rewards[:, 0] - rejected_rewards, paired),
            (policy.total[:, 0], every),
            (_mean(policy.total[:, 1:], others), paired),
            *((parts[name], every) for name in self.part_names),
        )
        # `.float()`: under precision bf16-true the Trainer casts these sums with the rest.
        self.sums = self.sums.float() + torch.stack(
            [torch.where(counted, value.detach().float(), 0.0).sum() for value, counted in values]
        )
        self.counts = self.counts.float() + torch.stack([counted.sum() for _, counted in values])

    def compute(self) -> dict[str, Tensor]:
        """Means over all examples, by name."""
        return dict(zip(self.names, self.sums / self.counts, strict=True))


class TokenMetrics(Metric):
    """Loss in nats a token and perplexity, over all tokens."""

    full_state_update = False

    nll: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, policy: Logps) -> None:
        """Add a batch."""
        self.nll = self.nll.float() - policy.total.detach().float().sum()
        self.tokens = self.tokens.float() + policy.length.sum()

    def compute(self) -> dict[str, Tensor]:
        """``loss`` and ``perplexity``."""
        loss = self.nll / self.tokens
        return {"loss": loss, "perplexity": loss.exp()}


def pair_accuracy(rewards: Tensor, present: Tensor) -> Tensor:
    """Share of the pairs of an example that rewards order rightly, ties one half, (B, K) to (B,)."""
    first, second = torch.triu_indices(rewards.shape[1], rewards.shape[1], offset=1, device=rewards.device)
    right = (1 + torch.sign(rewards[:, first] - rewards[:, second])) / 2
    return _mean(right, present[:, first] & present[:, second])


def _mean(values: Tensor, present: Tensor) -> Tensor:
    """Mean over the last dimension of what is present."""
    return torch.where(present, values, 0.0).sum(-1) / present.sum(-1).clamp(min=1)
