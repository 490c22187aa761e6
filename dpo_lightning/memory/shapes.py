"""Batches of given lengths: memory does not depend on which tokens stand in them."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_lightning.batch import PreferenceBatch, lay_out

Lengths = tuple[int, list[int]]  # of a prompt and its responses


def lengths_of(batch: PreferenceBatch) -> list[Lengths]:
    """Tokens of the prompt and of every response of each example."""
    spans, found = iter(batch.spans.tolist()), []
    for scored in batch.length.tolist():
        rows = [next(spans) for tokens in scored if tokens]
        sizes = [end - start for start, end, _, _ in rows]
        # The first row holds the prompt; of a single response, all that is not scored.
        prompt = rows[1][3] - rows[1][2] if len(rows) > 1 else sizes[0] - scored[0]
        found.append((prompt, [sizes[0] - prompt, *sizes[1:]]))
    return found


def batch_of(lengths: Sequence[Lengths], num_responses: int) -> PreferenceBatch:
    """A batch of such lengths, with K as it is given."""
    examples = [([0] * prompt, [[0] * size for size in responses]) for prompt, responses in lengths]
    return lay_out(examples, num_responses=num_responses)


def longest(batch: PreferenceBatch, count: int) -> PreferenceBatch:
    """The ``count`` examples with most tokens."""
    by_size = sorted(lengths_of(batch), key=lambda example: example[0] + sum(example[1]), reverse=True)
    return batch_of(by_size[:count], batch.length.shape[1])


def halved(batch: PreferenceBatch) -> PreferenceBatch:
    """Prompts and responses of half the length."""
    lengths = [(max(1, prompt // 2), [max(1, size // 2) for size in sizes]) for prompt, sizes in lengths_of(batch)]
    return batch_of(lengths, batch.length.shape[1])
