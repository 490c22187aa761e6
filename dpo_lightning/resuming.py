"""The same command again: go on from the last checkpoint of its earlier run, into the same folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dpo_lightning.checkpoints.find import NUMBERED, STOPPED, folder_name, last_checkpoint, steps
from dpo_lightning.checkpoints.reading import read_without_weights
from dpo_lightning.errors import UsageError

CONFIG, VERSION = "config", "logger_version"
NONE = "no earlier run with these folders has left a checkpoint that is whole. Name a file, or leave it out."
# Keys that do not decide what a run learns.
MAY_CHANGE = (
    *("resume", "ckpt_path", "weights_only"),
    *(f"trainer.{name}" for name in ("max_epochs", "max_steps", "logger", "callbacks", "default_root_dir", "enable_")),
)


class Earlier(NamedTuple):
    """What an earlier run has left.

    Attributes:
        path: Its last checkpoint.
        header: What that holds besides tensors.
        version: Its version in the logger's folder, where it has one.
    """

    path: Path
    header: dict[str, Any]
    version: int | str | None


class KeepConfig(SaveConfigCallback):
    """Keeps the configuration in the log folder, and in every checkpoint as YAML, with the version of the logger."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add them to a checkpoint."""
        checkpoint[CONFIG] = self.as_yaml()
        checkpoint[VERSION] = trainer.loggers[0].version if trainer.loggers else None

    def as_yaml(self) -> str:
        """The configuration."""
        return self.parser.dump(self.config, format="yaml")


class GoesOn(Callback):
    """Sees that all ranks go on from the same checkpoint, and that it is rotated with the others.

    Each rank looks for it before any of them writes; but a network's file system may show them different files.

    Args:
        path: What this process has found.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare with the first rank, on all of them.

        Raises:
            UsageError: If it has found another.
        """
        first = trainer.strategy.broadcast(self.path)
        same = trainer.strategy.reduce_boolean_decision(first == self.path, all=True)
        if not same:
            raise UsageError(
                f"The ranks do not see the same files: the first would go on from {first}, this one from {self.path}. "
                "Start the command again, or name one by `ckpt_path`."
            )

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """A ModelCheckpoint never removes what the Trainer was told to begin from; here that is one of its own."""
        trainer.ckpt_path = None


def go_on(trainer: Trainer, required: bool) -> str | None:
    """The checkpoint from which a fit goes on, having said so; ``None`` where it starts anew.

    The Trainer then writes into the folders of the earlier run.

    Args:
        trainer: A Trainer that has not begun.
        required: Whether it is an error if there is none.
    """
    earlier = find_earlier(trainer)
    if earlier is None and required:
        raise UsageError(f"`ckpt_path: last`, but {NONE} `resume: true` goes on where it can, and else starts anew.")
    path = None if earlier is None else str(earlier.path)
    trainer.callbacks.insert(0, GoesOn(path))  # type: ignore[attr-defined]
    if earlier is None:
        rank_zero_info("There is no earlier run to go on with; this one starts anew.")
        return None
    done = steps(earlier.header)
    if is_finished(trainer, earlier.header):
        rank_zero_info(
            f"The earlier run has done all of its {done} steps ({path}): nothing is trained. To go on with it raise "
            "`trainer.max_epochs` or `trainer.max_steps`; to start anew leave out `resume`."
        )
    else:
        rank_zero_info(f"Goes on behind step {done}, from {path}.")
    keeper = next((c for c in trainer.callbacks if isinstance(c, KeepConfig)), None)  # type: ignore[attr-defined]
    if keeper is not None and CONFIG in earlier.header:
        for change in changes(earlier.header[CONFIG], keeper.as_yaml()):
            rank_zero_warn(f"Other than in the earlier run: {change}")
    write_into(trainer, earlier)
    return path


def last_of(trainer: Trainer) -> str:
    """The last checkpoint of the newest run, to be validated, tested or predicted with."""
    earlier = find_earlier(trainer)
    path = None if earlier is None else str(earlier.path)
    trainer.callbacks.insert(0, GoesOn(path))  # type: ignore[attr-defined]
    if path is None:
        raise UsageError(f"`ckpt_path: last`, but {NONE}")
    return path


