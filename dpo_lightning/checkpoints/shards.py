"""Reading the files of torch.distributed.checkpoint as plain data: no code that they name is run."""

from __future__ import annotations

import io
import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from dpo_lightning.checkpoints.reading import SHARDS


class ShardReader(FileSystemReader):
    """Reads a folder of shards; its list of contents once.

    Args:
        folder: The folder.

    Raises:
        pickle.UnpicklingError: If the list of contents is none, or asks for more than what describes tensors.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with (folder / SHARDS).open("rb") as file:
            self.contents: Metadata = _Unpickler(file).load()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The list of contents."""
        return self.contents


class PlainPlanner(DefaultLoadPlanner):
    """Loads what is no tensor with ``weights_only=True``."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value in its place."""
        name, loaded = read_item.dest_index.fqn, torch.load(value, weights_only=True)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded


class _Unpickler(pickle.Unpickler):
    """Takes what describes tensors in files, and no code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.0 to 3.11.3 write members of an Enum
            return _member
        described = module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
        named = (module, name) in (("torch", "Size"), ("torch.serialization", "_get_layout"))
        path = module.startswith("pathlib") and name.endswith("Path")
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if "." in name or not (described or named or path or dtype or (module, name) == ("collections", "OrderedDict")):
            raise pickle.UnpicklingError(f"its list of contents asks for {module}.{name}")
        return super().find_class(module, name)


def _member(kind: Any, name: str) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"its list of contents asks for {name!r} of {kind!r}")
    return kind[name]
