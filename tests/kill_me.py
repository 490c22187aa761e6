"""Runs of the command line to be killed by test_kill.py, in processes forked from one that has imported all of it."""

import io
import os
import sys
import time

import torch
from lightning.pytorch import Callback

import dpo_lightning.cli
from dpo_lightning.callbacks import MemoryPlan
from dpo_lightning.checkpoints import CheckpointFiles

JOURNAL = "journal.txt"


def note(*words):
    """A line that is on record when this process is killed the moment after."""
    with open(JOURNAL, "a") as journal:
        print(*words, file=journal)


class Journal(Callback):
    """Writes down from which step a run goes on, and every step that it makes."""

    def on_train_start(self, trainer, pl_module):
        note("begins", trainer.global_step)

    def on_train_batch_end(self, trainer, *args):
        if trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches:
            note("step", trainer.global_step)

    def on_fit_end(self, trainer, pl_module):
        note("ends", trainer.global_step)


class SlowFiles(CheckpointFiles):
    """Writes checkpoints down in the journal, and for SLOW seconds from one half of a file to the other."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        note("writes", checkpoint["global_step"])
        super().save_checkpoint(checkpoint, path, storage_options)
        note("wrote", checkpoint["global_step"])


def save_slowly(checkpoint, file, save=torch.save):
    whole = io.BytesIO()
    save(checkpoint, whole)
    content = whole.getvalue()
    file.write(content[: len(content) // 2])
    file.flush()
    time.sleep(float(os.environ.get("SLOW", 0)))
    file.write(content[len(content) // 2 :])


torch.save = save_slowly
MemoryPlan.setup = lambda *args, **kwargs: None  # takes as long as all else before the first step


def main(folder, arguments, slow):
    """Run a command in a folder, its output in a file there."""
    os.chdir(folder)
    os.environ["SLOW"] = str(slow)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["dpo-lightning", *arguments]
    dpo_lightning.cli.main()
