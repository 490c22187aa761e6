"""A frozen copy: the plain reference."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from dpo_lightning.batch import Logps, PreferenceBatch
from dpo_lightning.errors import UsageError
from dpo_lightning.functional.head import Outputs
from dpo_lightning.models.policy import CausalPolicy, score
from dpo_lightning.models.shard import is_sharded
from dpo_lightning.models.spec import PolicySpec, at
from dpo_lightning.references.base import Circumstances, FrozenPolicy, Reference, ReferenceModel


@dataclass(frozen=True, kw_only=True)
class FrozenCopy(Reference):
    """A frozen copy of the policy as it stands when training begins, or of another model.

    Args:
        path: Folder or hub name of another model; by default the policy itself is copied.
        revision: Branch, tag or commit of that model on the hub.
        dtype: Dtype of the copy, if not that of the policy; bfloat16 takes half the memory of float32.
        quantize: Keep the copy in 8 or 4 bits, by bitsandbytes; it is then loaded from where the policy came from.
        offload: Keep the copy in the memory of the CPU and bring its layers to the device one by one.
    """

    path: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    quantize: Literal["8bit", "4bit"] | None = None
    offload: bool = False

    @property
    def is_initial_policy(self) -> bool:
        """True for the policy itself in its own precision."""
        return self.path is None and self.dtype is None and self.quantize is None

    def check(self, spec: PolicySpec) -> None:
        """A named model must exist."""
        if self.offload and spec.compile:
            raise UsageError(
                "`reference.offload` brings weights to layers as they run, which compiled layers cannot have; leave "
                "out one of it and `policy.compile`."
            )
        if self.path is not None or self.quantize is not None:
            self._spec(spec).load_config()

    def build(self, found: Circumstances) -> ReferenceModel:
        """A deep copy, or the model at the path."""
        if self.path is None and self.quantize is None:
            policy = found.copy()
            if self.dtype is not None:
                policy.to(getattr(torch, self.dtype))
        else:
            policy = found.load(self._spec(found.spec))
        if self.offload and is_sharded(policy):
            raise UsageError("`reference.offload`: weights that are divided among devices stay there; leave it out.")
        return OffloadedPolicy(policy, found.device) if self.offload else FrozenPolicy(policy, found.autocast)

    def _spec(self, spec: PolicySpec) -> PolicySpec:
        spec = spec if self.path is None else at(spec, self.path, self.revision)
        spec = spec if self.dtype is None else dataclasses.replace(spec, dtype=self.dtype)
        return spec if self.quantize is None else dataclasses.replace(spec, quantize=self.quantize)


class OffloadedPolicy(ReferenceModel):
    """A frozen policy whose weights lie in the memory of the CPU and visit the device one layer at a time.

    Args:
        policy: The policy to freeze; it is owned from here on.
        device: Where it runs.
    """

    def __init__(self, policy: CausalPolicy, device: torch.device) -> None:
        super().__init__()
        frozen = FrozenPolicy(policy.cpu())
        self.fingerprint = frozen.fingerprint
        self._frozen, self._device = [frozen], device  # in a list, or a strategy would move it to the device
        for module in frozen.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
            if next(module.parameters(recurse=False), None) is not None:
                _visit(module, device)

    @torch.no_grad()
    def forward(self, batch: PreferenceBatch) -> Logps:
        """Log-probabilities without gradients."""
        return score(self.outputs(batch), batch)

    @torch.no_grad()
    def outputs(self, batch: PreferenceBatch) -> Outputs:
        """Hidden states and output head without gradients."""
        outputs = self._frozen[0].outputs(batch)
        bias = None if outputs.bias is None else outputs.bias.to(self._device)
        return outputs._replace(weight=outputs.weight.to(self._device), bias=bias)


def _visit(module: nn.Module, device: torch.device) -> None:
    """Have a layer's own weights on the device while it runs, and only then."""
    home = {name: parameter.data for name, parameter in module.named_parameters(recurse=False)}
    if device.type == "cuda":
        home = {name: weight.pin_memory() for name, weight in home.items()}

    def arrive(module: nn.Module, args: Any) -> None:
        for name, weight in home.items():
            getattr(module, name).data = weight.to(device, non_blocking=True)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        for name, weight in home.items():
            getattr(module, name).data = weight

    module.register_forward_pre_hook(arrive)
    module.register_forward_hook(leave, always_call=True)
