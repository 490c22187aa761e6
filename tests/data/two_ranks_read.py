"""Run by test_datamodule.py: python two_ranks_read.py FOLDER, which starts a second process by itself."""

import json
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from makes import MAKES

from dpo_lightning.data import table
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.mixture import Mixture, Part

TOKENIZER = MAKES["llama"]().tokenizer
RANK = os.environ.get("LOCAL_RANK", "0")


def write(path, name, num):
    rows = [
        {"prompt": f"{name}{number}", "chosen": "good", "rejected": "good" if number % 13 == 12 else "bad"}
        for number in range(num)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def spied(folder):
    """Note down which process tokenises what."""
    whole = table._write

    def spy(place, source, *args):
        with open(folder / "made.txt", "a") as file:
            file.write(f"{Path(str(source)).name} {RANK}\n")
        whole(place, source, *args)

    table._write = spy


class Recorder(LightningModule):
    """Learns nothing and remembers the prompts that it was given."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), {"train": [], "val": []}

    def note(self, split, batch):
        prompts = [batch.input_ids[start:].tolist() for start, _, begin, stop in batch.spans.tolist() if begin == stop]
        texts = [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in prompts]
        self.seen[split].append([text.partition("good")[0] for text in texts])

    def training_step(self, batch, batch_idx):
        self.note("train", batch)
        return self.weight

    def validation_step(self, batch, batch_idx):
        self.note("val", batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(module, devices, **kwargs):
    seed_everything(0, verbose=False)
    recorder = Recorder()
    quiet = {
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
    }
    strategy = "ddp" if devices > 1 else "auto"
    trainer = Trainer(accelerator="cpu", devices=devices, strategy=strategy, num_sanity_val_steps=0, **(quiet | kwargs))
    trainer.fit(recorder, datamodule=module)
    return recorder.seen


def main(folder):
    sources = {name: folder / f"{name}.jsonl" for name in ("a", "b", "val", "stream")}
    if RANK == "0":
        for name, num in {"a": 13, "b": 9, "val": 3, "stream": 20}.items():
            write(sources[name], name[0], num)
    spied(folder)
    parts = [Part(source=str(sources["a"]), weight=1), Part(source=str(sources["b"]), weight=3)]
    module = PreferenceDataModule(
        Mixture(parts=parts), str(sources["val"]), tokenizer=TOKENIZER, batch_size=4, val_batch_size=4, num_proc=2
    )
    seen = fit(module, 2, max_epochs=2, limit_val_batches=1, check_val_every_n_epoch=2)
    result = {
        **seen,
        "examples": {split: list(examples) for split, examples in module.examples.items()},
        "origins": [report.origin.partition(" in 0")[0].partition(" in 1")[0] for report in module.reports],
    }
    settings = {"tokenizer": TOKENIZER, "batch_size": 4, "stream_buffer": 5}
    module = PreferenceDataModule(str(sources["stream"]), **settings)
    result["stream"] = fit(module, 2, max_steps=5, logger=CSVLogger(folder), log_every_n_steps=1)["train"]
    result["report"] = module.reports[0].to_json()
    (folder / f"rank_{RANK}.json").write_text(json.dumps(result))
    if RANK == "0":
        torch.distributed.destroy_process_group()
        alone = fit(PreferenceDataModule(str(sources["stream"]), **settings), 1, max_steps=5)["train"]
        (folder / "alone.json").write_text(json.dumps([sorted(batch) for batch in alone]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
