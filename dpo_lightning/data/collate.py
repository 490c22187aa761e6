"""Tokenised examples to a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dpo_lightning.batch import PreferenceBatch, lay_out
from dpo_lightning.data.example import TokenizedExample


def collate(examples: Sequence[TokenizedExample]) -> PreferenceBatch:
    """The stream of some examples, on the CPU, with K the largest number of responses."""
    texts, rows = [(e.prompt_ids, e.response_ids) for e in examples], [e.row for e in examples]
    digests = [e.digest for e in examples if e.digest is not None]
    digest = torch.tensor(digests) if len(digests) == len(examples) else None
    return lay_out(texts, rows, [e.scored for e in examples])._replace(digest=digest)
