"""Steps of batches in pieces: gradients, losses and metrics of the whole batch in the memory of one piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from dpo_lightning.batch import Batch, PreferenceBatch
from dpo_lightning.ranks import data_place


class PiecewiseModule(LightningModule):
    """Training, validation and test steps; a subclass says what the loss of a piece is."""

    def summed_loss(self, stage: str, piece: PreferenceBatch) -> Tensor:
        """Sum of the losses of a piece, of which the metric of a stage takes note: fit, validate or test."""
        raise NotImplementedError

    def num_losses(self, batch: Batch) -> Tensor | float:
        """What divides the sum over the pieces, so that the mean over ranks is the loss of the global batch.

        Lightning divides by the number of accumulated batches on top of it.
        """
        raise NotImplementedError

    def share_of_window(self, batch: Batch, counted: Literal["examples", "tokens"]) -> float | None:
        """What divides a sum over this rank's pieces, so that ranks and accumulated batches average to the mean of all.

        ``None`` where the batch does not say to what optimizer step it belongs.
        """
        window = batch.window
        if window is None or window.batches != self.trainer.accumulate_grad_batches:
            return None
        return getattr(window, counted) / (data_place(self.trainer).ranks * window.batches)

    def pieces(self, batch: Batch) -> Sequence[PreferenceBatch]:
        """What is run one after the other; a loss that needs a batch as a whole refuses several."""
        return batch.pieces

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss over a batch, whose gradient is that of its last piece: of the others it was added up before."""
        self._zero_gradients(batch_idx)
        num_losses = self._num_losses = self.num_losses(batch)
        *earlier, last = self.pieces(batch)
        done = [self._differentiated(self.summed_loss("fit", piece) / num_losses) for piece in earlier]
        return sum(done, self.summed_loss("fit", last) / num_losses)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect metrics of a batch."""
        for piece in self.pieces(batch):
            self.summed_loss("validate", piece)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect metrics of a batch."""
        for piece in self.pieces(batch):
            self.summed_loss("test", piece)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Nothing where the step has done so, before the first piece added its gradient."""
        if not self._is_zeroed:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    _is_zeroed = False
    _num_losses: Tensor | float = 1.0

    def _zero_gradients(self, batch_idx: int) -> None:
        """Drop the gradients of the last optimizer step before this one's forward needs memory."""
        self._is_zeroed = batch_idx % self.trainer.accumulate_grad_batches == 0
        if self._is_zeroed:
            for optimizer in self.trainer.optimizers:
                optimizer.zero_grad()

    def _differentiated(self, loss: Tensor) -> Tensor:
        """Add the gradient of a piece; DDP reduces the sum of all in the backward behind the step alone."""
        # Lightning divides the loss that a step returns in the same way. It runs the step under autocast, to which
        # backward should not be subject.
        with torch.autocast(self.device.type, enabled=False):
            self.trainer.strategy.backward(loss / self.trainer.accumulate_grad_batches, None)
        return loss.detach()
