"""Preference data for a Trainer: read, tokenised and counted once, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from dpo_lightning.data.example import PreferenceExample, TokenizedExample
from dpo_lightning.data.formats import Format, UnusableRow, infer
from dpo_lightning.data.loader import GlobalBatchSampler, ResumableLoader
from dpo_lightning.data.report import DataReport
from dpo_lightning.data.sources import Row, Source, as_source
from dpo_lightning.data.tokenize import Tokenization
from dpo_lightning.errors import UsageError
from dpo_lightning.paths import resolve

AnySource = str | Source | Sequence[Row]
# The held-out share is the same whatever the seed of a run, so that runs can be compared.
SPLIT_SEED = 0


class PreferenceDataModule(LightningDataModule):
    """Prompts with ranked responses, as batches for any module of this package.

    A source is the path of a file, or any Source: {class_path: HubDataset, init_args: {name: owner/dataset}}.

    Args:
        train: Rows to train on.
        val: Rows to validate on.
        test: Rows for test, and for predict.
        tokenizer: The model's tokenizer, or its path; the command line takes it from the model.
        format: What the columns mean; found from the columns of the first row unless named.
        val_fraction: Share of the training rows held out for validation, where val is not given.
        batch_size: Examples in a batch, over all devices together.
        val_batch_size: The same for validation, test and predict; twice batch_size unless given.
        max_length: Most tokens of prompt and response together; responses are cut at their right.
        max_prompt_length: Most tokens of a prompt, which is cut at its left.
        num_responses: Keep the best so many responses of each example; 1 makes data for SFT.
        num_workers: Processes that make batches.
    """

    def __init__(
        self,
        train: AnySource | None = None,
        val: AnySource | None = None,
        test: AnySource | None = None,
        *,
        tokenizer: str | Tokenizer,
        format: Format | None = None,
        val_fraction: float = 0.0,
        batch_size: int = 64,
        val_batch_size: int | None = None,
        max_length: int = 512,
        max_prompt_length: int | None = None,
        num_responses: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= val_fraction < 1:
            raise UsageError(f"`val_fraction` must be in [0, 1), got {val_fraction}; 0.1 holds out a tenth.")
        if val is not None and val_fraction:
            raise UsageError("Both `val` and `val_fraction` are given; keep one of the two.")
        sizes = {"batch_size": batch_size, "val_batch_size": val_batch_size, "num_responses": num_responses}
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise UsageError(f"`{name}` must be 1 or more, got {value}.")
        self.sources = {"train": train, "val": val, "test": test}
        self.format, self.val_fraction = format, val_fraction
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or 2 * batch_size
        self.num_responses, self.num_workers = num_responses, num_workers
        self.tokenization = Tokenization(
            tokenizer=_load_tokenizer(tokenizer), max_length=max_length, max_prompt_length=max_prompt_length
        )
        self.examples: dict[str, list[TokenizedExample]] = {}
        self.reports: list[DataReport] = []
        self.seed: int | None = None
        if val is None and not val_fraction:
            # Without validation data this method is not defined, and the Trainer leaves validation out.
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.tokenization.tokenizer

    def setup(self, stage: str) -> None:
        """Read what the stage needs, unless it was read before; the counts are printed once."""
        needs = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}
        stage = getattr(stage, "value", stage)  # the Trainer hands in an enum
        if stage not in needs:
            raise UsageError(f"There is no stage {stage!r}; there are {', '.join(needs)}.")
        splits = needs[stage]
        if "val" in splits and self.sources["val"] is None and self.val_fraction:
            splits = ("train", "val")
        for split in splits:
            source = self.sources[split]
            if source is None or split in self.examples:
                continue
            self.examples[split] = self._read(as_source(source))
            if split == "train" and self.val_fraction:
                self._hold_out()
        if splits[0] not in self.examples:
            raise UsageError(f"There is no data for {stage}: give `data.init_args.{splits[0]}`.")

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches, in an order that the run's seed fixes."""
        # Overfitting on some batches means the same ones in every epoch.
        overfit = self.trainer is not None and self.trainer.overfit_batches  # type: ignore[attr-defined]
        return self._loader("train", self.batch_size, shuffle=not overfit)

    def val_dataloader(self) -> ResumableLoader:
        """Every example once, in order."""
        return self._loader("val", self.val_batch_size)

    def test_dataloader(self) -> ResumableLoader:
        """Every example once, in order."""
        return self._loader("test", self.val_batch_size)

    def predict_dataloader(self) -> ResumableLoader:
        """Every example once, in order."""
        return self._loader("test", self.val_batch_size)

    def state_dict(self) -> dict[str, Any]:
        """The seed of the order, which every later epoch needs."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the order of the run that is continued."""
        self.seed = state_dict["seed"]

    def _read(self, source: Source) -> list[TokenizedExample]:
        report = DataReport(str(source))
        examples: list[PreferenceExample] = []
        shape = self.format
        for number, row in source.numbered():
            report.rows += 1
            if shape is None:
                shape = infer(row, number, str(source))
            try:
                example = shape(row, number, str(source))
            except UnusableRow as reason:
                report.dropped[str(reason)] += 1
                continue
            examples.append(example._replace(responses=example.responses[: self.num_responses]))
        report.format = "" if shape is None else type(shape).__name__
        tokenized = list(self.tokenization(examples, report))
        self.reports.append(report)
        rank_zero_info(str(report))
        if not tokenized:
            raise UsageError(f"Of {source} no row is left to use.\n{report}")
        return tokenized

    def _hold_out(self) -> None:
        examples = self.examples["train"]
        held_out = round(self.val_fraction * len(examples))
        if not 0 < held_out < len(examples):
            raise UsageError(
                f"`val_fraction` {self.val_fraction} of {len(examples)} examples holds out {held_out}; both parts need "
                "at least one."
            )
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
        self.examples["val"] = [examples[index] for index in sorted(order[:held_out])]
        self.examples["train"] = [examples[index] for index in sorted(order[held_out:])]
        rank_zero_info(f"  held out for validation {held_out:,}, left for training {len(examples) - held_out:,}")

    def _loader(self, split: str, batch_size: int, shuffle: bool = False) -> ResumableLoader:
        if split not in self.examples:
            raise UsageError(f"There are no {split} examples yet; call `setup` with the stage first.")
        examples = self.examples[split]
        rank, world_size, epoch, limit, seed, on_gpu = 0, 1, 0, 1.0, torch.initial_seed(), False
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
            # Not `current_epoch`: resumed at the end of an epoch, the Trainer still counts that one as current.
            epoch = self.trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
            limit = self.trainer.limit_train_batches
            seed = self.trainer.strategy.broadcast(seed if self.seed is None else self.seed)
            on_gpu = self.trainer.strategy.root_device.type == "cuda"
        self.seed = seed
        if batch_size % world_size:
            raise UsageError(
                f"A {split} batch of {batch_size} examples does not divide among {world_size} devices; change "
                f"`data.init_args.{'batch_size' if split == 'train' else 'val_batch_size'}`."
            )
        sampler = GlobalBatchSampler(
            len(examples), batch_size, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size
        )
        if not len(sampler):
            raise UsageError(
                f"The {len(examples)} {split} examples make no batch that divides among {world_size} devices; give "
                "more rows or use fewer devices."
            )
        return ResumableLoader(
            examples,
            sampler,
            num_workers=self.num_workers,
            pin_memory=on_gpu,
            epoch=epoch,
            max_batches=limit if isinstance(limit, int) else int(limit * len(sampler)),
        )


def _load_tokenizer(tokenizer: str | Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise UsageError("The model brings no tokenizer; name one by `data.init_args.tokenizer`.")
    if not isinstance(tokenizer, str):
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(resolve(tokenizer))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"`data.init_args.tokenizer`: {tokenizer} is no folder with a tokenizer here and could not be had from a "
            f"hub: {error}"
        ) from error
