"""Weights into safetensors files as transformers lays them out, without holding more of them than a file has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from dpo_lightning.errors import UsageError
from dpo_lightning.export.weights import Weights
from dpo_lightning.models.adapters import Step

INDEX = "model.safetensors.index.json"
STALE = re.compile(
    r"(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|(adapter_|generation_)?config\.json"
)


def write_weights(
    folder: Path, outline: PreTrainedModel, steps: Sequence[Step], weights: Weights, max_shard_size: str, writes: bool
) -> None:
    """Write a model's weights, one shard in memory at a time.

    Args:
        folder: Where to.
        outline: The model without storage, in the dtype that is to be written.
        steps: How its weights come from those that there are.
        weights: Those that there are.
        max_shard_size: Most of a file, as in 5GB.
        writes: Whether this process writes; others help to gather what is sharded among ranks.
    """
    groups, tensors = divided(outline, steps)
    try:
        split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    except ValueError as error:
        raise UsageError(f"`max_shard_size` is a number with KB, MB, GB or TB, got {max_shard_size!r}.") from error
    files = _Files(folder, split.filename_to_tensors)
    dtypes = {name: tensor.dtype for name, tensor in outline.state_dict().items()}
    failure: UsageError | None = None
    try:
        for group in groups:
            held = _held(group, weights, dtypes, writes and failure is None)
            try:
                files.add(revert_weight_conversion(outline, held))
            except UsageError as error:
                failure = error  # for later: other ranks need this one until everything is gathered
        if failure is not None:
            raise failure
        if writes:
            parameters = sum(tensor.numel() for tensor in tensors.values())
            index = {
                "metadata": {"total_parameters": parameters, **split.metadata},
                "weight_map": split.tensor_to_filename,
            }
            files.finish(index if split.is_sharded else None)
    finally:
        files.discard()


def divided(outline: PreTrainedModel, steps: Sequence[Step]) -> tuple[list[list[Step]], dict[str, Tensor]]:
    """Steps in the smallest groups that can be converted to what files hold by themselves, and all that files hold.

    Weights that are fused in memory and several in files, such as those of experts, are taken apart; where several in
    memory are one in files they have to be at hand together.
    """
    held = outline.state_dict()
    names = [name for step in steps for name in step.outputs]
    whole = revert_weight_conversion(outline, {name: held[name] for name in names})
    shapes = {name: tensor.shape for name, tensor in whole.items()}
    for grouped in (_singly(steps), _by_layer(steps)):
        parts = [revert_weight_conversion(outline, {n: held[n] for s in group for n in s.outputs}) for group in grouped]
        together = {name: tensor for part in parts for name, tensor in part.items()}
        if {name: tensor.shape for name, tensor in together.items()} == shapes:
            return grouped, together
    return [list(steps)], whole


def _singly(steps: Iterable[Step]) -> list[list[Step]]:
    return [[step] for step in steps]


def _by_layer(steps: Iterable[Step]) -> list[list[Step]]:
    groups: dict[str, list[Step]] = {}
    for step in steps:
        numbered = re.match(r".*?\.\d+\.", step.outputs[0])
        groups.setdefault(numbered.group() if numbered else step.outputs[0], []).append(step)
    return list(groups.values())


def _held(group: list[Step], weights: Weights, dtypes: Mapping[str, torch.dtype], wanted: bool) -> dict[str, Tensor]:
    """What a model holds of a group; every rank reads, in the same order."""
    held = dict[str, Tensor]()
    for step in group:
        read = {name: weights[name].read() for name in step.inputs}
        if wanted:
            held |= {name: tensor.to(dtypes[name]) for name, tensor in step.make(read).items()}
    return held


class _Files:
    """Files under temporary names, each written when all of its tensors are there."""

    def __init__(self, folder: Path, names: Mapping[str, list[str]]) -> None:
        self.folder, self.names = folder, dict(names)
        self.pending: dict[str, Tensor] = {}
        self.written: list[str] = []

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        self.pending |= tensors
        for file in list(self._complete()):
            content = {name: self.pending.pop(name).contiguous() for name in self.names.pop(file)}
            save_temporarily(content, self.folder / file)
            self.written.append(file)

    def _complete(self) -> Iterator[str]:
        return (file for file, names in self.names.items() if self.pending.keys() >= set(names))

    def finish(self, index: Mapping[str, object] | None) -> None:
        """Put the files in the place of what was there, the index last."""
        assert not self.names, f"tensors are missing: {self.names}"
        remove_stale(self.folder)
        for file in self.written:
            put_in_place(self.folder / file)
        if index is not None:
            content = json.dumps(index, indent=2, sort_keys=True) + "\n"
            temporary(self.folder / INDEX).write_text(content, encoding="utf-8")
            put_in_place(self.folder / INDEX)

    def discard(self) -> None:
        """Leave no half of a model behind."""
        for file in self.written:
            temporary(self.folder / file).unlink(missing_ok=True)


def temporary(path: Path) -> Path:
    """What a file is called until it is whole."""
    return path.with_name(f"{path.name}.tmp")


def put_in_place(path: Path) -> None:
    """Give a file its name."""
    temporary(path).replace(path)


def save_temporarily(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file under its temporary name.

    Raises:
        UsageError: If that cannot be done; nothing is left of it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary(path), metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary(path).unlink(missing_ok=True)
        raise UsageError(
            f"Cannot write {path}: {error}. Is there room on the disk, and may you write there?"
        ) from error


def remove_stale(folder: Path) -> None:
    """Remove the model of an earlier export, which transformers might read instead."""
    for path in folder.iterdir():
        if STALE.fullmatch(path.name):
            path.unlink()
