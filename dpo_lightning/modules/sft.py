"""Supervised fine-tuning on the same engine: preference optimisation starts from it."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from dpo_lightning.batch import Batch, PreferenceBatch
from dpo_lightning.errors import UsageError
from dpo_lightning.metrics import TokenMetrics
from dpo_lightning.modules.base import PolicyModule


class SFTModule(PolicyModule):
    """Maximum likelihood of responses, every response token counting the same."""

    def make_metric(self) -> Metric:
        """Loss a token and perplexity."""
        return TokenMetrics()

    def num_losses(self, batch: Batch) -> Tensor | float:
        """Scored tokens that a rank has on the average: gradients are the mean over ranks."""
        share = self.share_of_window(batch, "tokens")
        if share is not None:
            return share
        tokens = torch.stack([piece.length.sum() for piece in batch.pieces]).sum()
        return self.over_ranks(tokens.float(), "mean")

    def summed_loss(self, stage: str, piece: PreferenceBatch) -> Tensor:
        """Negative log-likelihood of the response tokens, in nats."""
        if piece.length.numel() and piece.length.shape[1] != 1:  # of a rank without examples it says nothing
            raise UsageError(
                f"SFT learns one response a prompt, but this batch has up to {piece.length.shape[1]}; keep the best by "
                "`data.init_args.num_responses: 1`."
            )
        policy = self(piece)
        if stage == "fit":
            self._guard.note_scores(piece.row, policy.total, None)
        self.metric(stage).update(policy)
        return -policy.total.sum()

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Log-probability of every response, shape ``(B, K)``."""
        return batch.joined([self(piece).total for piece in batch.pieces])
