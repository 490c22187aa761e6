"""Checkpoints in folders, to which every rank writes its part, and what they would be as one file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dpo_lightning.checkpoints.files import UNFINISHED, cannot_write, num_bytes, system_error
from dpo_lightning.checkpoints.reading import META, read_without_weights
from dpo_lightning.checkpoints.shards import PlainPlanner, ShardReader
from dpo_lightning.errors import UsageError

WEIGHTS, OPTIMIZERS = "state_dict", "optimizer_states"
PARTS = "optimizer_"  # how the states of optimizers are called in a folder


def save_folder(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint whose weights and optimizer states are divided among ranks; all of them call it.

    The folder takes its name when all of it is there.

    Raises:
        UsageError: If a rank cannot write, on all ranks.
    """
    unfinished = path.with_name(f".{path.name}{UNFINISHED}")
    divided = {WEIGHTS: checkpoint.pop(WEIGHTS)}
    divided |= {f"{PARTS}{place}": state for place, state in enumerate(checkpoint.pop(OPTIMIZERS, []))}

    def begin() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        unfinished.mkdir()

    def finish() -> None:
        _write_rest(checkpoint, unfinished)
        _put_in_place(unfinished, path)

    try:
        _on_first_rank(begin)
        _on_all_ranks(lambda: save(divided, storage_writer=_Writer(unfinished)))
        _on_first_rank(finish)
    except _CannotWrite as error:
        _on_first_rank(lambda: shutil.rmtree(unfinished, ignore_errors=True))
        needed = num_bytes(checkpoint) + _num_bytes_of_all(divided)
        raise UsageError(cannot_write(path, OSError(*error.args), needed)) from error


def load_folder(path: Path, model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Give divided weights and optimizers what a folder holds, on all ranks; what it holds besides them."""
    # In place: weights are those of the model. A reference that is built anew is not among them.
    _load({WEIGHTS: model.state_dict()}, path)
    for place, optimizer in enumerate(optimizers):
        state = {f"{PARTS}{place}": get_optimizer_state_dict(model, optimizer)}
        _load(state, path)
        set_optimizer_state_dict(model, optimizer, state[f"{PARTS}{place}"])
    return read_without_weights(path)


def load_file(checkpoint: dict[str, Any], model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Give each rank its part of what a checkpoint of one file holds; what it holds besides weights and optimizers."""
    options = StateDictOptions(full_state_dict=True, strict=False)
    whole = checkpoint.pop(WEIGHTS)
    missing = [name for name in model.state_dict() if name not in whole]
    if missing:
        raise UsageError(f"The checkpoint lacks weights: {', '.join(missing[:3])}.")
    set_model_state_dict(model, whole, options=options)
    for optimizer, state in zip(optimizers, checkpoint.pop(OPTIMIZERS, []), strict=True):
        set_optimizer_state_dict(model, optimizer, _by_name(state, model, optimizer), options=options)
    return checkpoint


def as_file(path: Path) -> dict[str, Any]:
    """A checkpoint in a folder as it would be in one file, read by one process, with all of it in memory."""
    metadata = contents_of(path).contents
    flat: dict[str, Any] = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        if isinstance(about, TensorStorageMetadata)
        else None
        for name, about in metadata.state_dict_metadata.items()
    }
    _load(flat, path, no_dist=True)
    checkpoint = read_without_weights(path)
    found: dict[str, Any] = {}
    for name, value in flat.items():
        _put(found, metadata.planner_data[name], value)
    states = [found[f"{PARTS}{place}"] for place in range(len(found) - 1)]
    return {**checkpoint, WEIGHTS: found[WEIGHTS], OPTIMIZERS: [_by_number(state) for state in states]}


def has_all_parts(path: Path) -> bool:
    """Whether the files of all ranks are there.

    Raises:
        UsageError: If what says which they are is damaged.
    """
    places = contents_of(path).contents.storage_data.values()
    return all((path / name).is_file() for name in {place.relative_path for place in places})


def contents_of(path: Path) -> ShardReader:
    """A reader of a folder.

    Raises:
        UsageError: If its list of contents is damaged, or something else.
    """
    try:
        return ShardReader(path)
    except Exception as error:  # what damaged pickles raise is of many kinds
        raise UsageError(f"{path} is damaged ({error}); use an earlier one.") from error


