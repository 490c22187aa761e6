"""Preference optimisation: a policy, a frozen reference and a loss of their log-probabilities."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from dpo_lightning.batch import Logps, PreferenceBatch
from dpo_lightning.errors import UsageError
from dpo_lightning.losses import PreferenceLoss
from dpo_lightning.metrics import PreferenceMetrics
from dpo_lightning.models.spec import PolicySpec
from dpo_lightning.modules.base import PolicyModule
from dpo_lightning.recipes import from_plain
from dpo_lightning.references import FrozenCopy, FrozenPolicy, Reference

log = logging.getLogger(__name__)

FINGERPRINT = "reference_fingerprint"
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

    reference_policy: FrozenPolicy | None
    progress_names = ("loss", "rewards/accuracies", "rewards/margins")

    def __init__(
        self,
        policy: PolicySpec,
        loss: PreferenceLoss,
        reference: Reference | None = None,
        **optimization: Any,
    ) -> None:
        super().__init__(policy, **optimization)
        self.loss = from_plain(loss, PreferenceLoss)  # type: ignore[type-abstract]
        self.reference = from_plain(reference or FrozenCopy(), Reference)  # type: ignore[type-abstract]
        self.reference_policy = None
        self._reference_checked = self._holds_trained_weights = False
        self._expected_fingerprint: str | None = None
        self._register_state_dict_hook(_leave_reference_out)
        self.register_load_state_dict_post_hook(_do_not_miss_reference)
        self.record(loss=self.loss, reference=self.reference)

    def make_metric(self) -> Metric:
        """Rewards, accuracies, margins and log-probabilities."""
        return PreferenceMetrics()

    def setup(self, stage: str) -> None:
        """Find out that a reference does not exist before any weight is loaded."""
        if self.loss.needs_reference:
            self.reference.check(self.spec)

    def configure_model(self) -> None:
        """Build the policy, and under a Trainer the reference: a copy has to be taken before training changes it."""
        super().configure_model()
        if self._trainer is not None:
            self._build_reference()

    def on_train_start(self) -> None:
        """Every fit checks the reference anew."""
        super().on_train_start()
        self._reference_checked = False

    def on_train_end(self) -> None:
        """Another fit of this module goes on against the same reference, as one from a checkpoint does."""
        self._holds_trained_weights = True

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
        policy = self(batch)
        return ScoredResponses(batch.row, self.loss.rewards(policy, self.reference_logps(batch)), batch.length)

    def reference_logps(self, batch: PreferenceBatch) -> Logps | None:
        """Log-probabilities of the reference, without gradients; ``None`` where the loss needs none."""
        if not self.loss.needs_reference:
            return None
        self._build_reference()
        return self.reference_policy(batch)  # type: ignore[misc]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the reference's fingerprint instead of its weights."""
        if self.reference_policy is not None:
            checkpoint[FINGERPRINT] = self.reference_policy.fingerprint
        elif self._expected_fingerprint is not None:
            checkpoint[FINGERPRINT] = self._expected_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """From here on the policy in memory is a trained one, and no longer its own reference."""
        self._holds_trained_weights = True
        self._expected_fingerprint = checkpoint.get(FINGERPRINT)
        if self.reference_policy is not None:
            self._compare_fingerprint()

    def _step(self, stage: str, batch: PreferenceBatch) -> Tensor:
        policy = self(batch)
        reference = self.reference_logps(batch)
        loss = self.loss(policy, reference)
        with torch.no_grad():
            self.metric(stage).update(loss, self.loss.rewards(policy, reference), policy)
        return loss.mean()

    def _build_reference(self) -> None:
        if self.reference_policy is not None or not self.loss.needs_reference:
            return
        if self.policy is None:
            super().configure_model()
        assert self.policy is not None
        source = self.policy
        if self._holds_trained_weights and self.reference.is_initial_policy:
            source = self.load(self.spec)
        self.reference_policy = self.reference.build(source, self.spec, self.load).to(self.device)
        self._hide_constants_from_ddp()
        if self._expected_fingerprint is not None:
            self._compare_fingerprint()

    def _compare_fingerprint(self) -> None:
        assert self.reference_policy is not None
        if self._expected_fingerprint in (None, self.reference_policy.fingerprint):
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
        policy, reference = self.policy(batch), self.reference_logps(batch)
        self.policy.train()
        assert reference is not None
        difference = (policy.total - reference.total).abs().max().item()
        loss = self.loss(policy, reference).mean().item()
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


def _leave_reference_out(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix + REFERENCE)]:
        del state[name]


def _do_not_miss_reference(module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not name.startswith(REFERENCE)]
