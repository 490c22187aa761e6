"""Supervised fine-tuning on the same engine: preference optimisation starts from it."""

from __future__ import annotations

from torch import Tensor
from torchmetrics import Metric

from dpo_lightning.batch import PreferenceBatch
from dpo_lightning.metrics import TokenMetrics
from dpo_lightning.modules.base import PolicyModule


class SFTModule(PolicyModule):
    """Maximum likelihood of responses, every response token counting the same."""

    def make_metric(self) -> Metric:
        """Loss a token and perplexity."""
        return TokenMetrics()

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Negative log-likelihood a response token, in nats."""
        return self._step("fit", batch)

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Collect metrics of a batch."""
        self._step("validate", batch)

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Collect metrics of a batch."""
        self._step("test", batch)

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Log-probability of every response, shape ``(B, K)``."""
        return self(batch).total

    def _step(self, stage: str, batch: PreferenceBatch) -> Tensor:
        policy = self(batch)
        self.metric(stage).update(policy)
        return -policy.total.sum() / policy.length.sum()
