"""Weights in files, read one part of one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from dpo_lightning.models.shard import Box


class StoredWeight(NamedTuple):
    """Where a weight lies.

    Attributes:
        file: A safetensors file.
        key: Its name there.
    """

    file: Path
    key: str

    def read(self, box: Box) -> Tensor:
        """A part of it, by a range of each dimension."""
        with safe_open(self.file, framework="pt") as opened:  # opened anew: what was read stays mapped while it is open
            part = opened.get_slice(self.key)
            if not box or not part.get_shape():
                return opened.get_tensor(self.key)
            return part[box]


def stored_weights(model: PreTrainedModel, path: str, revision: str | None) -> Mapping[str, StoredWeight] | None:
    """Where the weights of a model lie, by their names in it.

    Args:
        model: The model, of which names alone are looked at.
        path: A folder, or a name on the hub.
        revision: Branch, tag or commit on the hub.

    Returns:
        ``None`` where the family makes its weights of several stored ones, or there are no safetensors files.
    """
    files = safetensors_files(path, revision)
    if files is None:
        return None
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    names = dict(model.state_dict())
    found: dict[str, StoredWeight] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (no mapping)
                name, made_of = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
                if made_of is not None:
                    return None
                found[name] = StoredWeight(file, key)
    return found


def safetensors_files(path: str, revision: str | None) -> list[Path] | None:
    """The files of a folder or a model on the hub, in one or in several parts; ``None`` where there are none."""
    options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **options)
    if index is not None:
        names, _ = get_checkpoint_shard_files(path, index, revision=revision)
        return list(map(Path, names))
    single = cached_file(path, SAFE_WEIGHTS_NAME, **options)
    return None if single is None else [Path(single)]
