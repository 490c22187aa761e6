"""A trained policy as a Hugging Face folder: config, generation config, weights; or its adapter alone."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from dpo_lightning.errors import UsageError
from dpo_lightning.export.base import aliases_of, base_weights, outline
from dpo_lightning.export.weights import Weights, in_memory, is_sharded
from dpo_lightning.export.writing import put_in_place, remove_stale, save_temporarily, write_weights
from dpo_lightning.models.adapters import TRAINED, Step, is_of_adapter, merging_steps, outline_adapter
from dpo_lightning.models.in_memory import PolicyRecipe
from dpo_lightning.models.policy import CausalPolicy
from dpo_lightning.models.spec import PolicySpec
from dpo_lightning.paths import resolve

Adapter = Literal["merge", "save"]
ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What there is of a trained policy.

    Attributes:
        config: The model's config.
        weights: All of its weights, by the names of the model in memory, adapters included.
        path: Where its base model comes from.
        dtype: Dtype that its weights are written in.
        settings: Of its adapter, as peft has them.
        generation: How it is meant to be sampled.
        trust_remote_code: Whether its code came with its weights.
        auto: The class of transformers that loads it.
    """

    config: PretrainedConfig
    weights: Weights
    path: str
    dtype: torch.dtype
    settings: Any = None
    generation: GenerationConfig | None = None
    trust_remote_code: bool = False
    auto: Any = AutoModelForCausalLM

    def outline(self, adapted: bool = False) -> PreTrainedModel:
        """The model without storage."""
        model = outline(self.config, self.dtype, self.trust_remote_code, self.auto)
        if adapted:
            outline_adapter(model, self.settings)
        return model


def save_policy(
    spec: PolicyRecipe,
    policy: CausalPolicy,
    folder: Path,
    *,
    adapter: Adapter = "merge",
    max_shard_size: str = "5GB",
    writes: bool = True,
    changed: Callable[[Trained], Trained] | None = None,
) -> None:
    """Write a policy in memory as a Hugging Face folder, one weight after the other; it stays as it is.

    Where weights are sharded, all ranks have to call this, and one writes.

    Args:
        spec: How the policy was built.
        policy: The policy.
        folder: The folder.
        adapter: Let the weights take up an adapter, in full precision, or write the adapter alone.
        max_shard_size: Most of a file of weights.
        writes: Whether this rank writes.
        changed: What is written instead of what there is, such as a reward model that knows its offset.

    Raises:
        UsageError: If the policy is no Hugging Face model.
    """
    model = policy.model
    if not isinstance(model, PreTrainedModel):
        raise UsageError(f"{spec.origin} is no Hugging Face model; save module.policy.model by torch.save.")
    tensors = model.state_dict()
    if not writes and not is_sharded(tensors):
        return
    weights, config = in_memory(tensors), model.config
    settings = getattr(model, "peft_config", {}).get(TRAINED)
    if isinstance(spec, PolicySpec) and spec.quantize is not None:
        spec = replace(spec, quantize=None)
        config = spec.load_config()
        if adapter == "merge":
            weights = {**weights, **base_weights(spec, config, settings)}
    embedding: Any = model.get_input_embeddings()
    trained = Trained(
        config=config,
        weights=weights,
        path=spec.path,
        dtype=getattr(torch, spec.dtype) if settings is not None else embedding.weight.dtype,
        settings=settings,
        generation=model.generation_config if model.can_generate() else None,
        trust_remote_code=spec.trust_remote_code,
        auto=spec.auto,
    )
    trained = trained if changed is None else changed(trained)
    write(trained, folder, adapter=adapter, max_shard_size=max_shard_size, writes=writes)


def write(trained: Trained, folder: Path, *, adapter: Adapter, max_shard_size: str, writes: bool = True) -> None:
    """Write a whole model, or an adapter alone where there is one and that is asked for."""
    if trained.settings is not None and adapter == "save":
        _write_adapter(trained, folder, writes)
    else:
        _write_whole(trained, folder, max_shard_size, writes)


