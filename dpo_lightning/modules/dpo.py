"""Preference optimisation: a policy, a frozen reference and a loss of their log-probabilities."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from dpo_lightning.batch import Batch, Logps, PreferenceBatch
from dpo_lightning.errors import UsageError
from dpo_lightning.losses import PreferenceLoss
from dpo_lightning.metrics import PreferenceMetrics
from dpo_lightning.models.in_memory import AnyPolicy
from dpo_lightning.models.policy import score
from dpo_lightning.modules.precision import compute_dtype
from dpo_lightning.modules.referenced import ReferencedModule
from dpo_lightning.modules.scored import ScoredResponses
from dpo_lightning.recipes import from_plain
from dpo_lightning.references.base import Reference

log = logging.getLogger(__name__)

LOSS_SUMS = "loss_sums"


class DPOModule(ReferencedModule):
    """Direct preference optimisation and its family: which member is the loss's choice.

    Args:
        policy: The model and how it is loaded; in Python also a model in memory, which is then trained.
        loss: The objective, such as DPOLoss.
        reference: Where reference log-probabilities come from; a FrozenCopy of the policy unless named.
        **optimization: Learning rate and schedule, as in PolicyModule.
    """

    progress_names = ("loss", "rewards/accuracies", "rewards/margins")

    def __init__(
        self,
        policy: AnyPolicy,
        loss: PreferenceLoss,
        reference: Reference | None = None,
        **optimization: Any,
    ) -> None:
        self.loss = from_plain(loss, PreferenceLoss)  # type: ignore[type-abstract]  # first: the metrics ask it
        super().__init__(policy, reference, **optimization)
        if self.reference.sums_alone and (self.loss.needs_tokens or self.loss.needs_kl):
            raise UsageError(
                f"{type(self.loss).__name__} needs more of the reference than the sums over responses that "
                f"{type(self.reference).__name__} keeps; use FrozenCopy or AdaptersOff."
            )
        self._reference_checked = False
        # No buffer: a strategy may cast those to 16 bits, in which a count stops at 256.
        self._loss_sums = torch.zeros(self.loss.num_sums)
        self.record(loss=self.loss)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with one."""
        return self.loss.needs_reference

    def make_metric(self) -> Metric:
        """Rewards, accuracies, margins and log-probabilities, and the parts of a mixed loss."""
        return PreferenceMetrics(self.loss.part_names)

    def setup(self, stage: str) -> None:
        """Find out what cannot be done before any weight is loaded."""
        super().setup(stage)
        split = self.trainer.world_size > 1 or self.trainer.accumulate_grad_batches > 1
        if self.loss.couples_batch and split and stage == "fit":
            raise UsageError(
                f"{type(self.loss).__name__} compares the examples of a batch with each other, so a batch cannot be "
                "split among devices or accumulated: use one device and `trainer.accumulate_grad_batches: 1`."
            )
        data = getattr(self.trainer, "datamodule", None)
        if getattr(data, "micro_batch_tokens", None) is not None and stage != "predict":
            self._check_pieces()

    def on_train_start(self) -> None:
        """Every fit checks the reference anew."""
        super().on_train_start()
        self._reference_checked = False

    def pieces(self, batch: Batch) -> Sequence[PreferenceBatch]:
        """What is run one after the other."""
        if len(batch.pieces) > 1:
            self._check_pieces()
        return batch.pieces

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss over the examples of a batch."""
        if not self._reference_checked:
            self._check_reference(batch)
        return super().training_step(batch, batch_idx)

    def num_losses(self, batch: Batch) -> float:
        """Examples that a rank has on the average; of batches that do not say, those of this one."""
        share = self.share_of_window(batch, "examples")
        return sum(piece.length.shape[0] for piece in batch.pieces) if share is None else share

    def summed_loss(self, stage: str, piece: PreferenceBatch) -> Tensor:
        """Sum of the losses of some examples."""
        policy, reference = self.scores(piece)
        if stage == "fit":
            self._guard.note_scores(piece.row, policy.total, None if reference is None else reference.total)
        sums = self._sums(policy, reference, add=stage == "fit")
        loss = self._losses(policy, reference, sums) + self.auxiliary_losses(stage, piece, policy, reference)
        with torch.no_grad():
            parts = self.loss.parts(policy, reference, sums)
            self.metric(stage).update(loss, self.loss.rewards(policy, reference), policy, parts)
        return loss.sum()

    def auxiliary_losses(
        self, stage: str, piece: PreferenceBatch, policy: Logps, reference: Logps | None
    ) -> Tensor | float:
        """What a subclass adds to the losses of some examples, shape ``(B,)``.

        Since it is a loss of each example, the mean over pieces, accumulated batches and ranks is right by itself.

        Args:
            stage: fit, validate or test.
            piece: The examples.
            policy: What the policy says of them, with gradients.
            reference: What the reference says; None where the loss needs none.
        """
        return 0.0

    def predict_step(self, batch: Batch, batch_idx: int) -> ScoredResponses:
        """Implicit reward of every response: a trained policy is a reward model."""
        scored = [
            ScoredResponses(piece.row, self.loss.rewards(*self.scores(piece)), piece.length) for piece in batch.pieces
        ]
        return ScoredResponses(*map(batch.joined, zip(*scored, strict=True)))

    def scores(self, batch: PreferenceBatch) -> tuple[Logps, Logps | None]:
        """What policy and reference say of a batch, with all that the loss asks for."""
        if not self.loss.needs_kl:
            policy = self(batch, collision=True) if self.loss.needs_collision else self(batch)
            return policy, self.reference_logps(batch)
        self._build_reference()
        outputs = self.reference_policy.outputs(batch)  # type: ignore[union-attr]
        return self(batch, outputs, self.loss.needs_collision), score(outputs, batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the loss's sums."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[LOSS_SUMS] = self._loss_sums.tolist()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the loss's sums, unless they are those of another loss."""
        super().on_load_checkpoint(checkpoint)
        sums = checkpoint.get(LOSS_SUMS, [])
        if len(sums) == self.loss.num_sums:
            self._loss_sums = torch.tensor(sums)

    def _losses(self, policy: Logps, reference: Logps | None, sums: Tensor | None) -> Tensor:
        # A loss of a user's own need not know of sums.
        return self.loss(policy, reference) if sums is None else self.loss(policy, reference, sums)

    def _sums(self, policy: Logps, reference: Logps | None, add: bool) -> Tensor | None:
        """What the loss keeps of all training examples so far, this batch included, over all ranks."""
        if not self.loss.num_sums:
            return None
        self._loss_sums = self._loss_sums.to(self.device)
        if add:
            with torch.no_grad():
                new = self.loss.sums(policy, reference).float()
            self._loss_sums = self._loss_sums + self.over_ranks(new, "sum")
        return self._loss_sums

    def _check_pieces(self) -> None:
        """Refuse batches in pieces where the loss of an example depends on others of its batch."""
        if self.loss.couples_batch:
            reason = "compares the examples of a batch with each other"
        elif self.loss.num_sums:
            reason = "keeps sums to which a batch adds as a whole"
        else:
            return
        raise UsageError(
            f"{type(self.loss).__name__} {reason}, so a batch cannot be run in pieces: leave out "
            "`data.init_args.micro_batch_tokens` and make `data.init_args.batch_size` smaller."
        )

    @torch.no_grad()
    def _check_reference(self, batch: Batch) -> None:
        """On the first batch of a fit a copy of the policy must agree with it; anything else is reported."""
        self._reference_checked = True
        if not self.loss.needs_reference:
            return
        assert self.policy is not None
        self.policy.eval()  # dropout, where it is kept, is no difference between the models
        differences, losses = zip(*map(self._compared, self.pieces(batch)), strict=True)
        self.policy.train()
        # All ranks come to the same verdict.
        difference = self.over_ranks(torch.stack(differences).max().nan_to_num(nan=math.inf), "max").item()
        total, count = torch.cat(losses).sum(), torch.tensor(float(sum(map(len, losses))), device=self.device)
        loss = (self.over_ranks(total, "sum") / self.over_ranks(count, "sum")).item()
        if not self.reference.is_initial_policy or self._holds_trained_weights:
            log.info(f"First batch: loss {loss:.4f}, largest |log pi - log pi_ref| {difference:.4f} nats.")
        elif not difference <= self._rounding():
            raise UsageError(
                f"The reference should be the policy that training begins with, but on the first batch their "
                f"log-probabilities differ by up to {difference:.3g} nats and the loss is {loss:.4f}. Something "
                "changed the policy after the reference was copied from it; if the reference is another model on "
                "purpose, name it by `reference.init_args.path`."
            )

    def _compared(self, piece: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Largest difference of policy and reference on a piece, and its losses."""
        policy, reference = self.scores(piece)
        assert reference is not None
        losses = self._losses(policy, reference, self._sums(policy, reference, add=False))
        differences = (policy.total - reference.total).abs().flatten()
        return torch.cat([differences, differences.new_zeros(1)]).max(), losses

    def _rounding(self) -> float:
        """Largest difference of summed log-probabilities that rounding explains, in nats.

        The same weights through the same kernels differ by nothing; a kernel that adds in another order, by little.
        """
        sixteen_bit = compute_dtype(self.precision) is not None or self.spec.dtype != "float32"
        return 0.1 if sixteen_bit else 1e-2
