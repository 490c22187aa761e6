"""The plan of memory against what training takes, on the CPU: each case in a process of its own, three steps each.

    python benchmarks/memory.py

Models are Llamas of random weights. Measured is the peak of the resident set, less what imports take. With
``--tensors_alone`` every large tensor is a mapping of its own, so that nothing lies between them, and the plan is taken
without that part.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_lightning import DPOModule, PolicySpec
from dpo_lightning.batch import lay_out
from dpo_lightning.callbacks.memory_plan import MemoryPlan
from dpo_lightning.losses import DPOLoss
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.modules import base
from dpo_lightning.references import AdaptersOff, Cached, FrozenCopy, Synced

MODELS = {
    "28M": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "intermediate_size": 1408,
        "vocab_size": 6400,
        "tie_word_embeddings": True,
    },
    "135M": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}
LENGTHS = {"125+48": (125, 48), "512+256": (512, 256)}
REFERENCES = ("FrozenCopy", "AdaptersOff", "Cached", "Synced")
PRECISIONS = ("32-true", "bf16-mixed")
PAIRS, STEPS = 8, 3
ALONE = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


class Pairs(LightningDataModule):
    """Random tokens, every pair as long as every other."""

    def __init__(self, prompt, response):
        super().__init__()
        self.batches = [self.batch(step, prompt, response) for step in range(STEPS)]

    def batch(self, step, prompt, response):
        examples = [(self.tokens(prompt), [self.tokens(response), self.tokens(response)]) for _ in range(PAIRS)]
        return lay_out(examples)._replace(digest=torch.arange(PAIRS) + step * PAIRS)

    def tokens(self, count):
        return torch.randint(6400, (count,)).tolist()

    def heaviest(self):
        return self.batches[0]

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None, collate_fn=lambda batch: batch)

    def digests(self):
        return np.arange(PAIRS * STEPS)

    def unscored(self, known, rank, world_size):
        yield from self.batches


def resident():
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Imported(Callback):
    """What is resident when all is imported and planned and no weight is loaded yet."""

    def setup(self, *args, **kwargs):
        self.bytes = resident()


def run(folder, lengths, reference, precision):
    tensors_alone = ALONE.items() <= os.environ.items()
    if tensors_alone:
        base.keep_freed_memory = bool
    seed_everything(0, verbose=False)
    references = {"FrozenCopy": FrozenCopy(), "AdaptersOff": AdaptersOff(), "Synced": Synced(interval=2)}
    spec = PolicySpec(path=folder, lora=LoRA() if reference == "AdaptersOff" else None)
    with tempfile.TemporaryDirectory() as cache:
        module = DPOModule(spec, DPOLoss(), references.get(reference, Cached(dir=cache)))
        planned, imported = MemoryPlan(refuse=False), Imported()
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        Trainer(
            max_epochs=1,
            accelerator="cpu",
            precision=precision,
            callbacks=[planned, imported],
            enable_checkpointing=False,
            inference_mode=False,
            **quiet,
        ).fit(module, Pairs(*LENGTHS[lengths]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    plan = planned.plan.peak - (planned.plan.between if tensors_alone else 0)
    print(json.dumps({"plan": plan, "measured": peak - imported.bytes}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--lengths", nargs="+", default=list(LENGTHS))
    parser.add_argument("--references", nargs="+", default=list(REFERENCES))
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS))
    parser.add_argument("--tensors_alone", action="store_true")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run(*options.one)
        return
    print("| model | prompt + response | reference | precision | plan, GB | measured, GB | plan / measured |")
    print("|---|---|---|---|--:|--:|--:|")
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            LlamaForCausalLM(LlamaConfig(**MODELS[name])).save_pretrained(folder)
            for case in itertools.product(options.lengths, options.references, options.precisions):
                command = [sys.executable, __file__, "--one", folder, *case]
                environment = os.environ | (ALONE if options.tensors_alone else {})
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                result = json.loads(done.stdout.splitlines()[-1])
                sizes = [f"{result[key] / 1e9:.2f}" for key in ("plan", "measured")]
                ratio = result["plan"] / result["measured"]
                print(f"| {' | '.join([name, *case, *sizes])} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
