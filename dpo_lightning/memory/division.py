"""What a device holds where training is divided among several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from lightning.pytorch import Trainer
from torch import nn

from dpo_lightning.memory.meter import Bytes, Place
from dpo_lightning.memory.stand_ins import layers_of, stand_in
from dpo_lightning.models.policy import CausalPolicy
from dpo_lightning.models.spec import PolicySpec

HELD = ("weights", "gradients", "optimizer", "reference")
REDUCED = 4  # bytes of a gradient that is summed over devices


@dataclass(frozen=True, kw_only=True)
class Division:
    """How training is divided among devices.

    Args:
        ranks: Devices, each with batches of its own.
        shards: Devices among which weights, their gradients, the optimizer's state and the reference are divided; 1
            where each holds all of them.
    """

    ranks: int = 1
    shards: int = 1

    @classmethod
    def of(cls, trainer: Trainer) -> Self:
        """That of a Trainer; a strategy that divides weights says so by its ``shards``."""
        return cls(ranks=trainer.world_size, shards=getattr(trainer.strategy, "shards", 1))


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """What a device holds whole for a while: weights while they are used, gradients until they are summed.

    Attributes:
        forward: Bytes in a forward pass: what lies around the layers, the layer that runs, and the next.
        backward: Bytes in a backward pass: the same, and the gradients of what lies around and of a layer, once as
            they come and of the layer once more as they are summed.
    """

    forward: int
    backward: int

    @classmethod
    def of(cls, spec: PolicySpec, period: int, itemsize: int, *, has_copy: bool) -> Self:
        """Of models that repeat after ``period`` layers.

        Args:
            spec: The policy's recipe.
            period: Layers after which kinds of layers repeat.
            itemsize: Bytes of a weight that is gathered.
            has_copy: Whether the reference is a model too; what lies around its layers stays gathered.
        """
        with torch.device("meta"):
            policy = stand_in(spec, period)
        around, layer = _around_and_largest(policy, trained=False)
        trained_around, trained_layer = _around_and_largest(policy, trained=True)
        forward = itemsize * (around * (2 if has_copy else 1) + 2 * layer)
        return cls(
            forward=forward,
            backward=forward + itemsize * (trained_around + trained_layer) + REDUCED * trained_layer,
        )


def divided(peaks: dict[Place, Bytes], gathered: Gathered, shards: int, wider: dict[str, float]) -> dict[Place, Bytes]:
    """What one of several devices holds, of what a device alone would.

    Args:
        peaks: Bytes by kind at places of a step, rehearsed with weights in the dtype of products.
        gathered: What is whole for a while.
        shards: Devices among which the rest is divided.
        wider: How many times as many bytes what is held has in its own dtype, by kind; once unless said.
    """
    return {place: _share(place[0], peak, gathered, shards, wider) for place, peak in peaks.items()}


def _share(phase: str, peak: Bytes, gathered: Gathered, shards: int, wider: dict[str, float]) -> Bytes:
    # What an optimizer hands from one operation to the next is as large as what it holds.
    shared = HELD if phase != "optimizer" else tuple(peak)
    share = {kind: round(size * wider.get(kind, 1) / shards) if kind in shared else size for kind, size in peak.items()}
    whole = {"forward": gathered.forward, "backward": gathered.backward}.get(phase, 0)
    return share | {"gathered": whole}


def _around_and_largest(policy: CausalPolicy, *, trained: bool) -> tuple[int, int]:
    """Weights around the layers and of the largest layer; of all, or of those that are trained."""

    def count(module: nn.Module) -> int:
        return sum(weight.numel() for weight in module.parameters() if weight.requires_grad or not trained)

    layers = [count(layer) for layer in layers_of(policy)]
    return count(policy) - sum(layers), max(layers, default=0)
