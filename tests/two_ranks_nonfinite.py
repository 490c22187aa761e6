"""Run by modules/test_guard.py: two ranks, of which one meets a loss that is not finite. MODEL FOLDER"""

import sys
from pathlib import Path

import small_runs
import torch
from lightning.pytorch import Callback

from dpo_lightning import DPOModule
from dpo_lightning.modules.guard import NonFinite


class FaultyOnOneRank(DPOModule):
    def summed_loss(self, stage, piece):
        loss = super().summed_loss(stage, piece)
        return loss * torch.nan if self.trainer.global_step == 1 and self.global_rank == 1 else loss


class Weights(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = small_runs.trained(pl_module)


def main(model, folder):
    weights = Weights()
    trainer = small_runs.trainer(folder, devices=2, strategy="ddp", callbacks=[weights])
    module = FaultyOnOneRank(small_runs.PolicySpec(path=model), small_runs.DPOLoss(), lr=1e-2)
    try:
        trainer.fit(module, small_runs.data(model, batch_size=2))
    except NonFinite as error:
        found = {
            "step": error.step,
            "message": str(error),
            "rows": error.rows,
            "as_before": small_runs.same(small_runs.trained(module), weights.before),
        }
        torch.save(found, Path(folder) / f"found-rank={trainer.global_rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
