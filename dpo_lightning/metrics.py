"""Metrics that are exact: sums and counts over every example of every rank, never a mean of batch means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from torchmetrics import Metric

from dpo_lightning.batch import Logps

Z95 = 1.959963984540054  # 0.975 quantile of the standard normal


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


class RewardMetrics(Metric):
    """Loss, rewards, accuracies and margins under the names that dashboards know, and how well margins are calibrated.

    Of every pair a reward model says with which probability the first wins, the logistic function of the margin.
    ``calibration/brier`` is the mean square of what that lacks of 1, since the first does win: 1/4 for a model that
    knows nothing. ``calibration/error`` is the expected calibration error (Guo et al. 2017, arXiv:1706.04599): the
    confidence of a pair is the probability of the response that is held to be better, and pairs are sorted by it into
    bins of equal width between 1/2 and 1; of each bin confidence and accuracy differ by so much, and the mean over all
    pairs of that is the error. In rankings of more than two every pair counts. ``rewards/mean`` is over all responses.

    Args:
        num_bins: Bins of confidence.
    """

    full_state_update = False
    names = (
        *("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "rewards/mean"),
        "calibration/brier",
    )

    sums: Tensor
    counts: Tensor
    excess: Tensor

    def __init__(self, num_bins: int = 10) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(len(self.names)), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(self.names)), dist_reduce_fx="sum")
        self.add_state("excess", torch.zeros(num_bins), dist_reduce_fx="sum")

    def update(self, loss: Tensor, rewards: Tensor, present: Tensor) -> None:
        """Add a batch.

        Args:
            loss: Losses, shape ``(B,)``.
            rewards: Shape ``(B, K)``, best response first.
            present: Whether a response exists, bool, shape ``(B, K)``.
        """
        loss, rewards = loss.detach().float(), rewards.detach().float()
        every, paired = torch.ones_like(loss, dtype=torch.bool), present[:, 1:].any(1)
        rejected = _mean(rewards[:, 1:], present[:, 1:])
        margins, compared = _pairs(rewards, present)
        values = (
            (loss, every),
            (rewards[:, 0], every),
            (rejected, paired),
            (pair_accuracy(rewards, present), paired),
            (rewards[:, 0] - rejected, paired),
            (rewards, present),
            ((-margins).sigmoid().square(), compared),
        )
        # `.float()`: under precision bf16-true the Trainer casts these sums with the rest.
        self.sums = self.sums.float() + torch.stack(
            [torch.where(counted, value, 0.0).sum() for value, counted in values]
        )
        self.counts = self.counts.float() + torch.stack([counted.sum() for _, counted in values])
        confidence, right = margins.abs().sigmoid(), (1 + margins.sign()) / 2
        place = ((confidence - 0.5) * 2 * len(self.excess)).nan_to_num()  # what is no number has no bin either
        bins = place.long().clamp(0, len(self.excess) - 1)
        excess = torch.where(compared, confidence - right, 0.0)
        self.excess = self.excess.float().index_add(0, bins.flatten(), excess.flatten())

    def compute(self) -> dict[str, Tensor]:
        """Means over all examples, responses or pairs, by name, and the calibration error."""
        found = dict(zip(self.names, self.sums / self.counts, strict=True))
        return {**found, "calibration/error": self.excess.abs().sum() / self.counts[-1]}


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


def wilson_interval(share: float, count: float, z: float = Z95) -> tuple[float, float]:
    """Interval of a share that was found in so many trials, Wilson 1927; of 95 % unless told otherwise.

    Where trials may count one half, or are shares themselves, it is wider than need be.

    Args:
        share: What was found, between 0 and 1.
        count: Number of trials, or how many they are worth.
        z: Quantile of the normal distribution.
    """
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def pair_accuracy(rewards: Tensor, present: Tensor) -> Tensor:
    """Share of the pairs of an example that rewards order rightly, ties one half, (B, K) to (B,)."""
    margins, compared = _pairs(rewards, present)
    return _mean((1 + torch.sign(margins)) / 2, compared)


def _pairs(rewards: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Margins of all pairs of an example, better less worse, and which of them exist, (B, K (K - 1) / 2)."""
    first, second = torch.triu_indices(rewards.shape[1], rewards.shape[1], offset=1, device=rewards.device)
    return rewards[:, first] - rewards[:, second], present[:, first] & present[:, second]


def _mean(values: Tensor, present: Tensor) -> Tensor:
    """Mean over the last dimension of what is present."""
    return torch.where(present, values, 0.0).sum(-1) / present.sum(-1).clamp(min=1)
