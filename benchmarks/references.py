"""The references side by side: peak memory and pairs a second of the same run, each in a process of its own.

    python benchmarks/references.py --tokenizer TOKENIZER_FOLDER --data PAIRS.jsonl.gz

The model is a Llama of about 100M random weights with the tokenizer's vocabulary. Cached runs twice: the first run
scores, the second finds the scores. Peak memory is that of the whole process; scoring is not counted in pairs/s.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dpo_lightning import DPOModule, PolicySpec, PreferenceDataModule
from dpo_lightning.losses import DPOLoss, SimPOLoss
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.references import AdaptersOff, Cached, FrozenCopy, Synced

RUNS = ("none", "frozen", "frozen_bf16", "adapters_off", "cached_first", "cached", "synced")


class Clock(Callback):
    """Seconds of every training step, and its loss."""

    def __init__(self):
        self.seconds, self.losses = [], []

    def on_train_batch_start(self, *args):
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, *args):
        self.losses.append(outputs["loss"].item())
        self.seconds.append(time.perf_counter() - self.start)


def make_model(tokenizer, folder):
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=640,
        intermediate_size=1728,
        num_hidden_layers=12,
        num_attention_heads=10,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(name, model, options):
    cache = str(Path(model) / "scores")
    references = {
        "frozen_bf16": FrozenCopy(dtype="bfloat16"),
        "adapters_off": AdaptersOff(),
        "synced": Synced(interval=4),
    }
    reference = Cached(dir=cache) if name.startswith("cached") else references.get(name, FrozenCopy())
    spec = PolicySpec(path=model, lora=LoRA() if name == "adapters_off" else None)
    seed_everything(0, verbose=False)
    module = DPOModule(spec, SimPOLoss() if name == "none" else DPOLoss(), reference, lr=1e-5)
    rows = options.batch_size * options.steps
    with open(options.rows) as file:
        pairs = [json.loads(line) for line in file][:rows]
    data = PreferenceDataModule(pairs, tokenizer=model, batch_size=options.batch_size, max_length=options.max_length)
    clock = Clock()
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    start = time.perf_counter()
    Trainer(
        max_epochs=1, accelerator="cpu", precision=options.precision, callbacks=[clock], inference_mode=False, **quiet
    ).fit(module, data)
    whole = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    step = statistics.median(clock.seconds[2:])
    print(json.dumps({"peak": peak, "rate": options.batch_size / step, "losses": clock.losses, "whole": whole}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run(*options.one, options)
        return
    from dpo_lightning.data.files import as_source

    with tempfile.TemporaryDirectory() as folder:
        make_model(AutoTokenizer.from_pretrained(options.tokenizer), folder)
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in as_source(options.data)))
        print("| reference | peak memory, GB | pairs/s | seconds in all | largest difference of losses from frozen |")
        print("|---|--:|--:|--:|--:|")
        frozen = None
        for name in RUNS:
            arguments = [sys.executable, __file__, *sys.argv[1:], "--rows", str(rows), "--one", name, folder]
            result = json.loads(
                subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            frozen = result["losses"] if name == "frozen" else frozen
            cells = [f"{result['peak']:.2f}", f"{result['rate']:.2f}", f"{result['whole']:.0f}"]
            same = name not in ("none", "adapters_off", "synced")  # these train something else
            apart = max(abs(a - b) for a, b in zip(result["losses"], frozen, strict=True)) if same else 0.0
            print(f"| {name} | {' | '.join(cells)} | {f'{apart:.1e}' if same else ''} |", flush=True)


if __name__ == "__main__":
    main()
