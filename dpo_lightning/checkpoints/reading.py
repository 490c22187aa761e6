"""Reading checkpoints as plain data; what cannot be read is said in words."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from dpo_lightning.errors import UsageError

META = "meta.pt"  # what a sharded checkpoint holds besides weights and optimizer, written last
SHARDS = ".metadata"
ZIP = b"PK\x03\x04"  # how files of torch begin
KEYS = ("pytorch-lightning_version", "state_dict")  # of every checkpoint that a Trainer writes


def read(
    path: Path, *, map_location: Any = "cpu", weights_only: bool = True, mmap: bool | None = None
) -> dict[str, Any]:
    """The checkpoint in a file, or in a folder of shards.

    Args:
        path: The file or folder.
        map_location: As in ``torch.load``.
        weights_only: Refuse all but tensors and plain data; what else a file holds can run code when it is loaded.
        mmap: Leave tensors on the disk until they are looked at.

    Raises:
        UsageError: If there is none, or it is damaged, or something else.
    """
    if not path.exists():
        raise UsageError(f"There is no checkpoint {path}.")
    if path.is_dir():
        if not is_sharded(path):
            raise UsageError(
                f"{path} is a folder, but no sharded checkpoint, or an unfinished one: those hold {META} and {SHARDS}."
            )
        from dpo_lightning.checkpoints.folders import as_file

        return as_file(path)
    checkpoint = _loaded(path, map_location=map_location, weights_only=weights_only, mmap=mmap)
    if not isinstance(checkpoint, dict) or not all(name in checkpoint for name in KEYS):
        raise UsageError(
            f"{path} is no checkpoint of a Trainer: {_contents(checkpoint)}. Weights alone begin a run by "
            "`model.init_args.policy.path`, the folder that they lie in."
        )
    return checkpoint


def read_without_weights(path: Path) -> dict[str, Any]:
    """The same, tensors not read from the disk; of a folder of shards what it holds besides them.

    Raises:
        UsageError: If it is damaged, or something else.
    """
    if path.is_dir():
        return _loaded(path / META, map_location="cpu", weights_only=True)
    checkpoint = _loaded(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(checkpoint, dict) or not all(name in checkpoint for name in KEYS):
        raise UsageError(f"{path} is no checkpoint of a Trainer: {_contents(checkpoint)}.")
    return checkpoint


def is_sharded(folder: Path) -> bool:
    """Whether a folder is a sharded checkpoint, and complete."""
    return (folder / META).is_file() and (folder / SHARDS).is_file()


def has_all_parts(folder: Path) -> bool:
    """Whether a sharded checkpoint has the files of all ranks.

    Raises:
        UsageError: If what says which they are is damaged.
    """
    from dpo_lightning.checkpoints import folders

    return folders.has_all_parts(folder)


def _loaded(path: Path, **options: Any) -> Any:
    try:
        with path.open("rb") as file:
            begins = file.read(len(ZIP)) == ZIP
    except OSError as error:
        raise UsageError(f"The checkpoint {path} cannot be read: {error.strerror}.") from error
    if not begins:
        raise UsageError(f"{path} is no checkpoint, or its beginning is damaged: torch has not written it so.")
    try:
        return torch.load(str(path), **options)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise UsageError(
            f"{path} holds more than tensors and plain data{f' ({named[1]})' if named else ''}, and loading that can "
            "run code. If you trust it: `weights_only: false`."
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        reason = str(error).strip().split(". ")[0]
        raise UsageError(f"{path} is cut off or damaged ({reason}); use an earlier one.") from error


def _contents(found: Any) -> str:
    if not isinstance(found, dict):
        return f"it holds a {type(found).__name__}"
    return f"it holds {', '.join(map(repr, list(found)[:3]))}{', ...' if len(found) > 3 else ''}"
