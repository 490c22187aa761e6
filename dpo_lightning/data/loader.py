"""Batches in an order that depends on seed and epoch alone, and a loader that continues where it stopped."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dpo_lightning.batch import Batch, Window
from dpo_lightning.data.collate import as_it_is, collate_pieces
from dpo_lightning.data.dealing import assignments
from dpo_lightning.data.table import Examples
from dpo_lightning.errors import UsageError

NOTICES = (signal.SIGTERM, signal.SIGUSR1)


class Share(NamedTuple):
    """A rank's share of a global batch.

    Attributes:
        pieces: Indices of its examples, in pieces that are run at once.
        window: What the optimizer step to which the batch belongs is the mean over; None where nothing is trained.
    """

    pieces: list[list[int]]
    window: Window | None


class GlobalBatchSampler(Sampler[Share]):
    """Global batches of which every rank takes its share, in as many pieces as it has to.

    Args:
        parts: Size of each source in the data set, and how many of its examples an epoch takes.
        num_tokens: Tokens of each example in the stream, shape ``(sum of sizes,)``.
        batch_size: Examples in a global batch, over all ranks.
        shuffle: Whether each epoch has an order of its own.
        seed: With the epoch's number it fixes the order.
        rank: This process.
        world_size: Number of processes.
        most_tokens: Tokens that a rank runs at once.
        num_scored: Scored tokens of each example, where gradients are made, shape ``(sum of sizes,)``.
        accumulated: Batches that an optimizer step accumulates.
        max_batches: Batches after which an epoch ends; all unless given.
    """

    def __init__(
        self,
        parts: Sequence[tuple[int, int]],
        num_tokens: np.ndarray,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        most_tokens: int | None = None,
        num_scored: np.ndarray | None = None,
        accumulated: int = 1,
        max_batches: int | None = None,
    ) -> None:
        self.parts, self.num_examples, self.batch_size = parts, sum(taken for _, taken in parts), batch_size
        self.num_tokens, self.num_scored, self.most_tokens = num_tokens, num_scored, most_tokens
        self.accumulated, self.max_batches = accumulated, len(self) if max_batches is None else max_batches
        self.shuffle, self.seed, self.rank, self.world_size = shuffle, seed, rank, world_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        """Number of global batches in an epoch."""
        return -(-self.num_examples // self.batch_size)

    def __iter__(self) -> Iterator[Share]:
        """This rank's share of each global batch of the epoch, from the batch numbered ``start``."""
        order = self._order()
        for batch in range(self.start, len(self)):
            examples = self._examples(order, batch, batch + 1)
            pieces = assignments(self.num_tokens[examples], self.world_size, self.most_tokens)[self.rank]
            yield Share([examples[piece].tolist() for piece in pieces], self._window(order, batch))

    def heaviest(self) -> list[int]:
        """The piece with most tokens of the epoch."""
        pieces = (piece for share in self for piece in share.pieces)
        return max(pieces, key=lambda piece: self.num_tokens[piece].sum())

    def _window(self, order: np.ndarray, batch: int) -> Window | None:
        if self.num_scored is None:
            return None
        first = batch - batch % self.accumulated
        examples = self._examples(order, first, min(first + self.accumulated, self.max_batches))
        return Window(len(examples), int(self.num_scored[examples].sum()), self.accumulated)

    def _examples(self, order: np.ndarray, first: int, stop: int) -> np.ndarray:
        return order[first * self.batch_size : stop * self.batch_size]

    def _order(self) -> np.ndarray:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        chosen, start = [], 0
        for size, taken in self.parts:
            places = torch.randperm(size, generator=generator) if self.shuffle else torch.arange(size)
            chosen.append(start + places[:taken])
            start += size
        order = torch.cat(chosen)
        if self.shuffle and len(chosen) > 1:
            order = order[torch.randperm(len(order), generator=generator)]
        return order.numpy()


class ResumableLoader:
    """A loader whose place in the epoch is part of Lightning's checkpoints.

    It holds a ``DataLoader`` instead of being one: Lightning takes those apart to put samplers of its own into them,
    which repeat and pad, while any other iterable is left as it is.

    Args:
        examples: Tokenised examples.
        sampler: Which of them make a batch.
        num_workers: Processes that collate; 0 collates in this one.
        pin_memory: Whether batches lie in memory from which a GPU copies fast.
        epoch: Number of the first epoch.
    """

    def __init__(
        self,
        examples: Examples,
        sampler: GlobalBatchSampler,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        epoch: int = 0,
    ) -> None:
        self.order = sampler
        self._epoch, self._position = epoch, 0
        self._started = False
        self.loader: DataLoader[Batch] = DataLoader(
            _ByPieces(examples),
            sampler=sampler,
            batch_size=None,
            collate_fn=as_it_is,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            worker_init_fn=outlive_notices,
        )

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the epoch after loading a state, else an epoch from its start."""
        if self._started or self._position >= self.order.max_batches:
            self._epoch, self._position = self._epoch + 1, 0
        self._started = True
        self.order.epoch, self.order.start = self._epoch, self._position
        for batch in self.loader:
            # Counted before it is handed out: a checkpoint made while it is in use has seen it.
            self._position += 1
            yield batch

    def close(self) -> None:
        """End the processes that collate; as garbage, in a cycle with a Trainer, each would be waited for 5 seconds."""
        self.loader._iterator = None

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches handed out in it, and what fixes the order."""
        order = self.order
        fixed = {"seed": order.seed, "num_examples": order.num_examples, "batch_size": order.batch_size}
        return {"epoch": self._epoch, "position": self._position, **fixed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the last batch that was handed out.

        Raises:
            UsageError: If the examples or the size of a batch are others than they were.
        """
        for name, what in (("num_examples", "training examples"), ("batch_size", "`data.init_args.batch_size`")):
            if state.get(name) != getattr(self.order, name):
                raise UsageError(
                    f"The checkpoint stands in the middle of an epoch with {what} {state.get(name)}, now {what} "
                    f"{getattr(self.order, name)}: it cannot continue with the next batch. Use the same data and batch "
                    "size, or start anew from its weights."
                )
        self._epoch, self._position, self.order.seed = state["epoch"], state["position"], state["seed"]
        self._started = False


def outlive_notices(worker: int) -> None:
    """Let a worker end on no signal but its parent's: a notice to a whole group is for the parent, which needs it."""
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, NOTICES)
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while True:
        received = signal.sigwaitinfo(NOTICES)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)


class _ByPieces(Dataset[Batch]):
    """Batches by the indices of the examples of their pieces."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __getitem__(self, share: Share) -> Batch:
        indices = [index for piece in share.pieces for index in piece]
        found = iter(self.examples.__getitems__(indices))
        pieces = [list(islice(found, len(piece))) for piece in share.pieces]
        return collate_pieces(pieces, torch.tensor(indices).argsort(), share.window)