def _write_whole(trained: Trained, folder: Path, max_shard_size: str, writes: bool) -> None:
    model = trained.outline()
    held = model.state_dict()
    steps = _steps(trained, held)
    places = {name: place for place, name in enumerate(held)}
    aliases = aliases_of(model)
    touched = {name for step in steps if step.merges for name in step.outputs}
    if touched & {*aliases, *aliases.values()}:  # an adapter of one of the two makes them two
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
        aliases = {}
    left_out = {*aliases, *(model._keys_to_ignore_on_save or ())}
    steps = sorted((s for s in steps if s.outputs[0] not in left_out), key=lambda s: places[s.outputs[0]])
    weights = _complete(trained.weights, steps, aliases)
    write_weights(folder, model, steps, weights, max_shard_size, writes)
    if writes:
        if model.is_remote_code():
            custom_object_save(model, folder, config=model.config)  # type: ignore[arg-type]
        model.config.dtype, model.config.architectures = trained.dtype, [type(model).__name__]
        model.config.save_pretrained(folder)
        sampling = (trained.generation or model.generation_config) if model.can_generate() else None
        if sampling is not None:  # not by `save_pretrained`, which refuses some that model makers publish
            sampling.to_json_file(folder / "generation_config.json")


def _steps(trained: Trained, names: Iterable[str]) -> list[Step]:
    if trained.settings is None:
        return _grown(trained, [Step((name,), (name,), dict) for name in names])
    steps = list(merging_steps(trained.outline(adapted=True)))
    if {name for step in steps for name in step.outputs} != {*names}:
        raise UsageError(
            f"An adapter of these settings cannot be taken up by the weights of {trained.path}; write it alone "
            "(adapter: save)."
        )
    return _grown(trained, steps)


def _grown(trained: Trained, steps: list[Step]) -> list[Step]:
    """The same steps, where the config knows more tokens than the weights with rows of zeros for those."""
    model = trained.outline()
    embedding: Any = model.get_input_embeddings()
    names = {name for name, weight in model.named_parameters() if weight is embedding.weight}
    return [
        step._replace(make=functools.partial(_with_rows, step, len(embedding.weight)))
        if names & {*step.outputs}
        else step
        for step in steps
    ]


def _with_rows(step: Step, count: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    made = step.make(weights)
    return {name: F.pad(weight, (0, 0, 0, count - len(weight))) for name, weight in made.items()}


def _complete(weights: Weights, steps: Iterable[Step], aliases: dict[str, str]) -> Weights:
    """Weights with those that are there under an alias alone; refuses what is not whole."""
    under_alias = {name: weights[alias] for alias, name in aliases.items() if alias in weights}
    weights = {**under_alias, **weights}
    missing = [name for step in steps for name in step.inputs if name not in weights]
    if missing:
        raise UsageError(
            f"{len(missing)} weights of the model are missing, such as {missing[0]}: are these the weights of another "
            "model than `policy.path` names?"
        )
    return weights


def _write_adapter(trained: Trained, folder: Path, writes: bool) -> None:
    model = trained.outline(adapted=True)
    names = [name for name in model.state_dict() if is_of_adapter(name, TRAINED)]
    weights = _complete(trained.weights, [Step((), (name,), dict) for name in names], {})
    tensors = {name: weights[name].read() for name in names}
    if not writes:
        return
    found = model.get_adapter_state_dict(TRAINED, state_dict=tensors)
    content = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in found.items()}
    save_temporarily(content, folder / ADAPTER)
    remove_stale(folder)
    settings = copy.deepcopy(model.peft_config[TRAINED])
    if hasattr(settings, "init_lora_weights"):
        settings.init_lora_weights = trained.settings.init_lora_weights
    settings.base_model_name_or_path, settings.inference_mode = resolve(trained.path), True
    settings.save_pretrained(folder)
    put_in_place(folder / ADAPTER)
