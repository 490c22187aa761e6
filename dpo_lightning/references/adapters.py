"""The weights under the policy's adapters as its reference: no second model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dpo_lightning.batch import Logps, PreferenceBatch
from dpo_lightning.errors import UsageError
from dpo_lightning.functional.head import Outputs
from dpo_lightning.models.adapters import REFERENCE, TRAINED, adapter_weights, as_reference, copy_adapter
from dpo_lightning.models.fingerprint import digest_of
from dpo_lightning.models.policy import CausalPolicy
from dpo_lightning.models.spec import PolicySpec
from dpo_lightning.references.base import Circumstances, Reference, ReferenceModel


@dataclass(frozen=True, kw_only=True)
class AdaptersOff(Reference):
    """The policy without its adapters, which costs no memory; needs `policy.lora`.

    Where the policy goes on with an adapter that was trained before (`policy.lora.path`), the reference is the same
    weights with a frozen copy of that adapter.
    """

    @property
    def is_initial_policy(self) -> bool:
        """True: a new adapter changes nothing until it is trained."""
        return True

    def check(self, spec: PolicySpec) -> None:
        """There must be adapters."""
        if spec.lora is None:
            raise UsageError(
                "AdaptersOff needs a policy with adapters, `policy.lora`; with all weights use FrozenCopy."
            )

    def build(self, found: Circumstances) -> AdapterReference:
        """The policy itself, seen without what is trained."""
        self.check(found.spec)
        if found.spec.lora is not None and found.spec.lora.path is not None:
            add_reference_adapter(found)
        return AdapterReference(found.policy)


class AdapterReference(ReferenceModel):
    """The weights of a policy, scored with a frozen adapter or with none.

    Args:
        policy: The policy; it is not part of this module, whose weights are its own.
    """

    def __init__(self, policy: CausalPolicy) -> None:
        super().__init__()
        self._policy = [policy]  # in a list, or its weights would count as the reference's
        # Of the weights below the adapters, and of the frozen adapter where there is one.
        frozen = ((name, weight) for name, weight in policy.named_parameters() if not weight.requires_grad)
        self.fingerprint = digest_of(frozen)

    @torch.no_grad()
    def forward(self, batch: PreferenceBatch) -> Logps:
        """Log-probabilities without gradients."""
        with self._as_reference() as policy:
            return policy(batch)

    @torch.no_grad()
    def outputs(self, batch: PreferenceBatch) -> Outputs:
        """Hidden states and output head without gradients."""
        with self._as_reference() as policy:
            return policy.outputs(batch)

    @contextmanager
    def _as_reference(self) -> Iterator[CausalPolicy]:
        (policy,) = self._policy
        with as_reference(policy.model):
            yield policy


def add_reference_adapter(found: Circumstances) -> None:
    """Give the policy a frozen copy of the adapter that training began with, unless it has one."""
    model = found.policy.model
    if REFERENCE in model.peft_config:
        return
    copy_adapter(model)
    initial = found.initial()
    if initial is not found.policy:  # the adapter in memory is a trained one
        first = dict(adapter_weights(initial.model, TRAINED))
        with torch.no_grad():
            for name, weight in adapter_weights(model, REFERENCE):
                weight.copy_(first[name])
