"""Small fits under any strategy: run as they are in one process, or on each rank of a pool."""

import logging
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from small_runs import rows
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dpo_lightning import DPOModule, PolicySpec, PreferenceDataModule, RewardModule, SFTModule
from dpo_lightning.data.mixture import Mixture, Part
from dpo_lightning.data.sources import Rows
from dpo_lightning.errors import UsageError
from dpo_lightning.losses import BCOPairLoss, DPOLoss, TDPO2Loss
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.references import AdaptersOff, Cached, FrozenCopy, Synced, fingerprint


class Followed(Callback):
    """What the steps did: rows, pieces, losses and gradient norms, and what only a running strategy knows."""

    def __init__(self):
        self.losses, self.norms, self.rows, self.val_rows, self.pieces = [], [], [], [], []
        self.reductions, self.ignored, self.reference = 0, [], ""

    def on_train_start(self, trainer, pl_module):
        self.reference = _reference(pl_module)
        wrapped = trainer.strategy.model
        if isinstance(wrapped, DistributedDataParallel):
            self.ignored = sorted(wrapped.parameters_to_ignore)
            wrapped.register_comm_hook(None, self._reduced)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.pieces.append(len(batch.pieces))
        self.rows += _rows(batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        window_ends = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if window_ends and trainer.global_step % trainer.log_every_n_steps == 0:
            self.losses.append(trainer.logged_metrics["train/loss"].item())
            self.norms.append(trainer.logged_metrics["train/grad_norm"].item())

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.val_rows += _rows(batch)

    def _reduced(self, state, bucket):
        self.reductions += bucket.is_last()
        return default_hooks.allreduce_hook(state, bucket)


def _rows(batch):
    return [row for piece in batch.pieces for row in piece.row.tolist()]


def _reference(module):
    reference = getattr(module, "reference_policy", None)
    return "" if reference is None else fingerprint(reference)


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().float().numpy().copy()


LOSSES = {"dpo": DPOLoss(beta=0.5), "bco": BCOPairLoss(beta=0.5), "tdpo": TDPO2Loss(beta=0.5)}


def make_module(model, folder, reference, objective="dpo", cls=DPOModule, lora=None, **kwargs):
    """A module by the names of its reference and its loss; `AdaptersOff` brings adapters."""
    if reference == "AdaptersOff":
        lora = lora or LoRA(rank=4)
    spec = PolicySpec(path=model, lora=lora, **kwargs.pop("spec", {}))
    if objective in ("sft", "reward"):
        return {"sft": SFTModule, "reward": RewardModule}[objective](spec, **kwargs)
    references = {
        "FrozenCopy": FrozenCopy(), "AdaptersOff": AdaptersOff(), "Cached": Cached(dir=f"{folder}/scores"),
        "Synced": Synced(alpha=0.5, interval=2),
    }  # fmt: skip
    return cls(spec, LOSSES[objective], references[reference], **kwargs)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def with_momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def mixture():
    parts = [Part(source=Rows(rows(12)), weight=2.0), Part(source=Rows(rows(9, seed=2)), weight=1.0)]
    return Mixture(parts=parts)


def train(
    model, folder, strategy, devices, reference="FrozenCopy", precision="32-true", objective="dpo", *, lr=None,
    train_rows=16, val_rows=5, data=None, ckpt_path=None, save=0, module=None, callbacks=(), seed=0, **trainer_args,
):  # fmt: skip
    """One fit: what it logged, and its weights at the end.

    Args:
        model: Folder of the model.
        folder: Where scores and, in ``ckpts``, checkpoints are kept.
        strategy: As in the Trainer.
        devices: Ranks.
        reference: Name of the reference.
        precision: As in the Trainer.
        objective: Name of the loss.
        lr: That of AdamW; otherwise plain SGD, which does not amplify rounding.
        train_rows: Number of training rows, or what has them.
        val_rows: Number of validation rows.
        data: Arguments of the data module.
        ckpt_path: Where to go on from.
        save: Optimizer steps between checkpoints, as step=N.ckpt.
        module: Arguments of make_module.
        callbacks: More of them.
        seed: Of what has no seed of its own.
        **trainer_args: Arguments of the Trainer.
    """
    seed_everything(seed, verbose=False)
    followed = Followed()
    savers = [ModelCheckpoint(f"{folder}/ckpts", filename="{step}", every_n_train_steps=save, save_top_k=-1)]
    module = {**({"lr": lr} if lr else {"optimizer": sgd}), **(module or {})}
    made = make_module(model, folder, reference, objective, **module)
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, precision=precision, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
        callbacks=[followed, *callbacks, *(savers if save else [])],
        **{"max_epochs": 1, "logger": False, "log_every_n_steps": 1, "enable_checkpointing": bool(save)}
        | trainer_args,
    )  # fmt: skip
    settings = {"batch_size": 4, "val_batch_size": 4, **(data or {})}
    if objective == "sft":
        settings["num_responses"] = 1
    examples = rows(train_rows) if isinstance(train_rows, int) else train_rows
    source = PreferenceDataModule(examples, rows(val_rows, 1), tokenizer=model, **settings)
    trainer.fit(made, source, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    named = {name: p for name, p in made.policy.named_parameters() if p.requires_grad}
    logged = {name: value.item() for name, value in trainer.callback_metrics.items() if "per_second" not in name}
    return {
        "losses": followed.losses, "norms": followed.norms, "rows": followed.rows, "val_rows": followed.val_rows,
        "logged": logged, "weights": {name: whole(weight) for name, weight in named.items()},
        "steps": trainer.global_step, "inference_mode": trainer.validate_loop.inference_mode,
        "pieces": followed.pieces, "reductions": followed.reductions,
        "ignored": followed.ignored, "reference": (followed.reference, _reference(made)),
        "sums": getattr(made, "_loss_sums", torch.zeros(0)).tolist(), "offset": getattr(made, "offset", 0.0),
    }  # fmt: skip


def from_step(step, model, folder, *args, ckpts=None, **kwargs):
    """The same, going on from the checkpoint of a step that another fit has left in a folder, with another seed."""
    path = Path(ckpts or folder) / "ckpts" / f"step={step}.ckpt"
    return train(model, folder, *args, ckpt_path=str(path), seed=1, **kwargs)


def largest_difference(first, second):
    """Of all weights of two fits, or of all that they logged."""
    assert first.keys() == second.keys()
    return max(float(np.abs(first[name] - second[name]).max()) for name in first)


def same(first, second):
    """Whether the weights of two fits are equal bit for bit."""
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def scored(folder):
    """Rows of the files of a cached reference's scores."""
    return [pq.read_metadata(path).num_rows for path in Path(folder).rglob("*.parquet")]


def warned(*args, **kwargs):
    """What this package warns of in a fit."""
    records, log = [], logging.getLogger("dpo_lightning")
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    log.addHandler(handler)
    try:
        train(*args, **kwargs)
    finally:
        log.removeHandler(handler)
    return "\n".join(records)


def refused(*args, **kwargs):
    """What a fit says that the user can mend."""
    try:
        train(*args, **kwargs)
    except UsageError as error:
        return str(error)
    return None
