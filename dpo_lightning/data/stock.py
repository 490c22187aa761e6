"""What a data module has read so far, split by split, and what it said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from dpo_lightning.data.mixture import Part, shares
from dpo_lightning.data.reading import begin
from dpo_lightning.data.report import DataReport
from dpo_lightning.data.splits import held_out, shared_prompts
from dpo_lightning.data.table import Examples, TokenTable, tokenize
from dpo_lightning.data.tokenize import Tokenization
from dpo_lightning.errors import UsageError


class Stock:
    """Examples of each split, read when they are asked for.

    Args:
        sources: The parts of each split.
        tokenization: How examples become tokens.
        batch_size: Examples in a batch, for the cost of padding.
        val_fraction: Share of the training examples that are held out for validation.
        streams: Whether the training rows are read as they are needed.
        strict: Whether to stop where an example cannot be used.
        cache: Whether tokens are kept on disk.
        num_proc: Processes that tokenise.

    Attributes:
        examples: What was read, by split; of a stream nothing.
        sizes: Examples of each source of a split, and how many of them an epoch takes; none of a stream.
        reports: What became of the rows of each source, streams first.
        unordered: Sources of each split whose responses are in no order.
    """

    def __init__(
        self,
        sources: dict[str, list[Part]],
        tokenization: Tokenization,
        batch_size: int,
        *,
        val_fraction: float,
        streams: bool,
        strict: bool,
        cache: bool,
        num_proc: int | None,
    ) -> None:
        self.sources, self.tokenization, self.batch_size = sources, tokenization, batch_size
        self.val_fraction, self.strict, self.cache, self.num_proc = val_fraction, strict, cache, num_proc
        self.stream = "train" if streams else None
        self.examples: dict[str, Examples] = {}
        self.sizes: dict[str, list[tuple[int, int]]] = {}
        self.reports: list[DataReport] = []
        self.unordered: dict[str, list[str]] = {}
        self._prepared: dict[tuple[str, int], TokenTable] = {}

    def prepare(self, split: str) -> None:
        """Tokenise a split, unless it was taken up, for :meth:`take_up` in this process and others to find."""
        if split != self.stream and split not in self.sizes:
            for place, part in enumerate(self.sources[split]):
                self._prepared[split, place] = self._tokenize(part)

    def take_up(self, splits: Sequence[str]) -> bool:
        """Read some splits that were not read before, and report each; whether there were any."""
        needed = [split for split in splits if split not in self.sizes]
        for split in needed:
            if split == self.stream:
                self._begin_stream()
            else:
                self._read(split)
            if split == "train" and self.val_fraction:
                self._hold_out()
        if {"train", "val"} <= set(self.examples) and {"train", "val"} & set(needed) and not self.val_fraction:
            self._look_for_leaks()
        return bool(needed)

    def refuse_unordered(self, splits: Sequence[str]) -> None:
        """Take no source whose responses are in no order.

        Raises:
            UsageError: If some split has one.
        """
        for split in splits:
            for source in self.unordered.get(split, ()):
                raise UsageError(
                    f"{split}: {source} holds samples, and nothing says which of them are better. `dpo-lightning "
                    "label` makes preferences of samples; as they are `dpo-lightning predict` alone takes them, and "
                    "gives their rewards."
                )

    def joined(self) -> Examples:
        """All examples that were read."""
        return Examples.joined(list(self.examples.values()))

    def _tokenize(self, part: Part) -> TokenTable:
        return tokenize(part.opened(), part.format, self.tokenization, cache=self.cache, num_proc=self.num_proc)

    def _read(self, split: str) -> None:
        kept = []
        for place, part in enumerate(self.sources[split]):
            table = self._prepared.pop((split, place), None) or self._tokenize(part)
            report = table.report(split, str(part.source), self.batch_size)
            self.reports.append(report)
            rank_zero_info(str(report))
            if self.strict:
                report.refuse_drops()
            if not report.kept:
                raise UsageError(f"Of {part.source} no row is left to use.\n{report}")
            kept.append(table.kept())
            self._note_order(split, str(part.source), table.ordered)
        self.examples[split] = Examples.joined(kept)
        sizes = list(map(len, kept))
        taken = shares(sizes, [part.weight for part in self.sources[split]]) if split == "train" else sizes
        self.sizes[split] = list(zip(sizes, taken, strict=True))

    def _note_order(self, split: str, source: str, ordered: bool) -> None:
        if not ordered:
            self.unordered.setdefault(split, []).append(source)

    def _hold_out(self) -> None:
        """Move some prompts with all their examples from train to val."""
        examples, sizes = self.examples["train"], [size for size, _ in self.sizes["train"]]
        held = held_out(examples.prompts(), self.val_fraction)
        self.examples["val"] = examples.select(np.flatnonzero(held).tolist())
        self.examples["train"] = examples.select(np.flatnonzero(~held).tolist())
        self.sizes["val"] = [(int(held.sum()), int(held.sum()))]
        left = [int((~part).sum()) for part in np.split(held, np.cumsum(sizes)[:-1])]
        for part, size in zip(self.sources["train"], left, strict=True):
            if part.weight is not None and not size:
                raise UsageError(f"`val_fraction` leaves nothing of {part.source} to train on; give `val` instead.")
        taken = shares(left, [part.weight for part in self.sources["train"]])
        self.sizes["train"] = list(zip(left, taken, strict=True))
        rank_zero_info(f"  held out for validation {held.sum():,}, left for training {(~held).sum():,}")

    def _look_for_leaks(self) -> None:
        if shared := shared_prompts(self.examples["val"].prompts(), self.examples["train"].prompts()):
            rank_zero_info(
                f"val: {shared:,} of {len(self.examples['val']):,} examples have a prompt that stands in train too; "
                "what is measured there is partly memory."
            )

    def _begin_stream(self) -> None:
        reports = []
        for place, part in enumerate(self.sources["train"]):
            name = str(part.source)
            reading = begin(part.opened().stream(), part.format, name)
            self.sources["train"][place] = replace(part, format=reading.format)
            self._note_order("train", name, reading.format.ordered())
            reports.append(DataReport("train", name, str(reading.format), reading.unread, self.batch_size))
            reports[-1].origin = "of a stream, which is tokenised as it is read"
            rank_zero_info(f"train: {name}, a stream, read as {reading.format}")
        self.reports[:0] = reports
        self.sizes["train"] = []
