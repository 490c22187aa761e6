"""A checkpoint becomes a Hugging Face folder, on one CPU, weight by weight."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from dpo_lightning.errors import UsageError
from dpo_lightning.export.base import base_weights, outline
from dpo_lightning.export.checkpoint import Checkpoint, open_checkpoint
from dpo_lightning.export.classifier import as_classifier
from dpo_lightning.export.folder import with_chat_template, write_companions
from dpo_lightning.export.model import Adapter, Trained, write
from dpo_lightning.export.weights import Weights, in_memory
from dpo_lightning.models.adapters import below_adapters, changes_base, outline_adapter
from dpo_lightning.models.fingerprint import digest_of
from dpo_lightning.models.reward import RewardSpec
from dpo_lightning.models.spec import PolicySpec
from dpo_lightning.modules.base import BASE_FINGERPRINT
from dpo_lightning.recipes import from_plain

log = logging.getLogger(__name__)


def export(
    checkpoint: str,
    folder: str,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    adapter: Adapter = "merge",
    max_shard_size: str = "5GB",
    base: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Turn a checkpoint into a Hugging Face folder: weights, tokenizer, chat template, model card.

    It takes one CPU and about as much memory as one file of weights.

    Args:
        checkpoint: A .ckpt file, or the folder of a sharded checkpoint.
        folder: Where to; it is made if need be.
        dtype: Dtype of the weights; that in which they were trained unless given.
        adapter: Of a policy with adapters write a whole model that has taken them up, or the adapters alone.
        max_shard_size: Most of a file of weights, as in 5GB or 500MB.
        base: Folder or hub name of the model that training began with, if it is no longer where it was.
        overwrite: Write into a folder that is not empty, in the place of a model that it holds.

    Returns:
        The folder.

    Raises:
        UsageError: If the checkpoint is none, its base model is not found, or the folder is not empty.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise UsageError(f"{folder} is a file; name a folder.")
    if not overwrite and target.exists() and any(target.iterdir()):
        raise UsageError(f"The folder {folder} is not empty; name another, or say --overwrite.")
    if dtype is not None and adapter == "save":
        raise UsageError("--dtype is of a whole model, --adapter save writes adapters as they were trained; say one.")
    found = open_checkpoint(Path(checkpoint))
    spec = _spec(found, base)
    tokenizer = spec.load_tokenizer()  # what may be missing is found out before anything is written
    trained, alone = _trained(spec, found, adapter), spec.lora is not None and adapter == "save"
    if dtype is not None:
        trained = replace(trained, dtype=getattr(torch, dtype))
    if isinstance(spec, RewardSpec) and not alone:
        trained = as_classifier(trained, tokenizer, found.record)
    write(trained, target, adapter=adapter, max_shard_size=max_shard_size)
    write_companions(target, tokenizer, found.record, base=spec.path, alone=alone)
    return target


def tokenizer_of(checkpoint: str, base: str | None = None) -> Tokenizer:
    """The tokenizer that an export would write, without reading weights.

    Args:
        checkpoint: A .ckpt file, or the folder of a sharded checkpoint.
        base: Folder or hub name of the model that training began with, if it is no longer where it was.
    """
    found = open_checkpoint(Path(checkpoint))
    return with_chat_template(_spec(found, base).load_tokenizer(), found.record)


def _spec(found: Checkpoint, base: str | None) -> PolicySpec:
    """The recipe of the policy, which is not to be quantised here."""
    plain = copy.deepcopy(found.record["hyper_parameters"]["policy"])
    plain["init_args"]["quantize"] = None  # neither needed for writing nor, perhaps, possible on this machine
    spec = from_plain(plain, PolicySpec)
    if base is not None:
        spec = replace(spec, path=base, revision=None)
    try:
        spec.load_config()
    except UsageError as error:
        raise UsageError(
            f"The model that training began with is not found: {error} Start from the folder that training was started "
            "from, or say --base where it is now."
        ) from error
    return spec


def _trained(spec: PolicySpec, found: Checkpoint, adapter: Adapter) -> Trained:
    settings = None if spec.lora is None else spec.lora.settings()
    weights = found.weights if settings is None or adapter == "save" else _with_base(spec, found, settings)
    kept = (weight.dtype for weight in weights.values() if weight.dtype.is_floating_point)
    sampling = spec.file("generation_config.json")
    return Trained(
        config=spec.load_config(),
        weights=weights,
        path=spec.path,
        dtype=next(kept) if settings is None else getattr(torch, spec.dtype),
        settings=settings,
        generation=None if sampling is None else GenerationConfig.from_pretrained(sampling.parent),
        trust_remote_code=spec.trust_remote_code,
        auto=spec.auto,
    )


def _with_base(spec: PolicySpec, found: Checkpoint, settings: Any) -> Weights:
    """Adapters and the weights below them, which a checkpoint does not hold."""
    if spec.random_init:
        raise UsageError(
            "The adapters of this checkpoint were trained on random weights, which nobody kept; write them alone "
            "(--adapter save)."
        )
    if changes_base(settings):
        log.info("These adapters began by changing the weights below them, so the whole policy is built.")
        below = in_memory(spec.build().model.state_dict())
    else:
        below = base_weights(spec, spec.load_config(), settings)
    expected = found.record.get(BASE_FINGERPRINT)
    quantised = _arguments(found)["quantize"] is not None  # then the fingerprint is of other numbers
    if expected is not None and not quantised and _base_fingerprint(spec, settings, below) != expected:
        raise UsageError(
            f"The adapters of this checkpoint were trained on other weights than {spec.path} holds now; say --base "
            "where those are."
        )
    return {**below, **found.weights}


def _base_fingerprint(spec: PolicySpec, settings: Any, below: Weights) -> str:
    """What ``base_fingerprint`` gives for the policy in memory."""
    model = outline(spec.load_config(), getattr(torch, spec.dtype), spec.trust_remote_code, spec.auto)
    outline_adapter(model, settings)
    names = below_adapters(model)
    return digest_of((f"model.{name}", below[name].read()) for name, _ in model.named_parameters() if name in names)


def _arguments(found: Checkpoint) -> dict[str, Any]:
    """What the recipe of the policy was given."""
    plain = found.record["hyper_parameters"]["policy"]
    arguments: dict[str, Any] = plain["init_args"]
    return arguments
