"""A policy with a reference: built before training changes the policy, and known again in checkpoints."""

from __future__ import annotations

import logging
from typing import Any

import torch

from dpo_lightning.batch import Logps, PreferenceBatch
from dpo_lightning.errors import UsageError
from dpo_lightning.models.in_memory import AnyPolicy
from dpo_lightning.models.policy import CausalPolicy
from dpo_lightning.modules.base import PolicyModule
from dpo_lightning.modules.precision import autocast_dtype
from dpo_lightning.ranks import data_place
from dpo_lightning.recipes import from_plain
from dpo_lightning.references.base import Circumstances, Reference, ReferenceModel, Run
from dpo_lightning.references.frozen import FrozenCopy

log = logging.getLogger(__name__)

FINGERPRINT = "reference_fingerprint"
REFERENCE = "reference_policy."


class ReferencedModule(PolicyModule):
    """A policy, and where a subclass needs it a reference.

    Args:
        policy: The model and how it is loaded; in Python also a model in memory, which is then trained.
        reference: Where reference log-probabilities come from; a FrozenCopy of the policy unless named.
        **optimization: Learning rate and schedule, as in PolicyModule.
    """

    reference_policy: ReferenceModel | None

    def __init__(self, policy: AnyPolicy, reference: Reference | None = None, **optimization: Any) -> None:
        super().__init__(policy, **optimization)
        self.reference = from_plain(reference or FrozenCopy(), Reference)  # type: ignore[type-abstract]
        self.reference_policy = None
        self._holds_trained_weights = False
        self._expected_fingerprint: str | None = None
        self.record(reference=self.reference)

    @property
    def needs_reference(self) -> bool:
        """Whether a reference is built at all."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Find out what cannot be done before any weight is loaded."""
        super().setup(stage)
        if self.needs_reference:
            self.reference.check(self.spec)

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

    def reference_logps(self, batch: PreferenceBatch) -> Logps | None:
        """Log-probabilities of the reference, without gradients; ``None`` where the loss needs none."""
        if not self.needs_reference:
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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """From here on the policy in memory is a trained one, and no longer its own reference."""
        super().on_load_checkpoint(checkpoint)
        if any(name.startswith(REFERENCE) for name in checkpoint.get("state_dict", {})):
            self._build_reference()  # its weights are to be loaded too
        self._expected_fingerprint = checkpoint.get(FINGERPRINT)
        if not self.spec.can_be_rebuilt:
            self._build_reference()  # now or never: in a moment the initial weights are gone
        self._holds_trained_weights = True
        if self.reference_policy is not None:
            self._compare_fingerprint()

    def _prepare_reference(self) -> None:
        if not self.needs_reference:
            return
        self._build_reference()
        assert self.reference_policy is not None
        strategy = self.trainer.strategy
        run = Run(*data_place(self.trainer), strategy.barrier, self._score)
        data = getattr(self.trainer, "datamodule", None)
        self.reference_policy.prepare(data if hasattr(data, "unscored") else None, run)

    @torch.no_grad()
    def _score(self, policy: CausalPolicy, batch: PreferenceBatch) -> Logps:
        plugin = self.trainer.precision_plugin
        plugin.convert_module(policy.to(self.device))
        with plugin.forward_context():
            return policy(self.transfer_batch_to_device(batch, self.device, 0))

    def _build_reference(self) -> None:
        if self.reference_policy is not None or not self.needs_reference:
            return
        if self.policy is None:
            super().configure_model()
        assert self.policy is not None
        found = Circumstances(
            self.spec,
            self.policy,
            self._initial_policy,
            self.load,
            self._target_device(),
            f"{self.spec.dtype} {self.precision}",
            self._expected_fingerprint,
            autocast_dtype(self.precision),
        )
        self.reference_policy = self.reference.build(found).to(self.device)
        self._hide_constants_from_ddp()
        if self._expected_fingerprint is not None:
            self._compare_fingerprint()

    def _initial_policy(self) -> CausalPolicy:
        assert self.policy is not None
        if not self._holds_trained_weights:
            return self.policy
        if not self.spec.can_be_rebuilt:
            raise UsageError(
                f"The weights that training of {self.spec.origin} began with are gone, and {self.reference} asks for "
                "them again. Give them as a folder, by the reference's `path`."
            )
        return self.load(self.spec)

    def _compare_fingerprint(self) -> None:
        assert self.reference_policy is not None
        same = self._expected_fingerprint in (None, self.reference_policy.fingerprint)
        if same or self.reference_policy.in_checkpoints:
            return
        message = (
            f"The reference that this checkpoint was trained against is not the one found now ({self.reference}, "
            f"policy {self.spec.origin}): its weights have another fingerprint."
        )
        if not self.reference.is_initial_policy:
            log.warning(message)
            return
        raise UsageError(
            f"{message} It was a copy of weights in memory or of weights that have changed since; a checkpoint does "
            "not hold it. Give it as `reference=FrozenCopy(path=...)`, the folder of the weights that training began "
            "with; or hand over the policy in memory with the weights that it had then."
        )
