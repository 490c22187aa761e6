"""Run by test_distributed.py in processes of its own: python two_ranks.py MODEL FOLDER DEVICES OBJECTIVE ..."""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from dpo_lightning import DPOModule, PolicySpec, PreferenceDataModule, SFTModule
from dpo_lightning.losses import BCOPairLoss, DPOLoss
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.references import AdaptersOff, Cached, Synced, fingerprint


class Ranks(Callback):
    """What only a running strategy knows."""

    def reference(self, module):
        return fingerprint(module.reference_policy) if isinstance(module, DPOModule) else ""

    def __init__(self):
        self.pieces, self.reductions = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.pieces.append(len(batch.pieces))

    def on_train_start(self, trainer, pl_module):
        self.before = self.reference(pl_module)
        wrapped = trainer.strategy.model
        ignored = getattr(wrapped, "parameters_to_ignore", set())
        names = [name for name, parameter in pl_module.named_parameters() if name not in ignored]
        self.buckets = len([name for name in names if not name.startswith("reference_policy")])
        if trainer.world_size > 1:
            wrapped.register_comm_hook(None, self.reduced)
            assert all(name in ignored for name, _ in pl_module.named_parameters() if name.startswith("reference_"))

    def reduced(self, state, bucket):
        self.reductions.append(bucket.is_last())
        return default_hooks.allreduce_hook(state, bucket)


def objective(name, model, folder, **optimization):
    """A module by the name of its objective."""
    spec = PolicySpec(path=model, lora=LoRA(rank=2) if name.startswith("lora") else None)
    if "sft" in name:
        return SFTModule(spec, **optimization)
    references = {"lora": AdaptersOff(), "cached": Cached(dir=f"{folder}/cache"), "synced": Synced(interval=2)}
    loss = BCOPairLoss(beta=0.5) if name == "bco" else DPOLoss()
    return DPOModule(spec, loss, references.get(name), **optimization)


def main(model, folder, devices, name):
    seed_everything(0)
    rows = [
        {"prompt": "the film", "chosen": " was good" * (1 + i % 4) + f" {i}", "rejected": f" bad {i}"}
        for i in range(31)
    ]

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=1e-1)

    # One process runs its batches whole, two run them in pieces.
    pieces = "pieces" in name and devices > 1
    module = objective(name, model, folder, optimizer=sgd)
    ranks = Ranks()
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=1, logger=False,
        accumulate_grad_batches=2 if name == "pieces_accumulated" else 1, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, callbacks=[ranks],
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(
        module,
        PreferenceDataModule(
            rows[:24],
            rows[24:],
            tokenizer=model,
            batch_size=4,
            val_batch_size=4,
            num_responses=1 if "sft" in name else None,
            micro_batch_tokens=35 if pieces else None,
        ),
    )
    logged = {name: value.item() for name, value in trainer.callback_metrics.items() if "per_second" not in name}
    if trainer.is_global_zero:
        torch.save({name: value.cpu() for name, value in module.state_dict().items()}, Path(folder) / "weights.pt")
        result = {
            "logged": logged,
            "reference_unchanged": ranks.reference(module) == ranks.before,
            "gradient_buckets": ranks.buckets,
            "trainable": sum(parameter.requires_grad for parameter in module.parameters()),
            "scored": [pq.read_metadata(path).num_rows for path in Path(folder).rglob("*.parquet")],
            "pieces": ranks.pieces,
            "reductions": sum(ranks.reductions),
            "sums": getattr(module, "_loss_sums", torch.zeros(0)).tolist(),
        }
        (Path(folder) / "metrics.json").write_text(json.dumps(result))


if __name__ == "__main__":
    for name in sys.argv[4:]:
        place = Path(sys.argv[2]) / name
        place.mkdir(exist_ok=True)
        main(sys.argv[1], place, int(sys.argv[3]), name)
