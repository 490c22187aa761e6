"""Reward models: the preference likelihood that DPO minimises, of a scalar head instead of log-ratios."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from dpo_lightning.batch import Batch, PreferenceBatch
from dpo_lightning.functional.preference import plackett_luce_nll
from dpo_lightning.metrics import RewardMetrics
from dpo_lightning.models.reward import OFFSET, AnyReward, reward_recipe
from dpo_lightning.modules.base import PolicyModule
from dpo_lightning.modules.guard import Guard
from dpo_lightning.modules.scored import ScoredResponses

log = logging.getLogger(__name__)

MEAN = "rewards/mean"


class RewardModule(PolicyModule):
    """A reward model: Bradley-Terry likelihood of pairs, Plackett-Luce likelihood of rankings.

    The likelihood leaves a constant open. It is chosen such that rewards have mean 0 over all responses of a reference
    set, the validation data or, without any, the training data: every validation finds the offset anew, and so does the
    end of a fit whose last weights were not validated. Checkpoints and exported folders hold it; what is predicted is
    rewards less the offset, while metrics are of rewards as the head gives them.

    Args:
        policy: The language model that it starts from, and how it is loaded; in Python also a model in memory for
            sequence classification with one label, which is then trained.
        **optimization: Learning rate and schedule, as in PolicyModule.
    """

    progress_names = ("loss", "rewards/accuracies", "rewards/margins")

    def __init__(self, policy: AnyReward, **optimization: Any) -> None:
        super().__init__(reward_recipe(policy), **optimization)
        self._guard = Guard("reward")
        self.offset = 0.0
        self._offset_step = -1  # the optimizer step whose weights it is of

    def make_metric(self) -> Metric:
        """Rewards, accuracies, margins and calibration."""
        return RewardMetrics()

    def forward(self, batch: PreferenceBatch) -> Tensor:  # type: ignore[override]
        """Reward of every response as the head gives it, 0 where it is absent, shape ``(B, K)``."""
        if self.policy is None:
            self.configure_model()
        rewards: Tensor = self.policy(batch)  # type: ignore[misc]
        return rewards

    def num_losses(self, batch: Batch) -> float:
        """Examples that a rank has on the average; of batches that do not say, those of this one."""
        share = self.share_of_window(batch, "examples")
        return sum(piece.length.shape[0] for piece in batch.pieces) if share is None else share

    def summed_loss(self, stage: str, piece: PreferenceBatch) -> Tensor:
        """Sum of the negative log-likelihoods of some rankings."""
        rewards, present = self(piece).float(), piece.length > 0
        if stage == "fit":
            self._guard.note_scores(piece.row, rewards, None)
        loss = plackett_luce_nll(rewards, present)
        self.metric(stage).update(loss, rewards, present)
        return loss.sum()

    def on_train_epoch_end(self) -> None:
        """Behind the last step find the offset, unless a validation has: before the last checkpoint is saved."""
        run = self.trainer
        ends = run.max_epochs is not None and 0 <= run.max_epochs <= run.current_epoch + 1
        if ends or run.should_stop or 0 <= run.max_steps <= run.global_step:
            self._find_offset(logged=True)

    def on_train_end(self) -> None:
        """Find it where a callback has ended the fit behind the last checkpoint: a folder that is exported has it."""
        super().on_train_end()
        self._find_offset(logged=False)  # the Trainer takes no more values

    def _find_offset(self, logged: bool) -> None:
        run = self.trainer
        if self._offset_step == run.global_step:
            return
        if not run.enable_validation and getattr(run.datamodule, "stream_buffer", None) is not None:  # type: ignore[attr-defined]
            if logged:
                log.warning("A stream is not read twice, so rewards get no offset: give `data.init_args.val`.")
            return
        self._throughput.pause()
        self._take_offset(self._mean_reward(self._reference_batches()), logged)
        self._throughput.resume()

    def predict_step(self, batch: Batch, batch_idx: int) -> ScoredResponses:
        """Reward of every response, less the offset."""
        scored = [
            ScoredResponses(
                piece.row, torch.where(piece.length > 0, self(piece).float() - self.offset, 0.0), piece.length
            )
            for piece in batch.pieces
        ]
        return ScoredResponses(*map(batch.joined, zip(*scored, strict=True)))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the offset."""
        super().on_save_checkpoint(checkpoint)
        checkpoint |= self.offset_record()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up."""
        super().on_load_checkpoint(checkpoint)
        kept = checkpoint.get(OFFSET, {})
        self.offset, self._offset_step = kept.get("value", 0.0), kept.get("step", -1)

    def offset_record(self) -> dict[str, Any]:
        """What a checkpoint keeps of the offset: its value, and the optimizer step whose weights it is of."""
        return {OFFSET: {"value": self.offset, "step": self._offset_step}}

    def _log_stage(self, stage: str, prefix: str) -> None:
        super()._log_stage(stage, prefix)
        if stage == "validate" and self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._take_offset(float(self._validation["metrics"][MEAN]))  # type: ignore[index]

    def _take_offset(self, offset: float, logged: bool = True) -> None:
        self.offset, self._offset_step = offset, self.trainer.global_step
        if logged:
            self.log(OFFSET, offset)

    def _reference_batches(self) -> Any:
        """Each response of the reference set once."""
        run, data = self.trainer, getattr(self.trainer, "datamodule", None)
        if data is None:
            return run.val_dataloaders if run.enable_validation else run.train_dataloader
        # The loaders are new ones, which leave the place in the epoch as it is.
        return data.val_dataloader() if run.enable_validation else data.train_dataloader()

    @torch.no_grad()
    def _mean_reward(self, batches: Iterable[Batch]) -> float:
        """Mean over all responses of all ranks, on the weights as they are."""
        assert self.policy is not None
        training, plugin = self.policy.training, self.trainer.precision_plugin
        self.policy.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in batches:
            for piece in batch.pieces:
                piece = self.transfer_batch_to_device(piece, self.device, 0)
                with plugin.forward_context():
                    rewards = self.policy(piece)
                sums += torch.stack([rewards.double().sum(), (piece.length > 0).sum().double()])
        self.policy.train(training)
        total, count = self.over_ranks(sums, "sum")
        return (total / count).item()
