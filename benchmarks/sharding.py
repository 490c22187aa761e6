"""What each rank holds under fsdp2: the peak of its memory with one rank and with several, on the CPU.

    python benchmarks/sharding.py --ranks 1 2

A Llama of random weights is trained for three steps of 8 pairs, which the ranks share, against a frozen copy by fused
AdamW; measured is the peak of the resident set of every rank, less what imports take.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile

import memory
from lightning.pytorch import Trainer, seed_everything
from memory import LENGTHS, MODELS, Imported, Pairs
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_lightning import DPOModule, PolicySpec
from dpo_lightning.losses import DPOLoss
from dpo_lightning.references import FrozenCopy


def run(folder, lengths, precision):
    """Three steps on this rank, with its share of the pairs; prints what it took at its peak."""
    memory.PAIRS //= int(os.environ["WORLD_SIZE"])
    seed_everything(0, verbose=False)
    module, imported = DPOModule(PolicySpec(path=folder), DPOLoss(), FrozenCopy()), Imported()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy="fsdp2",
        precision=precision,
        callbacks=[imported],
        enable_checkpointing=False,
        inference_mode=False,
        **quiet,
    ).fit(module, Pairs(*LENGTHS[lengths]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"rank": int(os.environ["RANK"]), "bytes": peak - imported.bytes}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="135M")
    parser.add_argument("--lengths", choices=LENGTHS, default="125+48")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run(options.one, options.lengths, options.precision)
        return
    print("| ranks | peak of each, GB |\n|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**MODELS[options.model])).save_pretrained(folder)
        for ranks in options.ranks:
            chosen = ["--lengths", options.lengths, "--precision", options.precision, "--one", folder]
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
            done = subprocess.run([sys.executable, *launcher, __file__, *chosen], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"rank"')]
            peaks = [line["bytes"] for line in sorted(lines, key=lambda line: line["rank"])]
            print(f"| {ranks} | {', '.join(f'{peak / 1e9:.2f}' for peak in peaks)} |", flush=True)


if __name__ == "__main__":
    main()
