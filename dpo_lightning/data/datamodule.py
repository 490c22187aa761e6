"""Preference data for a Trainer: read, tokenised and counted before any weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from dpo_lightning.batch import PreferenceBatch
from dpo_lightning.data.chat import Chat
from dpo_lightning.data.collate import collate
from dpo_lightning.data.dealing import assignments, runs
from dpo_lightning.data.example import TokenizedExample
from dpo_lightning.data.formats import Format
from dpo_lightning.data.loader import GlobalBatchSampler, ResumableLoader
from dpo_lightning.data.mixture import Mixture, as_parts
from dpo_lightning.data.publish import publish
from dpo_lightning.data.report import DataReport
from dpo_lightning.data.sources import HubDataset, Row, Source
from dpo_lightning.data.stock import Stock
from dpo_lightning.data.stream import ShuffledStream, StreamLoader, first_examples
from dpo_lightning.data.tokenize import Tokenization
from dpo_lightning.errors import UsageError
from dpo_lightning.paths import resolve
from dpo_lightning.ranks import data_place

AnySource = str | Source | Mixture | Sequence[Row]
WITHOUT_GRADIENTS = 4  # times the tokens that fit with gradients: nothing is kept for backward
SAMPLED_BATCHES = 4  # of a stream, to see how long its examples are
STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}


class PreferenceDataModule(LightningDataModule):
    """Prompts with ranked responses, as batches for any module of this package.

    A source is the path of a file, any Source ({class_path: HubDataset, init_args: {name: owner/dataset}}), or a
    Mixture of several.

    Args:
        train: Rows to train on.
        val: Rows to validate on.
        test: Rows for test, and for predict.
        tokenizer: The model's tokenizer, or its path; the command line takes it from the model.
        format: What the columns mean; found from the first rows unless named.
        val_fraction: Share of the training examples held out for validation, where val is not given. Examples of one
            prompt stay together.
        batch_size: Examples in a batch, over all devices together.
        val_batch_size: The same for validation, test and predict; twice batch_size unless given.
        micro_batch_tokens: Most tokens that a device runs at once. A share of a batch that is heavier is run in pieces,
            with the same gradient; without gradients four times as many are run at once.
        max_length: Most tokens of prompt and response together.
        max_prompt_length: Most tokens of a prompt.
        truncation: Keep examples that are longer, cut, or drop them. Responses are cut at their right.
        truncation_side: Where a prompt is cut.
        num_responses: Keep the best so many responses of each example; 1 makes data for SFT.
        end_token: Close responses that are text by the end token; not where all of them were cut at some length, as of
            samples that came to no end.
        chat: How messages become text.
        strict: Stop where an example cannot be used, instead of leaving it out.
        cache: Keep tokens on disk, in the datasets cache, and use them again as long as nothing changes them.
        stream_buffer: Read the training rows as a stream, shuffled among so many examples, and store nothing: for
            sources too large for the disk. Needs trainer.max_steps.
        num_workers: Processes that make batches.
        num_proc: Processes that tokenise. Fast tokenizers use all cores by themselves; chat templates use one.
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
        micro_batch_tokens: int | None = None,
        max_length: int = 512,
        max_prompt_length: int | None = None,
        truncation: Literal["keep", "drop"] = "keep",
        truncation_side: Literal["left", "right"] = "left",
        num_responses: int | None = None,
        end_token: bool = True,
        chat: Chat | None = None,
        strict: bool = False,
        cache: bool = True,
        stream_buffer: int | None = None,
        num_workers: int = 0,
        num_proc: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= val_fraction < 1:
            raise UsageError(f"`val_fraction` must be in [0, 1), got {val_fraction}; 0.1 holds out a tenth.")
        if val is not None and val_fraction:
            raise UsageError("Both `val` and `val_fraction` are given; keep one of the two.")
        if stream_buffer is not None and val_fraction:
            raise UsageError("Nothing can be held out of a stream; give `val` rows of their own, not `val_fraction`.")
        sizes = {"batch_size": batch_size, "val_batch_size": val_batch_size, "micro_batch_tokens": micro_batch_tokens}
        for name, value in (sizes | {"num_proc": num_proc, "stream_buffer": stream_buffer}).items():
            if value is not None and value < 1:
                raise UsageError(f"`{name}` must be 1 or more, got {value}.")
        given = {"train": train, "val": val, "test": test}
        self.sources = {split: as_parts(source, format) for split, source in given.items() if source is not None}
        self.format, self.val_fraction = format, val_fraction
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or 2 * batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.strict, self.cache, self.stream_buffer, self.num_workers = strict, cache, stream_buffer, num_workers
        self.tokenization = Tokenization(
            tokenizer=_load_tokenizer(tokenizer),
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            truncation=truncation,
            truncation_side=truncation_side,
            chat=chat or Chat(),
            num_responses=num_responses,
            end_token=end_token,
        )
        self.stock = Stock(
            self.sources,
            self.tokenization,
            batch_size,
            val_fraction=val_fraction,
            streams=stream_buffer is not None,
            strict=strict,
            cache=cache,
            num_proc=num_proc,
        )
        self.examples, self.reports = self.stock.examples, self.stock.reports
        self.seed: int | None = None
        self._chat_template: str | dict[str, str] | None = None
        self._loaders: list[ResumableLoader] = []
        if val is None and not val_fraction:
            # Without validation data this method is not defined, and the Trainer leaves validation out.
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.tokenization.tokenizer

    def prepare_data(self) -> None:
        """Tokenise what is to be used, in one process a machine; the others find it in the cache."""
        if self.cache and self.trainer is not None:
            for split in self._needed(self.trainer.state.fn.value):  # type: ignore[union-attr]
                self.stock.prepare(split)

    def setup(self, stage: str) -> None:
        """Take up what the stage needs, unless it was before; every report is given once."""
        stage = getattr(stage, "value", stage)  # the Trainer hands in an enum
        if self.tokenization.chat.template is not None:  # read now, since its file may change
            self._chat_template = self.tokenization.chat.source(self.tokenizer)
        if self.stock.take_up(self._needed(stage)) and self.trainer is not None:
            publish(self.reports, self.trainer)
        if stage != "predict":
            self.stock.refuse_unordered(self._needed(stage))

    def teardown(self, stage: str) -> None:
        """End the processes of loaders, and say what a stream held, which is known at its end alone."""
        for loader in self._loaders:
            loader.close()
        self._loaders.clear()
        if stage == "fit" and self._streams and self.trainer is not None:
            for report in self.reports[: len(self.sources["train"])]:
                rank_zero_info(str(report))
            publish(self.reports, self.trainer)

    def digests(self) -> np.ndarray:
        """What tells every example that was read from others, shape ``(N,)``."""
        return np.concatenate([examples.column("digest") for examples in self.examples.values()])

    def unscored(self, known: np.ndarray, rank: int, world_size: int) -> Iterator[PreferenceBatch]:
        """A rank's share of the examples whose digests are not known, each once, longest first, in batches.

        All ranks have equally many batches; the last may be of no examples.

        Args:
            known: Digests.
            rank: The rank.
            world_size: Number of ranks.

        Raises:
            UsageError: If the training rows are a stream.
        """
        if self._streams:
            raise UsageError("The examples of a stream cannot be scored before training; give no `stream_buffer`.")
        examples = self.stock.joined()
        _, first = np.unique(examples.column("digest"), return_index=True)
        wanted = first[~np.isin(examples.column("digest")[first], known)]
        num_tokens = examples.num_tokens()
        longest_first = wanted[np.argsort(-num_tokens[wanted], kind="stable")]
        most_tokens, most_examples = self._most_tokens("val"), max(1, self.val_batch_size // world_size)
        weights = np.ones_like(longest_first) if most_tokens is None else num_tokens[longest_first]
        shares = [list(runs(weights[other::world_size], most_tokens or most_examples)) for other in range(world_size)]
        mine = longest_first[rank::world_size]
        for run in shares[rank]:
            yield collate(examples.__getitems__(mine[run].tolist()))
        # Where weights are divided among ranks, all of them run equally often.
        yield from [collate([])] * (max(map(len, shares)) - len(shares[rank]))

    def heaviest(self) -> PreferenceBatch:
        """The micro-batch with most tokens that this rank meets in the first epoch, for a plan of memory.

        Of a stream, which is not known beforehand, it is made of the longest among the first examples.

        Raises:
            UsageError: If the training examples are not there yet, or make no batch.
        """
        if self._streams:
            return collate(self._heaviest_of_stream())
        sampler = self._sampler("train", self.batch_size, shuffle=True)
        return collate(self.examples["train"].__getitems__(sampler.heaviest()))

    def inspect(self, num_examples: int) -> list[TokenizedExample]:
        """Read all there is for a fit, or else predict, and take examples, evenly spread; of a stream the first."""
        self.setup(next((stage for stage in ("fit", "validate", "predict") if STAGES[stage][0] in self.sources), "fit"))
        if self._streams:
            return first_examples(self.sources["train"], self.tokenization, num_examples)
        examples = next(iter(self.examples.values()))
        places = np.linspace(0, len(examples) - 1, min(num_examples, len(examples))).round().astype(int)
        return examples.__getitems__(places.tolist())

    def train_dataloader(self) -> ResumableLoader | StreamLoader:
        """Shuffled batches, in an order that the run's seed fixes."""
        if self.stream_buffer is not None:
            return self._stream_loader()
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

    def provenance(self) -> dict[str, Any]:
        """What a model card says of the data, as plain data: sources with counts, and how their texts are read."""
        chat = self.tokenization.chat
        sources: dict[str, Any] = {str(part.source): part.source for parts in self.sources.values() for part in parts}
        return {
            "sources": [_described(report, sources.get(report.source)) for report in self.reports],
            "chat_template": self._chat_template,
            "chat_texts": chat.texts,
            "end_token": self.tokenization.end_token,
            "chat_variables": json.loads(json.dumps(dict(chat.variables), default=str)),
        }

    def state_dict(self) -> dict[str, Any]:
        """The seed of the order, which every later epoch needs, and where the model's preferences come from."""
        return {"seed": self.seed, "provenance": self.provenance()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the order of the run that is continued."""
        self.seed = state_dict["seed"]

    @property
    def _streams(self) -> bool:
        return "train" in self.sources and self.stream_buffer is not None

    def _needed(self, stage: str) -> list[str]:
        """Splits to be read for a stage."""
        if stage not in STAGES:
            raise UsageError(f"There is no stage {stage!r}; there are {', '.join(STAGES)}.")
        splits = STAGES[stage]
        if "val" in splits and self.val_fraction:
            splits = ("train",)
        if splits[0] not in self.sources:
            raise UsageError(f"There is no data for {stage}: give `data.init_args.{splits[0]}`.")
        return [split for split in splits if split in self.sources]

    def _most_tokens(self, split: str) -> int | None:
        """Tokens that a device runs at once."""
        if self.micro_batch_tokens is None:
            return None
        return self.micro_batch_tokens * (1 if split == "train" else WITHOUT_GRADIENTS)

    def _place(self, split: str, batch_size: int) -> _Place:
        place = _Place(seed=torch.initial_seed() if self.seed is None else self.seed)
        if self.trainer is not None:
            place = _Place(*data_place(self.trainer), self.trainer.strategy.broadcast(place.seed))
        if split == "train" and batch_size % place.world_size:
            raise UsageError(
                f"A train batch of {batch_size} examples does not divide among {place.world_size} devices; change "
                "`data.init_args.batch_size`."
            )
        return place

    def _sampler(self, split: str, batch_size: int, shuffle: bool = False, trained: bool = False) -> GlobalBatchSampler:
        if split not in self.examples:
            raise UsageError(f"There are no {split} examples yet; call `setup` with the stage first.")
        place = self._place(split, batch_size)
        sampler = GlobalBatchSampler(
            self.stock.sizes[split],
            self.examples[split].num_tokens(),
            batch_size,
            shuffle=shuffle,
            seed=place.seed,
            rank=place.rank,
            world_size=place.world_size,
            most_tokens=self._most_tokens(split),
            num_scored=self.examples[split].num_scored() if trained else None,
        )
        if self.trainer is not None and trained:
            limit = self.trainer.limit_train_batches
            sampler.max_batches = min(limit, len(sampler)) if isinstance(limit, int) else int(limit * len(sampler))
            sampler.accumulated = self.trainer.accumulate_grad_batches
        return sampler

    def _loader(self, split: str, batch_size: int, shuffle: bool = False) -> ResumableLoader:
        sampler, epoch = self._sampler(split, batch_size, shuffle, trained=split == "train"), 0
        self.seed = sampler.seed
        _say_what_runs_alone(split, sampler)
        if self.trainer is not None:
            # Not `current_epoch`: resumed at the end of an epoch, the Trainer still counts that one as current.
            epoch = self.trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        loader = ResumableLoader(
            self.examples[split],
            sampler,
            num_workers=self.num_workers,
            pin_memory=self._on_gpu,
            epoch=epoch,
        )
        self._loaders.append(loader)
        return loader

    def _stream_loader(self) -> StreamLoader:
        assert self.stream_buffer is not None
        if self.trainer is None or self.trainer.max_steps < 1:
            raise UsageError("How long a stream is nobody knows: set `trainer.max_steps`.")
        if self.trainer.overfit_batches:  # type: ignore[attr-defined]
            raise UsageError("A stream has no batches to overfit; leave out `data.init_args.stream_buffer`.")
        place = self._place("train", self.batch_size)
        self.seed = place.seed
        stream = ShuffledStream(
            self.sources["train"],
            self.tokenization,
            self.batch_size,
            self.stream_buffer,
            place.seed,
            rank=place.rank,
            world_size=place.world_size,
            most_tokens=self.micro_batch_tokens,
        )
        return StreamLoader(
            stream,
            self.trainer.max_steps * self.trainer.accumulate_grad_batches,
            self.reports[: len(self.sources["train"])],
            strict=self.strict,
            num_workers=self.num_workers,
            pin_memory=self._on_gpu,
        )

    def _heaviest_of_stream(self) -> list[TokenizedExample]:
        place = self._place("train", self.batch_size)
        sample = first_examples(self.sources["train"], self.tokenization, SAMPLED_BATCHES * self.batch_size)
        if not sample:
            raise UsageError("Of the first rows of the stream none could be used.")
        longest = sorted(sample, key=lambda example: -example.num_tokens)[: self.batch_size // place.world_size]
        num_tokens = np.array([example.num_tokens for example in longest])
        (pieces,) = assignments(num_tokens, 1, self.micro_batch_tokens)
        return [longest[index] for index in max(pieces, key=lambda piece: num_tokens[piece].sum())]

    @property
    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"


class _Place(NamedTuple):
    rank: int = 0
    world_size: int = 1
    seed: int = 0


def _described(report: DataReport, source: Source | None) -> dict[str, Any]:
    name, path = report.source, getattr(source, "path", None)
    return {
        "split": report.split,
        "source": name if path is None else name.replace(path, PurePath(path).name),  # not where it lies
        "dataset": source.name if isinstance(source, HubDataset) else None,
        "read": report.format,
        "rows": report.rows,
        "kept": report.kept,
    }


def _say_what_runs_alone(split: str, sampler: GlobalBatchSampler) -> None:
    num_tokens, most = sampler.num_tokens, sampler.most_tokens
    if most is not None and (too_many := int((num_tokens > most).sum())):
        rank_zero_info(
            f"{split}: {too_many:,} of {len(num_tokens):,} examples have more tokens than the {most:,} that are to be "
            f"run at once, up to {num_tokens.max():,}; each of them is run alone."
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
