"""Preference optimisation: a policy, a frozen reference and a loss of their log-probabilities."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from dpo_lightning.batch import Logps, PreferenceBatch
from dpo_lightning.errors import UsageError
from dpo_lightning.losses import PreferenceLoss
from dpo_lightning.metrics import PreferenceMetrics
from dpo_lightning.models.policy import CausalPolicy, score
from dpo_lightning.models.spec import PolicySpec
from dpo_lightning.modules.base import PolicyModule
from dpo_lightning.recipes import from_plain
from dpo_lightning.references.base import Circumstances, Reference, ReferenceModel, Run
from dpo_lightning.references.frozen import FrozenCopy

log = logging.getLogger(__name__)

FINGERPRINT = "reference_fingerprint"
LOSS_SUMS = "loss_sums"
REFERENCE = "reference_policy."


class ScoredResponses(NamedTuple):
    """What ``predict`` gives for a batch.

    Attributes:
        row: Number of each example in its source, shape ``(B,)``.
        rewards: Implicit reward of each response, 0 where it is absent, shape ``(B, K)``.
        length: Tokens of each response, 0 where it is absent, shape ``(B, K)``.
    """

    row: Tensor
    rewards: Tensor
    length: Tensor


class DPOModule(PolicyModule):
    """Direct preference optimisation and its family: which member is the loss's choice.

    Args:
        policy: The model and how it is loaded.
        loss: The objective, such as DPOLoss.
        reference: Where reference log-probabilities come from; a FrozenCopy of the policy unless named.
        **optimization: Learning rate and schedule, as in PolicyModule.
    """

    reference_policy: ReferenceModel | None
    progress_names = ("loss", "rewards/accuracies", "rewards/margins")

    def __init__(
        self,
        policy: PolicySpec,
        loss: PreferenceLoss,
        reference: Reference | None = None,
        **optimization: Any,
    ) -> None:
        self.loss = from_plain(loss, PreferenceLoss)  # type: ignore[type-abstract]  # first: the metrics ask it
        super().__init__(policy, **optimization)
        self.reference = from_plain(reference or FrozenCopy(), Reference)  # type: ignore[type-abstract]
        if self.reference.sums_alone and (self.loss.needs_tokens or self.loss.needs_kl):
            raise UsageError(
                f"{type(self.loss).__name__} needs more of the reference than the sums over responses that "
                f"{type(self.reference).__name__} keeps; use FrozenCopy or AdaptersOff."
            )
        self.reference_policy = None
        self._reference_checked = self._holds_trained_weights = False
        self._expected_fingerprint: str | None = None
        # No buffer: a strategy may cast those to 16 bits, in which a count stops at 256.
        self._loss_sums = torch.zeros(self.loss.num_sums)
        self.record(loss=self.loss, reference=self.reference)

    def make_metric(self) -> Metric:
        """Rewards, accuracies, margins and log-probabilities, and the parts of a mixed loss."""
        return PreferenceMetrics(self.loss.part_names)

    def setup(self, stage: str) -> None:
        """Find out what cannot be done before any weight is loaded."""
        super().setup(stage)
        if self.loss.needs_reference:
            self.reference.check(self.spec)
        split = self.trainer.world_size > 1 or self.trainer.accumulate_grad_batches > 1
        if self.loss.couples_batch and split and stage == "fit":
            raise UsageError(
                f"{type(self.loss).__name__} compares the examples of a batch with each other, so a batch cannot be "
                "split among devices or accumulated: use one device and `trainer.accumulate_grad_batches: 1`."
            )

    def configure_model(self) -> None:
        """Build the policy, and under a Trainer the reference: a copy has to be taken before training changes it."""
        super().configure_model()
        if self._trainer is not None:
            self._build_reference()

    def on_fit_start(self) -> None:
        """Make the reference ready for all that will be asked of it."""
        self._prepare_reference()

    def on_validation_start(self) -> None:
        """The same."""
        super().on_validation_start()
        self._prepare_reference()

    def on_test_start(self) -> None:
        """The same."""
        self._prepare_reference()

    def on_predict_start(self) -> None:
        """The same."""
        self._prepare_reference()

    def on_train_start(self) -> None:
        """Every fit checks the reference anew."""
        super().on_train_start()
        self._reference_checked = False

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Mean loss over the examples of a batch."""
        if not self._reference_checked:
            self._check_reference(batch)
        return self._step("fit", batch)

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Collect metrics of a batch."""
        self._step("validate", batch)

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Collect metrics of a batch."""
        self._step("test", batch)

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> ScoredResponses:
        """Implicit reward of every response: a trained policy is a reward model."""
        policy, reference = self.scores(batch)
        return ScoredResponses(batch.row, self.loss.rewards(policy, reference), batch.length)

    def scores(self, batch: PreferenceBatch) -> tuple[Logps, Logps | None]:
        """What policy and reference say of a batch, with all that the loss asks for."""
        if not self.loss.needs_kl:
            policy = self(batch, collision=True) if self.loss.needs_collision else self(batch)
            return policy, self.reference_logps(batch)
        self._build_reference()
        outputs = self.reference_policy.outputs(batch)  # type: ignore[union-attr]
        return self(batch, outputs, self.loss.needs_collision), score(outputs, batch)

    def reference_logps(self, batch: PreferenceBatch) -> Logps | None:
        """Log-probabilities of the reference, without gradients; ``None`` where the loss needs none."""
        if not self.loss.needs_reference:
            return None
        self._build_reference()
        return self.reference_policy(batch)  # type: ignore[misc]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Let a reference that follows the policy do so, before a callback can save a checkpoint."""
        step = self.trainer.global_step + 1
        super().optimizer_step(*args, **kwargs)
        # Another fit of this module goes on against the same reference, as one from a checkpoint does.
        self._holds_trained_weights = True
        if self.reference_policy is not None:
            assert self.policy is not None
            self.reference_policy.after_step(self.policy, step)

    def is_left_out(self, name: str) -> bool:
        """A reference that does not change is built again, not saved; of one that does, what is saved of the policy."""
        reference = self.reference_policy
        fixed = reference is None or not reference.in_checkpoints
        return (fixed and name.startswith(REFERENCE)) or super().is_left_out(name.removeprefix(REFERENCE))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the reference's fingerprint instead of its weights."""
        super().on_save_checkpoint(checkpoint)
        if self.reference_policy is not None:
            checkpoint[FINGERPRINT] = self.reference_policy.fingerprint
        elif self._expected_fingerprint is not None:
            checkpoint[FINGERPRINT] = self._expected_fingerprint
        checkpoint[LOSS_SUMS] = self._loss_sums.tolist()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """From here on the policy in memory is a trained one, and no longer its own reference."""
        super().on_load_checkpoint(checkpoint)
        if any(name.startswith(REFERENCE) for name in checkpoint["state_dict"]):
            self._build_reference()  # its weights are to be loaded too
        self._holds_trained_weights = True
        self._expected_fingerprint = checkpoint.get(FINGERPRINT)
        sums = checkpoint.get(LOSS_SUMS, [])
        if len(sums) == self.loss.num_sums:
            self._loss_sums = torch.tensor(sums)
        if self.reference_policy is not None:
            self._compare_fingerprint()

    def _step(self, stage: str, batch: PreferenceBatch) -> Tensor:
        policy, reference = self.scores(batch)
        sums = self._sums(policy, reference, add=stage == "fit")
        # A loss of a user's own need not know of sums.
        loss = self.loss(policy, reference) if sums is None else self.loss(policy, reference, sums)
        with torch.no_grad():
            parts = self.loss.parts(policy, reference, sums)
            self.metric(stage).update(loss, self.loss.rewards(policy, reference), policy, parts)
        return loss.mean()

    def _sums(self, policy: Logps, reference: Logps | None, add: bool) -> Tensor | None:
        """What the loss keeps of all training examples so far, this batch included, over all ranks."""
        if not self.loss.num_sums:
            return None
        self._loss_sums = self._loss_sums.to(self.device)
        if add:
            with torch.no_grad():
                new = self.loss.sums(policy, reference).float()
            self._loss_sums = self._loss_sums + self.trainer.strategy.reduce(new, reduce_op="sum")
        return self._loss_sums

    def _prepare_reference(self) -> None:
        if not self.loss.needs_reference:
            return
        self._build_reference()
        assert self.reference_policy is not None
        strategy = self.trainer.strategy
        run = Run(self.trainer.global_rank, self.trainer.world_size, strategy.barrier, self._score)
        data = getattr(self.trainer, "datamodule", None)
        self.reference_policy.prepare(data if hasattr(data, "unscored") else None, run)

    @torch.no_grad()
    def _score(self, policy: CausalPolicy, batch: PreferenceBatch) -> Logps:
        plugin = self.trainer.precision_plugin
        plugin.convert_module(policy.to(self.device))
        with plugin.forward_context():
            return policy(self.transfer_batch_to_device(batch, self.device, 0))

    def _build_reference(self) -> None:
        if self.reference_policy is not None or not self.loss.needs_reference:
            return
        if self.policy is None:
            super().configure_model()
        assert self.policy is not None
        precision = "32-true" if self._trainer is None else self.trainer.precision
        found = Circumstances(
            self.spec,
            self.policy,
            self._initial_policy,
            self.load,
            self._target_device(),
            f"{self.spec.dtype} {precision}",
            self._expected_fingerprint,
        )
        self.reference_policy = self.reference.build(found).to(self.device)
        self._hide_constants_from_ddp()
        if self._expected_fingerprint is not None:
            self._compare_fingerprint()

    def _initial_policy(self) -> CausalPolicy:
        assert self.policy is not None
        return self.load(self.spec) if self._holds_trained_weights else self.policy

    def _compare_fingerprint(self) -> None:
        assert self.reference_policy is not None
        same = self._expected_fingerprint in (None, self.reference_policy.fingerprint)
        if same or self.reference_policy.in_checkpoints:
            return
        message = (
            f"The reference that this checkpoint was trained against is not the one found now ({self.reference}, "
            f"policy {self.spec.path}): its weights have another fingerprint."
        )
        if not self.reference.is_initial_policy:
            log.warning(message)
            return
        raise UsageError(
            f"{message} It was a copy of weights in memory or of weights that have changed since; a checkpoint does "
            "not hold it. Give it as `reference=FrozenCopy(path=...)`, the folder of the weights that training began "
            "with."
        )

    @torch.no_grad()
    def _check_reference(self, batch: PreferenceBatch) -> None:
        """On the first batch of a fit a copy of the policy must agree with it; anything else is reported."""
        self._reference_checked = True
        if not self.loss.needs_reference:
            return
        assert self.policy is not None
        self.policy.eval()  # dropout, where it is kept, is no difference between the models
        policy, reference = self.scores(batch)
        self.policy.train()
        assert reference is not None
        difference = (policy.total - reference.total).abs().max().item()
        sums = self._sums(policy, reference, add=False)
        loss = (self.loss(policy, reference) if sums is None else self.loss(policy, reference, sums)).mean().item()
        if not self.reference.is_initial_policy or self._holds_trained_weights:
            log.info(f"First batch: loss {loss:.4f}, largest |log pi - log pi_ref| {difference:.4f} nats.")
        elif not difference <= self._rounding():
            raise UsageError(
                f"The reference should be the policy that training begins with, but on the first batch their "
                f"log-probabilities differ by up to {difference:.3g} nats and the loss is {loss:.4f}. Something "
                "changed the policy after the reference was copied from it; if the reference is another model on "
                "purpose, name it by `reference.init_args.path`."
            )

    def _rounding(self) -> float:
        """Largest difference of summed log-probabilities that rounding explains, in nats.

        The same weights through the same kernels differ by nothing; a kernel that adds in another order, by little.
        """
        sixteen_bit = self._compute_dtype() is not None or self.spec.dtype != "float32"
        return 0.1 if sixteen_bit else 1e-2
