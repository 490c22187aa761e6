"""Where reference log-probabilities come from."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from dpo_lightning.batch import Logps, PreferenceBatch
from dpo_lightning.models.policy import CausalPolicy
from dpo_lightning.models.spec import PolicySpec, at

# Enough elements of every tensor to notice any training, few enough that a large model takes seconds.
FINGERPRINT_ELEMENTS = 65_536


class Reference(ABC):
    """A recipe for the reference of a run."""

    @property
    @abstractmethod
    def is_initial_policy(self) -> bool:
        """Whether the reference is the policy as training found it, so that all margins start at 0."""

    def check(self, spec: PolicySpec) -> None:  # noqa: B027  (nothing to check is a fine answer)
        """Raise a UsageError where :meth:`build` is bound to fail; cheap."""

    @abstractmethod
    def build(self, policy: CausalPolicy, spec: PolicySpec, load: Callable[[PolicySpec], CausalPolicy]) -> FrozenPolicy:
        """The frozen model.

        Args:
            policy: The policy as it stands in memory.
            spec: How that policy was built.
            load: Builds a model from a spec, on the right device.
        """


@dataclass(frozen=True, kw_only=True)
class FrozenCopy(Reference):
    """A frozen copy of the policy as it stands when training begins, or of another model.

    Args:
        path: Folder or hub name of another model; by default the policy itself is copied.
        revision: Branch, tag or commit of that model on the hub.
    """

    path: str | None = None
    revision: str | None = None

    @property
    def is_initial_policy(self) -> bool:
        """True without a path."""
        return self.path is None

    def check(self, spec: PolicySpec) -> None:
        """A named model must exist."""
        if self.path is not None:
            at(spec, self.path, self.revision).load_config()

    def build(self, policy: CausalPolicy, spec: PolicySpec, load: Callable[[PolicySpec], CausalPolicy]) -> FrozenPolicy:
        """A deep copy, or the model at the path."""
        return FrozenPolicy(copy.deepcopy(policy) if self.path is None else load(at(spec, self.path, self.revision)))


class FrozenPolicy(nn.Module):
    """A policy that is never trained: no gradients, no training mode.

    Args:
        policy: The policy to freeze; it is owned from here on.

    Attributes:
        fingerprint: Digest of the weights as they were frozen; taken then, since a strategy may cast them later.
    """

    def __init__(self, policy: CausalPolicy) -> None:
        super().__init__()
        self.policy = policy.requires_grad_(False)
        self.train(False)
        self.fingerprint = fingerprint(self)

    def forward(self, batch: PreferenceBatch) -> Logps:
        """Log-probabilities without gradients."""
        with torch.no_grad():
            return self.policy(batch)

    def train(self, mode: bool = True) -> FrozenPolicy:
        """Stays in evaluation mode, whatever is asked."""
        return super().train(False)


def fingerprint(model: nn.Module) -> str:
    """Digest of a model's weights: names, shapes and up to 65,536 evenly spaced elements of every tensor."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, -(-flat.numel() // FINGERPRINT_ELEMENTS))].float().cpu().contiguous()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
