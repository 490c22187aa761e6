"""Callbacks for runs in processes of their own: notices and deaths in the middle of a step."""

import os
import signal
import subprocess
from pathlib import Path

import torch
from lightning.pytorch import Callback


class Notice(Callback):
    """A signal while an optimizer step runs, to one rank, or from outside to the whole group of processes."""

    def __init__(self, step: int, name: str = "SIGTERM", rank: int = 0, group: bool = False):
        self.step, self.number, self.rank, self.group = step, getattr(signal, name), rank, group

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step != self.step - 1 or trainer.global_rank != self.rank:
            return
        if self.group:
            command = ["sh", "-c", f"kill -{int(self.number)} -{os.getpgid(0)}"]
            subprocess.run(command, start_new_session=True, check=True)
        else:
            os.kill(os.getpid(), self.number)


class Result(Callback):
    """Writes the trained weights and the last step."""

    def __init__(self, path: str):
        self.path = Path(path)

    def on_fit_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            weights = {name: value.detach().cpu() for name, value in pl_module.policy.named_parameters()}
            torch.save({"step": trainer.global_step, "weights": weights}, self.path)
