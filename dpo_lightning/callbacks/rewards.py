"""What predict finds, as a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dpo_lightning.batch import Batch
from dpo_lightning.metrics import pair_accuracy, wilson_interval
from dpo_lightning.modules.scored import ScoredResponses
from dpo_lightning.ranks import data_place


class Scored(NamedTuple):
    """An example.

    Attributes:
        row: Number of its row in the file.
        rewards: Of its responses, in the order of the file's preferences, best first.
        tokens: Of each response.
        response: Number of its one response in the row, where those of a row are in no order; else 0.
    """

    row: int
    rewards: list[float]
    tokens: list[int]
    response: int = 0

    def line(self) -> str:
        """It as a line of the file."""
        place = {"row": self.row, "response": self.response} if self.response else {"row": self.row}
        return json.dumps({**place, "rewards": self.rewards, "tokens": self.tokens}) + "\n"


class WriteRewards(Callback):
    """Write the rewards that predict finds, one line of JSON a row, and print how far they agree with the file's order.

    A line holds the number of the row, and rewards and numbers of tokens of its responses, best first as the file's
    labels, scores or columns say. Samples, which are in no order, have a line each, with the number of the response in
    its row, and agree with nothing. The agreement is the share of the pairs of a row that rewards order alike, on the
    mean over rows, ties counting one half, with Wilson's interval.

    Args:
        path: The file; rewards.jsonl in the run's log folder unless given.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.written: Path | None = None
        self._scored: list[Scored] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._scored, self.written = [], None

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take note of a batch; what a module gives that is no reward, such as that of SFT, is not written."""
        if isinstance(outputs, ScoredResponses):
            self._scored += map(_present, *(part.tolist() for part in outputs), _responses(batch))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file on the first rank, all rows in order."""
        folder = trainer.log_dir or trainer.default_root_dir  # asked on all ranks, since it is broadcast
        scored = sorted(_of_all_ranks(trainer, self._scored), key=lambda one: (one.row, one.response))
        if not trainer.is_global_zero or not scored:
            return
        self.written = Path(self.path or Path(folder) / "rewards.jsonl")
        self.written.parent.mkdir(parents=True, exist_ok=True)
        self.written.write_text("".join(one.line() for one in scored), encoding="utf-8")
        print(f"\nRewards of {len(scored):,} examples: {self.written}")
        if (words := agreement(scored)) is not None:
            print(words)


def agreement(scored: Sequence[Scored]) -> str | None:
    """How far rewards agree with the order of the responses, in words; None where nothing is to be ordered."""
    pairs = [torch.tensor([one.rewards]) for one in scored if len(one.rewards) > 1]
    if not pairs:
        return None
    right = sum(pair_accuracy(rewards, torch.ones_like(rewards, dtype=torch.bool)).item() for rewards in pairs)
    low, high = wilson_interval(right / len(pairs), len(pairs))
    return (
        f"Agreement with the file: {right / len(pairs):.1%} of the pairs of a row are ordered alike (95 % interval "
        f"{low:.1%} to {high:.1%}, {len(pairs):,} rows, a tie counts one half)."
    )


def _present(row: int, rewards: list[float], length: list[int], response: int) -> Scored:
    count = sum(tokens > 0 for tokens in length)  # absent responses stand last
    return Scored(row, rewards[:count], length[:count], response)


def _responses(batch: Batch) -> list[int]:
    """Number of each example's one response in its row, or 0."""
    known = [torch.zeros_like(piece.row) if piece.response is None else piece.response for piece in batch.pieces]
    numbers: list[int] = batch.joined(known).tolist()
    return numbers


def _of_all_ranks(trainer: Trainer, scored: list[Scored]) -> list[Scored]:
    if trainer.world_size == 1:
        return scored
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, scored)
    alike = trainer.world_size // data_place(trainer).ranks  # ranks, one behind the other, that have the same examples
    return [one for part in gathered[::alike] for one in part]
