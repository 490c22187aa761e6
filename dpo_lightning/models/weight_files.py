"""Weights in files, read one part of one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from torch import Tensor, equal
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from dpo_lightning.errors import UsageError
from dpo_lightning.models.shard import Box

Finder = Callable[[str], Path | None]

ROWS = 4096  # of a table that are compared at a time


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


def stored_weights(model: PreTrainedModel, find: Finder) -> Mapping[str, StoredWeight] | None:
    """Where the weights of a model lie, by their names in it.

    Args:
        model: The model, of which names alone are looked at.
        find: Gives a file of the model by its name, or ``None`` where there is none.

    Returns:
        ``None`` where the family makes its weights of several stored ones, or there are no safetensors files.

    Raises:
        UsageError: If the weights are others than the config says.
    """
    files = safetensors_files(find)
    if not files:
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
                stored = tuple(opened.get_slice(key).get_shape())
                if name in names and stored != tuple(names[name].shape):
                    raise UsageError(
                        f"`policy.path`: in {file.name} {key} has the shape {stored}, and by its config the model has "
                        f"{tuple(names[name].shape)}. The config is of other weights."
                    )
    return found | _under_all_names(model, found)


def _under_all_names(model: PreTrainedModel, found: Mapping[str, StoredWeight]) -> dict[str, StoredWeight]:
    """Weights that have several names, under each of them.

    Raises:
        UsageError: If what is one weight in the model is stored with different values.
    """
    names: dict[Tensor, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(weight, []).append(name)
    named: dict[str, StoredWeight] = {}
    for known_as in names.values():
        stored = [name for name in known_as if name in found]
        for other in stored[1:]:
            if not _same(found[stored[0]], found[other]):
                raise UsageError(
                    f"`policy.path`: {stored[0]} and {other} are one weight by the config, and stored with different "
                    "values. Set `tie_word_embeddings: false` in its config.json."
                )
        named |= {name: found[stored[0]] for name in known_as if stored}
    return named


def _same(first: StoredWeight, second: StoredWeight) -> bool:
    """Whether two stored weights of one shape are equal, looked at by and by."""
    with safe_open(first.file, framework="pt") as one, safe_open(second.file, framework="pt") as other:
        pair = one.get_slice(first.key), other.get_slice(second.key)
        rows = range(0, pair[0].get_shape()[0], ROWS)
        return all(equal(*(part[start : start + ROWS] for part in pair)) for start in rows)


def safetensors_files(find: Finder) -> list[Path]:
    """The files of a model, in one or in several parts; none where it has others.

    Args:
        find: Gives a file of the model by its name, or ``None`` where there is none.
    """
    index, names = find(SAFE_WEIGHTS_INDEX_NAME), [SAFE_WEIGHTS_NAME]
    if index is not None:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [path for path in map(find, names) if path is not None]
