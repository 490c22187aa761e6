"""Stream against padded rows: the same DPO run in both layouts, in one process, alternating.

    python benchmarks/layouts.py --model MODEL_FOLDER --data PAIRS.jsonl.gz

Both layouts train from the same weights on the same batches. Reports the largest difference of their losses, and
pairs a second: medians over repeats of the same batches, each layout after a warm-up.
"""

import argparse
import platform
import statistics
import time

import torch
from lightning.pytorch import seed_everything

from dpo_lightning import DPOModule, PolicySpec, PreferenceDataModule
from dpo_lightning.losses import DPOLoss


class Run:
    """A policy and its reference in one layout, with their optimizer."""

    def __init__(self, model, layout, lr):
        self.module = DPOModule(PolicySpec(path=model, layout=layout), DPOLoss(beta=0.1), lr=lr)
        self.module.configure_model()
        self.optimizer = torch.optim.AdamW(self.module.policy.parameters(), lr=lr, weight_decay=0.0)
        self.losses, self.seconds = [], []

    def step(self, batch):
        start = time.perf_counter()
        loss = self.module.loss(self.module(batch), self.module.reference_logps(batch)).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-4)
    options = parser.parse_args()
    seed_everything(0, verbose=False)
    data = PreferenceDataModule(
        options.data, tokenizer=options.model, batch_size=options.batch_size, max_length=options.max_length
    )
    data.setup("fit")
    batches = [batch for _, batch in zip(range(options.steps), data.train_dataloader(), strict=False)]
    runs = {layout: Run(options.model, layout, options.lr) for layout in ("stream", "rows")}
    for batch in batches:
        for run in runs.values():
            run.step(batch)
    warm = 5
    ratio = [rows / stream for stream, rows in zip(*(run.seconds[warm:] for run in runs.values()), strict=True)]
    slots = sum(batch.max_key * len(batch.spans) for batch in batches) / sum(len(batch.input_ids) for batch in batches)
    difference = max(abs(a - b) for a, b in zip(*(run.losses[:20] for run in runs.values()), strict=True))
    machine = platform.processor() or platform.machine()
    print(f"\n{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for layout, run in runs.items():
        print(f"{layout:7} {options.batch_size / statistics.median(run.seconds[warm:]):8.1f} pairs/s (median of steps)")
    print(f"stream / rows: {statistics.median(ratio):.2f} (median of ratios step by step)")
    print(f"token slots of padded rows over tokens of the stream: {slots:.2f}")
    print(f"largest difference of losses over the first 20 steps: {difference:.1e}")


if __name__ == "__main__":
    main()
