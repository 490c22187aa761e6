"""Small fits of a tiny model that tests of several folders share."""

import json
from pathlib import Path

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from dpo_lightning import DPOModule, PolicySpec, PreferenceDataModule
from dpo_lightning.losses import DPOLoss

WORDS = "the film was a joy and its end is slow but we all loved every minute of this bad old story".split()  # noqa: SIM905


def rows(count, seed=0, most=2):
    """Rankings of 2 to ``most`` responses, or pairs."""
    generator = torch.Generator().manual_seed(seed)

    def phrase(length):
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())

    def row(i):
        responses = [" " + phrase(4 + (i + k) % 3) for k in range(2 + i % (most - 1))]
        if most == 2:
            return {"prompt": phrase(4), "chosen": responses[0], "rejected": responses[1]}
        return {"prompt": phrase(4), "responses": responses}

    return [row(i) for i in range(count)]


def module(path, reference=None, lora=None, cls=DPOModule, **kwargs):
    spec = {name: kwargs.pop(name) for name in ("quantize", "dtype", "layout", "dropout", "compile") if name in kwargs}
    policy = PolicySpec(path=str(path), lora=lora, **spec)
    if cls is not DPOModule:
        return cls(policy, **{"lr": 1e-2, **kwargs})
    return cls(policy, **{"loss": DPOLoss(beta=0.5), "reference": reference, "lr": 1e-2, **kwargs})


def data(path, train=16, val=5, most=2, **kwargs):
    settings = {"batch_size": 4, "val_batch_size": 4, **kwargs}
    return PreferenceDataModule(rows(train, most=most), rows(val, 1, most), tokenizer=str(path), **settings)


def trainer(folder, **kwargs):
    defaults = {
        "accelerator": "cpu", "max_epochs": 8, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder,
        "log_every_n_steps": 1, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return Trainer(**{**defaults, **kwargs})


class Losses(Callback):
    """Losses of training batches, and what was logged last behind them."""

    def __init__(self):
        self.values, self.logged = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item() * trainer.accumulate_grad_batches)
        self.logged.append({name: value.item() for name, value in trainer.logged_metrics.items()})


def fit(folder, module, source, ckpt_path=None, seed=0, callbacks=(), **kwargs):
    """Losses of a fit, in the order of a fixed seed, six steps unless told otherwise."""
    losses = Losses()
    torch.manual_seed(seed)
    run = trainer(folder, **{"max_steps": 6, **kwargs}, callbacks=[losses, *callbacks])
    run.fit(module, source, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return losses


def every_step(folder):
    """Saves step=N.ckpt behind every optimizer step."""
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def saving(folder, *args, **kwargs):
    """The same as fit, with a checkpoint behind every step."""
    return fit(folder, *args, callbacks=[every_step(folder)], enable_checkpointing=True, **kwargs)


def weights(module):
    return torch.cat([parameter.detach().flatten().float() for parameter in module.policy.parameters()])


def trained(module):
    return {name: p.detach().clone() for name, p in module.policy.named_parameters() if p.requires_grad}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


PAIRS = [{"prompt": f"the film {i}", "chosen": f" was good {i}", "rejected": f" was bad {i}"} for i in range(12)]


def write_rows(path, some):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in some))


def write_workplace(folder, model):
    """A folder with pairs.jsonl and a config.yaml for the command line: 3 steps an epoch."""
    config = {
        "model": {
            "class_path": "DPOModule",
            "init_args": {"policy": {"path": str(model)}, "loss": {"class_path": "DPOLoss"}, "lr": 1e-3},
        },
        "data": {
            "class_path": "PreferenceDataModule",
            "init_args": {"train": "pairs.jsonl", "val_fraction": 0.25, "batch_size": 4},
        },
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 1},
    }
    write_rows(Path(folder) / "pairs.jsonl", PAIRS)
    (Path(folder) / "config.yaml").write_text(yaml.safe_dump(config))