def _load(state: dict[str, Any], path: Path, **options: Any) -> None:
    """Fill tensors in place with what a folder holds."""
    try:
        load(state, storage_reader=contents_of(path), planner=PlainPlanner(), **options)
    except CheckpointException as error:
        failure = next(iter(error.failures.values()))[0]
        reason = str(failure).strip().partition("\n")[0]
        raise UsageError(f"{path} is damaged, or of another model ({reason}); use an earlier one.") from error


class _Writer(FileSystemWriter):
    """Says what the system had against writing; torch closes a file with an error of its own over that."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        """Write this rank's part."""
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as error:
            reason = system_error(error)
            if reason is None:
                raise
            raise OSError(reason.errno, reason.strerror) from error


def _by_number(state: Mapping[str, Any]) -> dict[str, Any]:
    """State of an optimizer as torch keeps it: weights by their numbers, counted over the groups."""
    groups, numbers = [], dict[str, int]()
    for group in state["param_groups"]:
        for name in group["params"]:
            numbers[name] = len(numbers)
        groups.append({**group, "params": [numbers[name] for name in group["params"]]})
    of_weights = {numbers[name]: values for name, values in state.get("state", {}).items()}
    return {"state": of_weights, "param_groups": groups}


def _by_name(state: Mapping[str, Any], model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The same with weights by their names in the model."""
    names = {weight: name for name, weight in model.named_parameters()}
    order = [names[weight] for group in optimizer.param_groups for weight in group["params"]]
    groups = [{**group, "params": [order[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {order[number]: values for number, values in state["state"].items()}, "param_groups": groups}


def _put(root: dict[str, Any], keys: Sequence[str | int], value: Any) -> None:
    """Put a value into nested dictionaries and lists, which grow as they have to."""
    place: Any = root
    for key, following in zip(keys, [*keys[1:], None], strict=True):
        new: Any = value if following is None else [] if isinstance(following, int) else {}
        if isinstance(key, int):
            place.extend([None] * (key + 1 - len(place)))
            if following is None or place[key] is None:
                place[key] = new
        elif following is None or key not in place:
            place[key] = new
        place = place[key]


def _write_rest(checkpoint: dict[str, Any], folder: Path) -> None:
    with (folder / META).open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())


def _put_in_place(unfinished: Path, path: Path) -> None:
    """Give a folder its name, which another may have: that keeps one by which it is found until the new one is there.

    A name that is taken can be given to no other folder in one go.
    """
    before = path.with_name(f"{path.stem}.before{path.suffix}")
    if os.path.lexists(path):
        _remove(before)
        os.replace(path, before)
    os.replace(unfinished, path)
    _remove(before)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_abandoned(folder: Path) -> None:
    """What runs that were killed while they wrote have left."""
    for unfinished in filter(Path.is_dir, folder.glob(f".*{UNFINISHED}")):
        shutil.rmtree(unfinished, ignore_errors=True)


def _reason(error: BaseException) -> tuple[int, str]:
    """Number and words of what the system had against writing, on whatever rank."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else [(error, None)]
    for failure, _ in failures:
        found = system_error(failure)
        if found is not None:
            return found.errno or 0, found.strerror or str(found)
    return 0, str(error)


class _CannotWrite(Exception):
    """Number and words of what the system had against writing, on some rank."""


def _on_first_rank(do: Callable[[], object]) -> None:
    _on_all_ranks(do if distributed.get_rank() == 0 else lambda: None)


def _on_all_ranks(do: Callable[[], object]) -> None:
    """Do something that may not work, and agree on whether it did."""
    reason = None
    try:
        do()
    except (OSError, RuntimeError, CheckpointException) as error:
        reason = _reason(error)
    reasons: list[tuple[int, str] | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(reasons, reason)
    for found in filter(None, reasons):
        raise _CannotWrite(*found)


def _num_bytes_of_all(divided: Mapping[str, Any]) -> int:
    """Bytes that all ranks write, if each has as many as this one."""
    flat, _ = flatten_state_dict(divided)  # type: ignore[arg-type]
    parts = (value.to_local() for value in flat.values() if isinstance(value, DTensor))
    return sum(part.nbytes for part in parts) * distributed.get_world_size()
