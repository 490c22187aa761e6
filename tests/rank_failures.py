"""What test_rank_failures.py has ranks do: be stopped, meet numbers that are not finite, run out of room, be killed."""

import os
import resource
import time
from pathlib import Path

import strategy_runs
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from notices import Notice

from dpo_lightning import DPOModule
from dpo_lightning.callbacks import GracefulStop
from dpo_lightning.checkpoints import folders, last_checkpoint
from dpo_lightning.checkpoints.files import UNFINISHED
from dpo_lightning.errors import UsageError
from dpo_lightning.modules.nonfinite import NonFinite

JOURNAL = "journal.txt"
RUN = {
    "train_rows": 18, "max_epochs": 2, "lr": 1e-2, "reference": "Synced", "limit_val_batches": 0,
    "module": {"schedule": "linear"},
}  # fmt: skip


def ended(kind, *args, **kwargs):
    """How a fit ends: its outcome, or the error."""
    try:
        return strategy_runs.train(*args, **{**RUN, **kwargs})
    except kind as error:
        return error.code if isinstance(error, SystemExit) else str(error)


def stopped(model, folder, step, rank):
    """Exit code of a fit in which one rank is given notice."""
    callbacks = [GracefulStop(), Notice(step, rank=rank), ModelCheckpoint(f"{folder}/ckpts")]
    return ended(SystemExit, model, folder, "fsdp2", 2, callbacks=callbacks, enable_checkpointing=True)


class FaultyOnOneRank(DPOModule):
    """Has a loss on rank 1 that is not finite."""

    def summed_loss(self, stage, piece):
        loss = super().summed_loss(stage, piece)
        return loss * torch.nan if self.trainer.global_step == 2 and self.global_rank == 1 else loss


class Weights(Callback):
    """Weights before each step, and behind the last one."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = self._of(pl_module)

    def on_exception(self, trainer, pl_module, exception):
        self.after = self._of(pl_module)

    def _of(self, module):
        return {name: strategy_runs.whole(weight) for name, weight in module.policy.named_parameters()}


def nonfinite(model, folder, strategy):
    """What is said, of which rows, and whether weights are as they were."""
    weights, module = Weights(), {"cls": FaultyOnOneRank, **RUN["module"]}
    run = {**RUN, "module": module, "callbacks": [weights], "save": 1}
    try:
        strategy_runs.train(model, folder, strategy, 2, **run)
    except NonFinite as error:
        return str(error), error.rows, strategy_runs.same(weights.before, weights.after)


class NoRoom(Callback):
    """From a step on one rank may write no file of any size; what it says goes elsewhere."""

    def __init__(self, step, rank):
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


def without_room(model, folder, rank):
    """What is said where one rank's disk is full at the third checkpoint."""
    nowhere, outputs = os.open(os.devnull, os.O_WRONLY), [os.dup(number) for number in (1, 2)]
    for number in (1, 2):
        os.dup2(nowhere, number)
    try:
        return ended(UsageError, model, folder, "fsdp2", 2, callbacks=[NoRoom(2, rank)], save=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        for number, output in zip((1, 2), outputs, strict=True):
            os.dup2(output, number)


def rotated(model, folder, **kwargs):
    """A fit that keeps its best checkpoint and its last one."""
    saver = ModelCheckpoint(
        f"{folder}/ckpts", filename="{step}", every_n_train_steps=2, save_top_k=1, save_last="link", **kwargs
    )
    return ended(UsageError, model, folder, "fsdp2", 2, callbacks=[saver], enable_checkpointing=True)["steps"]


class Journal(Callback):
    """Writes down, on the first rank, what happens."""

    def on_train_start(self, trainer, pl_module):
        note(trainer, "begins")

    def on_train_batch_end(self, trainer, *args):
        note(trainer, "step")

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        note(trainer, "writes")


def note(trainer, word):
    if trainer.is_global_zero:
        with (Path(trainer.default_root_dir) / JOURNAL).open("a") as journal:
            print(word, trainer.global_step, file=journal)


def goes_on(model, folder, slow=0.0):
    """A fit from the last checkpoint, if there is one, that writes over its only one, and for some seconds."""
    replace, rest = os.replace, folders._write_rest

    def replace_slowly(source, target):
        time.sleep(slow / 2 if str(source).endswith(UNFINISHED) else 0.0)
        replace(source, target)

    def write_slowly(*args):
        time.sleep(slow / 2)
        rest(*args)

    os.makedirs(folder, exist_ok=True)
    path = last_checkpoint(f"{folder}/ckpts")
    saver = ModelCheckpoint(f"{folder}/ckpts", every_n_train_steps=2, save_top_k=0, save_last=True)
    os.replace, folders._write_rest = replace_slowly, write_slowly
    try:
        return ended(
            UsageError, model, folder, "fsdp2", 2, ckpt_path=None if path is None else str(path), max_epochs=8,
            callbacks=[Journal(), saver], enable_checkpointing=True,
        )  # fmt: skip
    finally:
        os.replace, folders._write_rest = replace, rest
