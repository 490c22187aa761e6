"""Tokenised examples to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dpo_lightning.batch import Batch, MicroBatches, PreferenceBatch, Window, lay_out, nothing
from dpo_lightning.data.example import TokenizedExample

T = TypeVar("T")


def collate(examples: Sequence[TokenizedExample], num_responses: int | None = None) -> PreferenceBatch:
    """The stream of some examples or of none, on the CPU, with K the largest number of responses unless given."""
    if not examples:
        return nothing(num_responses or 2)
    texts, rows = [(e.prompt_ids, e.response_ids) for e in examples], [e.row for e in examples]
    digests = [e.digest for e in examples if e.digest is not None]
    digest = torch.tensor(digests) if len(digests) == len(examples) else None
    response = torch.tensor([e.response for e in examples]) if any(e.response for e in examples) else None
    batch = lay_out(texts, rows, [e.scored for e in examples], num_responses)
    return batch._replace(digest=digest, response=response)


def collate_pieces(
    pieces: Sequence[Sequence[TokenizedExample]], order: Tensor | None = None, window: Window | None = None
) -> Batch:
    """The streams of the pieces of a batch, with K the same for all of them, the order of the whole, and its window."""
    num_responses = max((len(example.response_ids) for piece in pieces for example in piece), default=None)
    batches = [collate(piece, num_responses) for piece in pieces]
    return batches[0]._replace(window=window) if len(batches) == 1 else MicroBatches(batches, order, window)


def as_it_is(batch: T) -> T:
    """What a DataLoader does with a batch that is one already."""
    return batch
