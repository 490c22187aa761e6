"""A notice from outside becomes a checkpoint and an orderly end."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed

from dpo_lightning.checkpoints.find import STOPPED, folder_name

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # a cluster's notice, and what SLURM can be told to send before the end


class GracefulStop(Callback):
    """On SIGTERM or SIGUSR1 save a checkpoint on all ranks together, and end with an exit code that says so.

    A notice may reach one rank or all. What was noticed is exchanged between the hosts while the next step runs, so
    that no step waits for it. Training then ends behind the first step that neither validation nor the end of an
    epoch follows: only from there Lightning goes on as if nothing had been. The checkpoint lies beside those of the
    run as ``stopped-step=N.ckpt`` and is removed once a run that went on from it has ended, or was stopped again. The
    exit code is 128 and the signal's number, as that of a process which the signal ended: 143 after SIGTERM, 138
    after SIGUSR1. Before the first and behind the last step the signals do what they did before.

    It stands in for what Lightning does on these signals, SLURM's automatic requeueing included.
    """

    def __init__(self) -> None:
        self._noticed = self._agreed = self._step = 0
        self._exchange: _Exchange | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._origin: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep Lightning from handling signals: its handler talks to other ranks in the middle of whatever they do."""
        if stage == "fit":
            trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]
            # This one has every step wait for the device.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen from now on."""
        self._noticed, self._agreed, self._step = 0, 0, trainer.global_step
        self._origin = Path(trainer.ckpt_path) if trainer.ckpt_path else None
        self._exchange = _Exchange() if trainer.world_size > 1 else None
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._notice) for number in SIGNALS}

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        """Behind an optimizer step, agree whether it is the last."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._agreed = self._noticed if self._exchange is None else self._exchange.last_and_next(self._noticed)
            trainer._signal_connector.received_sigterm = bool(self._agreed)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Not now."""
        trainer._signal_connector.received_sigterm = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Not now."""
        trainer._signal_connector.received_sigterm = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen no longer."""
        if self._exchange is not None:
            self._exchange.close()
        self._let_go(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What an earlier stop has left is not needed any more."""
        self._remove_origin(trainer)
        self._let_go(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Where Lightning stops because all ranks agreed to, save and say how to go on."""
        if self._agreed and isinstance(exception, SIGTERMException):
            number, path = signal.Signals(self._agreed), _folder(trainer) / f"{STOPPED}{trainer.global_step}.ckpt"
            trainer.save_checkpoint(path, weights_only=False)
            self._remove_origin(trainer)
            exception.code = 0 if _is_child(trainer) else 128 + number
            rank_zero_info(
                f"\n{number.name}: stopped behind step {trainer.global_step}, exit code {128 + number}. Saved {path}; "
                f"to go on, give the same command with --resume true, or --ckpt_path '{path}'."
            )
            trainer.strategy.barrier("stopped")
        self._let_go(trainer)

    def _notice(self, number: int, frame: object) -> None:
        self._noticed = max(self._noticed, number)

    def _remove_origin(self, trainer: Trainer) -> None:
        """Remove the checkpoint of a stop that this run went on from: there are newer ones."""
        if self._origin is not None and self._origin.match(f"{STOPPED}*.ckpt"):
            trainer.strategy.remove_checkpoint(self._origin)

    def _let_go(self, trainer: Trainer) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers, self._exchange = {}, None
        trainer._signal_connector.received_sigterm = False
        trainer._signal_connector.__dict__.pop("register_signal_handlers", None)
        trainer.fit_loop.epoch_loop.__dict__.pop("_broadcast_sigterm_tensor", None)


class _Exchange:
    """The highest number that any rank has given, a step later: exchanged between hosts, on no device."""

    def __init__(self) -> None:
        self.group = distributed.new_group(backend="gloo")
        self.number = torch.zeros(1, dtype=torch.int32)
        self.work: Any = None

    def last_and_next(self, number: int) -> int:
        """The highest of the last numbers; a new one is on its way."""
        highest = 0
        if self.work is not None:
            self.work.wait()
            highest = int(self.number.item())
        self.number.fill_(number)
        self.work = distributed.all_reduce(self.number, distributed.ReduceOp.MAX, group=self.group, async_op=True)
        return highest

    def close(self) -> None:
        """Wait for what is on its way, and end."""
        if self.work is not None:
            self.work.wait()
        distributed.destroy_process_group(self.group)


def _nothing(*args: object) -> None:
    pass


def _folder(trainer: Trainer) -> Path:
    """Where the run's checkpoints lie, or would if it kept any."""
    callback = trainer.checkpoint_callback
    found = callback.dirpath if isinstance(callback, ModelCheckpoint) else None
    if found:
        return Path(found)
    place = Path(trainer.default_root_dir)
    if trainer.loggers:  # as a ModelCheckpoint has it
        logger = trainer.loggers[0]
        place = Path(logger.save_dir or place) / str(logger.name) / folder_name(logger.version)  # type: ignore[arg-type]
    return trainer.strategy.broadcast(place) / "checkpoints"


def _is_child(trainer: Trainer) -> bool:
    """Whether Lightning's launcher started this process: to it another exit code than 0 is a rank that died."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
