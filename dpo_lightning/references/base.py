"""What a reference is: a recipe that YAML injects, and the model that it builds."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn
from transformers import Conv1D, PreTrainedModel

from dpo_lightning.batch import Logps, PreferenceBatch
from dpo_lightning.functional.head import Outputs
from dpo_lightning.models.fingerprint import fingerprint
from dpo_lightning.models.in_memory import PolicyRecipe
from dpo_lightning.models.policy import CausalPolicy, LogitsPolicy
from dpo_lightning.models.shard import compile_layers, is_sharded


class Loader(Protocol):
    """Builds models."""

    def __call__(self, spec: PolicyRecipe, weights: CausalPolicy | None = None) -> CausalPolicy:
        """A model by its recipe, with the weights of another of the same recipe, if one is given."""


class Circumstances(NamedTuple):
    """What a reference finds when it is built.

    Attributes:
        spec: How the policy was built.
        policy: The policy in memory.
        initial: The policy as training began with it: the one in memory, or built anew where that is trained.
        load: Builds a model from a spec, on the right device; with the weights of another, if one is given.
        device: Where the policy will run.
        numerics: Whatever besides weights and tokens changes scores: dtypes, precision.
        expected: Fingerprint of the reference that a checkpoint was trained against, if there is one.
        autocast: Dtype of matrix products where they run in another than that of the weights.
    """

    spec: PolicyRecipe
    policy: CausalPolicy
    initial: Callable[[], CausalPolicy]
    load: Loader
    device: torch.device
    numerics: str
    expected: str | None
    autocast: torch.dtype | None = None

    def copy(self) -> CausalPolicy:
        """A copy of the policy as training began with it."""
        initial = self.initial()
        if initial is not self.policy:
            return initial  # nobody else's
        if is_sharded(initial):
            return self.load(self.spec, initial)
        policy = copy.deepcopy(initial)
        if self.spec.compile:  # a copy is not compiled
            compile_layers(policy.model)
        return policy


class Reference(ABC):
    """A recipe for the reference of a run.

    A subclass says by ``sums_alone`` whether it knows the sums over responses alone, not what a token or a word of
    the vocabulary has.
    """

    sums_alone: ClassVar[bool] = False

    @property
    @abstractmethod
    def is_initial_policy(self) -> bool:
        """Whether the reference is the policy as training found it, so that all margins start at 0."""

    def check(self, spec: PolicyRecipe) -> None:  # noqa: B027  (nothing to check is a fine answer)
        """Raise a UsageError where :meth:`build` is bound to fail; cheap."""

    @abstractmethod
    def build(self, found: Circumstances) -> ReferenceModel:
        """The model that scores for the reference."""


class ReferenceModel(nn.Module):
    """What scores for the reference.

    Attributes:
        fingerprint: Tells it from other references.
        in_checkpoints: Whether its weights change in training, so that a checkpoint has to hold them.
    """

    fingerprint: str
    in_checkpoints: ClassVar[bool] = False

    def forward(self, batch: PreferenceBatch) -> Logps:
        """Log-probabilities without gradients."""
        raise NotImplementedError

    def outputs(self, batch: PreferenceBatch) -> Outputs:
        """Hidden states and output head without gradients."""
        raise NotImplementedError

    def prepare(self, examples: Scorable | None, run: Run) -> None:
        """Do what has to be done before a stage, with the examples that it will use."""

    def after_step(self, policy: CausalPolicy, step: int) -> None:
        """Follow the policy, where the reference does, after an optimizer step, counted from 1."""


class Scorable(Protocol):
    """Data whose examples can be scored before training: a PreferenceDataModule."""

    def digests(self) -> np.ndarray:
        """One number an example that changes with its tokens and with which of them are scored, shape ``(N,)``."""

    def unscored(self, known: np.ndarray, rank: int, world_size: int) -> Iterator[PreferenceBatch]:
        """This rank's share of the examples whose digests are not known, in batches on the CPU."""


class Run(NamedTuple):
    """As much of a run as scoring needs.

    Attributes:
        rank: This process.
        world_size: Number of processes.
        barrier: Waits for the others.
        score: What a policy says of a batch, on the device and in the precision of the run.
    """

    rank: int
    world_size: int
    barrier: Callable[[], None]
    score: Callable[[CausalPolicy, PreferenceBatch], Logps]


class FrozenPolicy(ReferenceModel):
    """A policy that is never trained: no gradients, no training mode.

    Args:
        policy: The policy to freeze; it is owned from here on. Its fingerprint is taken now, since a strategy may
            cast the weights later.
        autocast: Dtype of its matrix products. Weights of linear layers are kept in it instead of being cast at every
            use, which changes no result and takes half the memory; of a policy that is divided among devices all
            weights are, since it gathers them in that dtype.
    """

    def __init__(self, policy: CausalPolicy, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.policy = policy.requires_grad_(False)
        self.train(False)
        self.fingerprint = fingerprint(self)
        self._autocast = None if is_sharded(policy) else autocast
        if is_sharded(policy):
            policy.set_reshard_after_forward(True)  # type: ignore[operator]  # nothing runs backward
        if autocast is not None and is_sharded(policy):
            policy.to(autocast)
        elif autocast is not None and not isinstance(policy, LogitsPolicy):  # who may read weights in ways of its own
            narrow_linear_layers(policy.model, autocast)

    @torch.no_grad()
    def forward(self, batch: PreferenceBatch) -> Logps:
        """Log-probabilities without gradients."""
        with self._products(batch):
            return self.policy(batch)

    @torch.no_grad()
    def outputs(self, batch: PreferenceBatch) -> Outputs:
        """Hidden states and output head without gradients."""
        with self._products(batch):
            return self.policy.outputs(batch)

    def _products(self, batch: PreferenceBatch) -> AbstractContextManager[object]:
        if self._autocast is None:
            return nullcontext()  # whatever surrounds it
        return torch.autocast(batch.input_ids.device.type, self._autocast)

    def train(self, mode: bool = True) -> FrozenPolicy:
        """Stays in evaluation mode, whatever is asked."""
        return super().train(False)


def narrow_linear_layers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the weights that matrix products alone read; an embedding that is also the output head stays as it is."""
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        # Not subclasses, whose weights may be packed.
        if type(module) in (nn.Linear, Conv1D) and id(module.weight) not in shared:
            module.to(dtype)
