"""What a policy was trained from: its model without storage, and weights below adapters as they lie in files."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from dpo_lightning.export.weights import Stored, Weights, in_memory, in_safetensors
from dpo_lightning.models.adapters import below_adapters, outline_adapter
from dpo_lightning.models.spec import PolicySpec
from dpo_lightning.models.weight_files import safetensors_files

log = logging.getLogger(__name__)


def outline(
    config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False, auto: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """A model of a config without storage."""
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(
            copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code
        )
    return model


def aliases_of(model: PreTrainedModel) -> dict[str, str]:
    """Names of weights that are another's too, and that other's, as transformers leaves them out of files."""
    named = dict(model.named_parameters(remove_duplicate=False))
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {alias: name for alias, name in tied.items() if named[alias] is named[name]}


def base_weights(spec: PolicySpec, config: PretrainedConfig, settings: Any) -> Weights:
    """Weights below an adapter, by their names in the model that has it, as they lie at the path."""
    dtype = getattr(torch, spec.dtype)
    plain = outline(config, dtype, spec.trust_remote_code, spec.auto)
    stored = dict(_stored(spec, plain) or _loaded(spec))
    stored |= {alias: stored[name] for alias, name in aliases_of(plain).items() if name in stored}
    outline_adapter(plain, settings)
    return {name: _cast(stored[below], dtype) for name, below in below_adapters(plain).items()}


def _cast(weight: Stored, dtype: torch.dtype) -> Stored:
    if not weight.dtype.is_floating_point:
        return weight
    return weight._replace(dtype=dtype, read=lambda: weight.read().to(dtype))


def _stored(spec: PolicySpec, model: PreTrainedModel) -> Weights | None:
    """Weights by their names in memory as they lie in files, where those differ by no more than a prefix."""
    if any(isinstance(part, WeightConverter) for part in get_model_conversion_mapping(model, add_legacy=False)):
        return None
    files, aliases = in_safetensors(safetensors_files(spec.file)), aliases_of(model)
    prefix, found = f"{model.base_model_prefix}.", {}
    for name, weight in model.state_dict().items():
        stored = files.get(name) or files.get(name.removeprefix(prefix))
        if stored is not None and stored.shape == tuple(weight.shape):
            found[name] = stored
        elif name not in aliases:
            return None
    return found


def _loaded(spec: PolicySpec) -> Weights:
    log.info(f"The weights of {spec.path} lie in files otherwise than in memory, so all of them are loaded.")
    return in_memory(replace(spec, quantize=None).load_model().state_dict())
