"""Weights by name that are read one at a time, wherever they lie."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from dpo_lightning.errors import UsageError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Stored(NamedTuple):
    """A weight that is not read yet.

    Attributes:
        shape: Its shape, of all shards together.
        dtype: Its dtype.
        read: Reads it whole, on the CPU; of a sharded weight in memory a collective call of all ranks.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


Weights = Mapping[str, Stored]


def in_memory(tensors: Mapping[str, Tensor]) -> Weights:
    """Tensors in memory or mapped into it, sharded over ranks or not."""
    return {
        name: Stored(tuple(tensor.shape), tensor.dtype, functools.partial(_whole, tensor))
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor)
    }


def is_sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether reading takes all ranks."""
    return any(hasattr(tensor, "full_tensor") for tensor in tensors.values())


def _whole(tensor: Any) -> Tensor:
    with torch.no_grad():
        whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().cpu()


def in_safetensors(files: Iterable[Path]) -> Weights:
    """The weights of safetensors files."""
    weights = {}
    for path in files:
        file = safe_open(path, framework="pt")
        for name in file.keys():  # noqa: SIM118  (no mapping, and no iterator)
            part = file.get_slice(name)
            dtype = DTYPES.get(part.get_dtype(), torch.uint8)
            weights[name] = Stored(tuple(part.get_shape()), dtype, functools.partial(file.get_tensor, name))
    return weights


def in_shards(folder: Path) -> Weights:
    """The weights of a folder that torch.distributed.checkpoint wrote, read in one process.

    Raises:
        pickle.UnpicklingError: If its list of contents is none.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from dpo_lightning.checkpoints.shards import ShardReader

    reader = ShardReader(folder)
    return {
        name: Stored(tuple(entry.size), entry.properties.dtype, functools.partial(_from_shards, reader, name, entry))
        for name, entry in reader.contents.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _from_shards(reader: Any, name: str, entry: Any) -> Tensor:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    found = {name: torch.empty(entry.size, dtype=entry.properties.dtype)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of not being one of several processes
        try:
            load(found, storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            raise UsageError(f"{reader.path}: {name} cannot be read: {reason}. Take another checkpoint.") from error
    return found[name]
