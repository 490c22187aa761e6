"""Supervised fine-tuning on the same engine: preference optimisation starts from it."""

from __future__ import annotations

from torch import Tensor
from torchmetrics import Metric

from dpo_lightning.batch import PreferenceBatch
from dpo_lightning.errors import UsageError
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
        if batch.length.shape[1] != 1:
            raise UsageError(
                f"SFT learns one response a prompt, but this batch has up to {batch.length.shape[1]}; keep the best by "
                "`data.init_args.num_responses: 1`."
            )
        policy = self(batch)
        self.metric(stage).update(policy)
        # DDP takes the mean of the ranks' gradients, so each counts the tokens that a rank has on the average.
        tokens = self.trainer.strategy.reduce(policy.length.sum().float(), reduce_op="mean")
        return -policy.total.sum() / tokens
