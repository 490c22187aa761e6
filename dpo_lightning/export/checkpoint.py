"""Checkpoints of any kind, opened without reading weights: a file, or a folder of shards."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dpo_lightning.checkpoints.reading import META, SHARDS
from dpo_lightning.errors import UsageError
from dpo_lightning.export.weights import Weights, in_memory, in_shards
from dpo_lightning.modules.base import POLICY

PREFIX = f"{POLICY}model."
BULK = ("state_dict", "optimizer_states")


class Checkpoint(NamedTuple):
    """What a run left.

    Attributes:
        record: All but weights and optimizer, as plain data.
        weights: Those of the policy, by the names that its model has for them; below adapters there are none.
    """

    record: dict[str, Any]
    weights: Weights


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint of a module of this package.

    Raises:
        UsageError: If it is none, or damaged.
    """
    if not path.exists():
        raise UsageError(f"There is no checkpoint {path}.")
    try:
        record, weights = _open_folder(path) if path.is_dir() else _open_file(path)
    except (OSError, EOFError, KeyError, RuntimeError, ValueError, AttributeError, pickle.UnpicklingError) as error:
        if isinstance(error, UsageError):
            raise
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UsageError(
            f"{path} cannot be read: {reason or type(error).__name__}. Take another checkpoint."
        ) from error
    weights = {name.removeprefix(PREFIX): weight for name, weight in weights.items() if name.startswith(PREFIX)}
    policy = record.get("hyper_parameters", {}).get("policy")
    if not (isinstance(policy, dict) and "init_args" in policy and weights):
        raise UsageError(f"{path} was not saved by a module of this package: it holds no policy.")
    return Checkpoint(record, weights)


def _open_file(path: Path) -> tuple[dict[str, Any], Weights]:
    if not zipfile.is_zipfile(path):
        raise UsageError(
            f"{path} is no checkpoint: either no Trainer wrote it, or it is cut short, as where a run was killed in "
            "writing it. Give a .ckpt file, or the folder of a sharded checkpoint."
        )
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError("it holds no state_dict")
    return {name: value for name, value in content.items() if name not in BULK}, in_memory(content["state_dict"])


def _open_folder(path: Path) -> tuple[dict[str, Any], Weights]:
    missing = [name for name in (SHARDS, META) if not (path / name).is_file()]
    if len(missing) == 2:
        raise UsageError(f"{path} is a folder without a sharded checkpoint: there is no {SHARDS} and no {META} in it.")
    if missing:
        raise UsageError(f"{path} lacks {missing[0]}: the run was stopped before it was written whole. Take another.")
    record = torch.load(path / META, map_location="cpu", weights_only=True)
    weights = in_shards(path)
    prefix = "state_dict."
    return record, {name.removeprefix(prefix): part for name, part in weights.items() if name.startswith(prefix)}
