"""Checkpoints in one file: a kill or a full disk while one is written leaves the one before it as it was."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from torch import Tensor

from dpo_lightning.checkpoints.reading import read
from dpo_lightning.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

UNFINISHED = ".unfinished"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room, none for this user, none for files of that size


class CheckpointFiles(TorchCheckpointIO):
    """Checkpoints of one file that are whole or not there.

    Modules of this package have every Trainer use it that has no way of its own.

    A checkpoint goes straight to the disk, under another name until all of it is there, without a copy in memory. It
    is read with ``weights_only=True`` unless told otherwise. Addresses that are no local paths are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            UsageError: If it cannot be written, such as to a full disk.
        """
        if storage_options is not None or _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            _write(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, also one of shards.

        Raises:
            UsageError: If there is none, or it is damaged, or something else.
        """
        weights_only = True if weights_only is None else weights_only
        if _is_remote(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return read(Path(path), map_location=map_location, weights_only=weights_only)


def write_whole_files(trainer: Trainer) -> None:
    """Write and read checkpoints so, unless the user or the strategy has a way of its own."""
    try:
        plain = type(trainer.strategy.checkpoint_io) is TorchCheckpointIO
    except NotImplementedError:
        return
    if plain:
        trainer.strategy.checkpoint_io = CheckpointFiles()


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path)


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        with _whole_file(path) as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:
        reason = system_error(error)
        if reason is None:
            raise
        raise UsageError(cannot_write(path, reason, num_bytes(checkpoint))) from error


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its name when all of it is on the disk."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{UNFINISHED}")
    try:
        with unfinished.open("xb") as file:
            _try_to_lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.is_dir() and not path.is_symlink():  # a sharded checkpoint of that name
            shutil.rmtree(path)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _remove_abandoned(folder: Path) -> None:
    """What runs that were killed while they wrote have left."""
    for unfinished in filter(Path.is_file, folder.glob(f".*{UNFINISHED}")):
        with contextlib.suppress(FileNotFoundError), unfinished.open("rb") as file:
            if _try_to_lock(file):
                unfinished.unlink()


def _try_to_lock(file: IO[bytes]) -> bool:
    """Mark a file as being written, which ends with its process; whether nobody else writes it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks
        return True
    return True


def system_error(error: BaseException | None) -> OSError | None:
    """The system's reason; torch closes a file that it could not write with an error of its own over that."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def cannot_write(path: Path, error: OSError, needed: int) -> str:
    """Why a checkpoint of so many bytes could not be written, and what helps."""
    message = f"The checkpoint {path} could not be written: {error.strerror}."
    remedy = "Name another folder (`dirpath`)"
    if error.errno in FULL:
        free = shutil.disk_usage(path.parent).free
        message += f" It has about {needed / 1e6:,.0f} MB, and there {free / 1e6:,.0f} MB are free."
        remedy = "Make room, keep fewer of them (`save_top_k`) or name another folder (`dirpath`)"
    return (
        f"{message} Checkpoints written before it are as they were. {remedy}; then go on from the last one, as by "
        "`resume: true`."
    )


def num_bytes(checkpoint: Any) -> int:
    """Bytes of all tensors, those that share memory counted once."""
    return sum({storage.data_ptr(): storage.nbytes() for storage in _storages(checkpoint)}.values())


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    if isinstance(value, Tensor):
        yield value.untyped_storage()
    elif isinstance(value, dict):
        for item in value.values():
            yield from _storages(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _storages(item)
