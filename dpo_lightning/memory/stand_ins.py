"""Models without weights: the modules that a recipe would build, of fake tensors."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from dpo_lightning.batch import Logps, PreferenceBatch
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.models.policy import CausalPolicy
from dpo_lightning.models.spec import PolicySpec
from dpo_lightning.paths import resolve
from dpo_lightning.references.base import ReferenceModel

# Bytes that bitsandbytes keeps for a weight: itself, and a scale for 64 of them or for a row.
QUANTISED = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}


def stand_in(spec: PolicySpec, num_layers: int | None = None) -> CausalPolicy:
    """What ``spec.build`` would build, in training mode; to be called where tensors are fake.

    Args:
        spec: The recipe.
        num_layers: The first so many layers alone; all of them unless given.
    """
    config = first_layers(spec.load_config(), num_layers)
    model = spec.auto.from_config(config, dtype=getattr(torch, spec.dtype), trust_remote_code=spec.trust_remote_code)
    if spec.lora is not None:
        spec = dataclasses.replace(spec, lora=_own_settings(spec.lora))
    policy = spec.assemble(model, "rows" if spec.layout == "rows" else "stream")
    if spec.quantize is not None:
        _quantise(policy.model, QUANTISED[spec.quantize])
    return policy


def first_layers(config: PretrainedConfig, num_layers: int | None) -> PretrainedConfig:
    """A config of the first layers of another, with what it lists layer by layer."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if num_layers is None:
        return config
    for name, values in layer_lists(text).items():
        setattr(text, name, values[:num_layers])
    text.num_hidden_layers = num_layers
    return config


def layer_lists(config: PretrainedConfig) -> dict[str, list[Any]]:
    """What a config lists with one entry a layer."""
    count = config.num_hidden_layers
    return {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == count}


def layers_of(policy: CausalPolicy) -> nn.ModuleList:
    """The layers of a model; none where they do not stand in a list."""
    count = policy.model.config.get_text_config().num_hidden_layers
    lists = (part for part in policy.modules() if isinstance(part, nn.ModuleList) and len(part) == count)
    return next(lists, nn.ModuleList())


class KnownScores(ReferenceModel):
    """In place of a reference that looks its scores up."""

    fingerprint = ""

    def forward(self, batch: PreferenceBatch) -> Logps:
        """Scores, of which only the shape counts."""
        return Logps(batch.length.float(), batch.length)


def _own_settings(lora: LoRA) -> LoRA:
    """The settings of an adapter that is to be loaded, in place of its path."""
    if lora.path is None:
        return lora
    import peft

    config = peft.PeftConfig.from_pretrained(resolve(lora.path))
    options = {name: getattr(config, name) for name in ("use_dora", "modules_to_save")}
    return LoRA(rank=config.r, target_modules=config.target_modules, options=options)


def _quantise(model: PreTrainedModel, bytes_a_weight: float) -> None:
    """Let linear layers but the head hold as many bytes as bitsandbytes keeps of them, unpacked when they are used."""
    from peft.tuners.lora import LoraLayer

    head = model.get_output_embeddings()
    trained = {id(part) for layer in model.modules() if isinstance(layer, LoraLayer) for part in _factors(layer)}
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer is not head and id(layer) not in trained:
            shape, packed = layer.weight.shape, int(layer.weight.numel() * bytes_a_weight)
            layer.weight = nn.Parameter(torch.empty(packed, dtype=torch.uint8), requires_grad=False)
            layer.forward = functools.partial(_unpacked, layer, shape)  # type: ignore[method-assign]


def _factors(layer: Any) -> list[nn.Module]:
    return [*layer.lora_A.values(), *layer.lora_B.values()]


def _unpacked(layer: nn.Linear, shape: torch.Size, states: Tensor) -> Tensor:
    if torch.is_autocast_enabled(states.device.type):
        states = states.to(torch.get_autocast_dtype(states.device.type))
    out = _Unpacked.apply(states, shape)
    return out if layer.bias is None else out + layer.bias.to(out.dtype)


class _Unpacked(torch.autograd.Function):
    """A product with a weight that exists while it is used."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, shape: torch.Size) -> Tensor:
        ctx.shape = shape
        return F.linear(states, states.new_empty(shape))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ grad.new_empty(ctx.shape), None