def find_earlier(trainer: Trainer) -> Earlier | None:
    """The last checkpoint that a run with the same Trainer has left, where it would write its own.

    That is the folder of its ModelCheckpoint, or, where its logger gives every run a folder of its own, the newest of
    those with a checkpoint that is whole. A run without a ModelCheckpoint leaves one where it was stopped.
    """
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    fixed = {Path(saver.dirpath) for saver in savers if saver.dirpath is not None}
    found = [earlier for folder in sorted(fixed) if (earlier := _in_folder(folder))]
    if not savers or any(saver.dirpath is None for saver in savers):
        runs = (_in_folder(folder) for folder in _folders_of_runs(trainer))
        if not savers:  # others keep theirs there
            runs = (run for run in runs if run is not None and run.path.name.startswith(STOPPED))
        found += [earlier for earlier in [next(filter(None, runs), None)] if earlier]
    return max(found, key=lambda earlier: steps(earlier.header), default=None)


def write_into(trainer: Trainer, earlier: Earlier) -> None:
    """Go on in the TensorBoard folder of the earlier run, where what it logged behind its checkpoint no longer counts.

    Checkpoints follow, unless they have a folder of their own. Other loggers begin anew, since they overwrite.
    """
    for logger in trainer.loggers:
        if not isinstance(logger, TensorBoardLogger) or earlier.version is None or logger._version is not None:
            continue
        if (Path(logger.root_dir) / folder_name(earlier.version)).is_dir():
            logger._version = earlier.version
            logger._kwargs.setdefault("purge_step", steps(earlier.header) + 1)


def is_finished(trainer: Trainer, header: dict[str, Any]) -> bool:
    """Whether a run has done all that its Trainer asks for.

    Raises:
        UsageError: If it has done more.
    """
    done = {"max_steps": steps(header), "max_epochs": _epochs(header)}
    for name, count in done.items():
        most = getattr(trainer, name) or -1
        if 0 <= most < count:
            raise UsageError(f"`trainer.{name}` is {most}, but the run that is to go on has done {count} already.")
    return any(getattr(trainer, name) == count for name, count in done.items())


def _epochs(header: dict[str, Any]) -> int:
    """Epochs whose batches have all been trained on."""
    if "loops" not in header:
        return 0
    progress = header["loops"]["fit_loop"]
    current = progress["epoch_progress"]["current"]
    behind_last_batch = (
        current["ready"] > current["processed"] and progress["epoch_loop.batch_progress"]["is_last_batch"]
    )
    return current["processed"] + behind_last_batch


def changes(before: str, now: str) -> list[str]:
    """Keys of a configuration that have other values, of those that decide what a run learns."""
    old, new = (dict(_flat(yaml.safe_load(text))) for text in (before, now))
    names = [name for name in sorted(old.keys() | new.keys()) if not name.startswith(MAY_CHANGE)]
    return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)]


def _in_folder(folder: Path) -> Earlier | None:
    path = last_checkpoint(folder)
    if path is None:
        return None
    header = read_without_weights(path)
    return Earlier(path, header, header.get(VERSION))


def _folders_of_runs(trainer: Trainer) -> Iterator[Path]:
    """Where checkpoints of earlier runs may lie, the newest first."""
    if not trainer.loggers:
        yield Path(trainer.default_root_dir) / "checkpoints"
        return
    logger = trainer.loggers[0]
    root = Path(logger.save_dir or trainer.default_root_dir) / str(logger.name)
    named = getattr(logger, "_version", None)  # asking for `version` would give it a new one
    if named is not None:
        yield root / folder_name(named) / "checkpoints"
        return
    yield from sorted(root.glob("*/checkpoints"), key=lambda folder: _age(folder.parent), reverse=True)


def _age(run: Path) -> tuple[int, float]:
    number = run.name.removeprefix(NUMBERED)
    return int(number) if number.isdigit() else -1, run.stat().st_mtime


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
