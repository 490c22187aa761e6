"""Small fits under any strategy: run as they are in one process, or on each rank of a pool."""

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from small_runs import rows
from torch.distributed.tensor import DTensor

from dpo_lightning import DPOModule, PolicySpec, PreferenceDataModule, SFTModule
from dpo_lightning.losses import BCOPairLoss, DPOLoss
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.references import AdaptersOff, Cached, FrozenCopy, Synced


class Followed(Callback):
    """Losses and gradient norms of the steps."""

    def __init__(self):
        self.losses, self.norms, self.rows = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows += [row for piece in batch.pieces for row in piece.row.tolist()]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch:
            self.losses.append(trainer.logged_metrics["train/loss"].item())
            self.norms.append(trainer.logged_metrics["train/grad_norm"].item())


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().float().numpy().copy()


def make_module(model, folder, reference, objective="dpo", **kwargs):
    lora = LoRA(rank=4) if reference == "AdaptersOff" else None
    spec = PolicySpec(path=model, lora=lora, **kwargs.pop("spec", {}))
    if objective == "sft":
        return SFTModule(spec, **kwargs)
    references = {
        "FrozenCopy": FrozenCopy(), "AdaptersOff": AdaptersOff(), "Cached": Cached(dir=f"{folder}/scores"),
        "Synced": Synced(interval=2),
    }  # fmt: skip
    loss = BCOPairLoss(beta=0.5) if objective == "bco" else DPOLoss(beta=0.5)
    return DPOModule(spec, loss, references[reference], **kwargs)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def train(
    model, folder, strategy, devices, reference="FrozenCopy", precision="32-true", objective="dpo", *, lr=None,
    train_rows=16, val_rows=5, data=None, ckpt_path=None, save=False, module=None, **trainer_args,
):  # fmt: skip
    """One fit: what it logged, and its weights at the end."""
    seed_everything(0)
    followed = Followed()
    callbacks = [followed]
    if save:
        callbacks.append(ModelCheckpoint(f"{folder}/ckpts", filename="{step}", every_n_train_steps=1, save_top_k=-1))
    choice = {"lr": lr} if lr else {"optimizer": sgd}
    module = make_module(model, folder, reference, objective, **choice, **(module or {}))
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, precision=precision, logger=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, num_sanity_val_steps=0,
        inference_mode=False, enable_checkpointing=save, callbacks=callbacks, default_root_dir=folder,
        **{"max_epochs": 1, **trainer_args},
    )  # fmt: skip
    settings = {"batch_size": 4, "val_batch_size": 4, **(data or {})}
    if objective == "sft":
        settings["num_responses"] = 1
    source = PreferenceDataModule(rows(train_rows), rows(val_rows, 1), tokenizer=model, **settings)
    trainer.fit(module, source, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    named = {name: p for name, p in module.policy.named_parameters() if p.requires_grad}
    logged = {name: value.item() for name, value in trainer.callback_metrics.items() if "per_second" not in name}
    return {
        "losses": followed.losses, "norms": followed.norms, "rows": followed.rows, "logged": logged,
        "weights": {name: whole(weight) for name, weight in named.items()}, "steps": trainer.global_step,
    }  # fmt: skip


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max(float(np.abs(first[name] - second[name]).max()) for name in first)
