"""What data and models share: a batch, how its stream is laid out, and what a model says of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Window(NamedTuple):
    """All that an optimizer step is the mean over, the shares of all ranks in all batches that are accumulated.

    Attributes:
        examples: Their number.
        tokens: Scored tokens of them.
        batches: Over how many batches gradients are accumulated, which the last window of an epoch may not have.
    """

    examples: int
    tokens: int
    batches: int


class PreferenceBatch(NamedTuple):
    """B examples of a prompt and up to K responses, best first, as one stream of T tokens without padding.

    For each example the stream holds ``prompt | response_1 | ... | response_K``. Nothing but this type and its
    layout below knows the order: the model is told which tokens attend to which, and which of them to score.

    Attributes:
        input_ids: Tokens of the stream, int64, shape ``(T,)``.
        position_ids: Position of each token in its own sequence; it restarts behind the prompt for every
            response, int64, shape ``(T,)``.
        spans: One row a sequence: ``(query start, query end, prefix start, prefix end)`` as flat positions,
            int64, shape ``(S, 4)``. The first response's queries include the prompt and its prefix is empty.
        key_index: Flat positions of each sequence's tokens, prefix first, sequence after sequence; ``None`` where
            that is the stream itself, int64, shape ``(sum of sequence lengths,)``.
        source: Flat position whose hidden state predicts a scored response token, int64, shape ``(N,)``.
        target: The scored token, int64, shape ``(N,)``.
        owner: The response it belongs to, ``example * K + response``, ascending, int64, shape ``(N,)``.
        length: Scored response tokens, 0 where a response is absent, int64, shape ``(B, K)``.
        row: Number of each example in its data source, for messages, int64, shape ``(B,)``.
        max_query: Most queries in a sequence, kept on the host so that no kernel has to ask the device.
        max_key: Most tokens in a sequence, prefix included.
        digest: A number that changes with the tokens of an example and with which of them are scored, int64, shape
            ``(B,)``; None where nobody needs it.
        window: What the optimizer step to which the batch belongs is the mean over; None where nobody knows.
        response: Number of each example's one response in its row, counted from 1, where the responses of a row are in
            no order, else 0, int64, shape ``(B,)``; None where all are in order.
    """

    input_ids: Tensor
    position_ids: Tensor
    spans: Tensor
    key_index: Tensor | None
    source: Tensor
    target: Tensor
    owner: Tensor
    length: Tensor
    row: Tensor
    max_query: int
    max_key: int
    digest: Tensor | None = None
    window: Window | None = None
    response: Tensor | None = None

    @property
    def pieces(self) -> tuple[PreferenceBatch]:
        """Itself, since it is run at once."""
        return (self,)

    def joined(self, values: Sequence[Tensor]) -> Tensor:
        """What was found for its one piece."""
        (whole,) = values
        return whole


class MicroBatches(NamedTuple):
    """One batch in pieces, run one after the other because together they have too many tokens for a device.

    Attributes:
        pieces: Batches of the same K that share the examples among them.
        order: Where each example of the batch stands in the pieces behind each other, int64, shape ``(B,)``; None
            where that is no matter.
        window: What the optimizer step to which the batch belongs is the mean over; None where nobody knows.
    """

    pieces: Sequence[PreferenceBatch]
    order: Tensor | None = None
    window: Window | None = None

    def joined(self, values: Sequence[Tensor]) -> Tensor:
        """What was found for each piece, shape ``(examples, ...)`` each, in the order of the batch, ``(B, ...)``."""
        whole = torch.cat(list(values))
        return whole if self.order is None else whole[self.order]


Batch = PreferenceBatch | MicroBatches


class Logps(NamedTuple):
    """Log-probabilities that a model gives to the responses of a batch.

    Attributes:
        total: Summed over the tokens of a response, in nats, shape ``(B, K)``.
        length: Number of scored tokens in a response, 0 where it is absent, shape ``(B, K)``.
        token: Of every scored token, response by response, shape ``(N,)``.
        owner: The response that a token belongs to, ``example * K + response``, ascending, int64, shape ``(N,)``.
        collision: Log-probability that two draws from the distribution of a token's position agree, without
            gradient; for losses that ask for it, shape ``(N,)``.
        kl: KL divergence of the policy's distribution at a token's position from the reference's, in nats; for
            losses that ask for it, shape ``(N,)``.
    """

    total: Tensor
    length: Tensor
    token: Tensor | None = None
    owner: Tensor | None = None
    collision: Tensor | None = None
    kl: Tensor | None = None


def lay_out(
    examples: Sequence[tuple[list[int], list[list[int]]]],
    rows: Sequence[int] | None = None,
    scored: Sequence[list[list[bool]] | None] | None = None,
    num_responses: int | None = None,
) -> PreferenceBatch:
    """One stream ``prompt | response_1 | ... | response_K``, example behind example, no padding.

    Args:
        examples: Prompt tokens and the tokens of the responses, best first; at least one token each. Examples may
            have different numbers of responses.
        rows: Number of each example in its source; 0, 1, ... unless given.
        scored: For each example which tokens of each response are scored, at least one; None where all are.
        num_responses: K, at least the largest number of responses, which it is unless given.

    Returns:
        A batch on the CPU.
    """
    # One entry an example (B) or a response (S); what has one entry a token is made of these, without a Python loop.
    prompt_B = np.array([len(prompt) for prompt, _ in examples])
    count_B = np.array([len(responses) for _, responses in examples])
    size_S = np.array([len(response) for _, responses in examples for response in responses])
    example_S = np.repeat(np.arange(len(examples)), count_B)
    index_S = _ranges(np.zeros_like(count_B), count_B)
    first_S = index_S == 0

    before_S = np.cumsum(size_S) - size_S
    start_S = before_S + np.cumsum(prompt_B)[example_S]
    prompt_end_S = start_S[first_S][example_S]
    prefix_start_S = prompt_end_S - prompt_B[example_S]
    prefix_end_S = np.where(first_S, prefix_start_S, prompt_end_S)
    query_start_S = np.where(first_S, prefix_start_S, start_S)
    prefix_S, query_S = prefix_end_S - prefix_start_S, start_S + size_S - query_start_S

    tokens = list(chain.from_iterable(chain(prompt, *responses) for prompt, responses in examples))
    input_ids = np.array(tokens, np.int64)
    source = _ranges(start_S - 1, size_S)
    source[before_S] = prompt_end_S - 1  # the last token of the prompt predicts the first of every response
    target = input_ids[_ranges(start_S, size_S)]
    most = num_responses or int(count_B.max())
    owner = np.repeat(example_S * most + index_S, size_S)
    if scored is not None and any(scored):
        is_scored = _flat_masks(examples, scored)
        source, target, owner = source[is_scored], target[is_scored], owner[is_scored]
    key_index = None
    if count_B.max() > 1:
        starts, sizes = np.stack([prefix_start_S, query_start_S], 1), np.stack([prefix_S, query_S], 1)
        key_index = torch.from_numpy(_ranges(starts.ravel(), sizes.ravel()))
    return PreferenceBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(_ranges(np.where(first_S, 0, prompt_B[example_S]), query_S)),
        spans=torch.from_numpy(np.stack([query_start_S, start_S + size_S, prefix_start_S, prefix_end_S], 1)),
        key_index=key_index,
        source=torch.from_numpy(source),
        target=torch.from_numpy(target),
        owner=torch.from_numpy(owner),
        length=torch.from_numpy(np.bincount(owner, minlength=len(examples) * most).reshape(-1, most)),
        row=torch.tensor(rows if rows is not None else range(len(examples))),
        max_query=int(query_S.max()),
        max_key=int((prefix_S + query_S).max()),
    )


def nothing(num_responses: int) -> PreferenceBatch:
    """A batch of no examples, B = 0, for a rank that has none: its stream is one token, of which nothing is scored.

    It runs through models and losses as any other, so that a rank takes part in what all ranks do together, and adds
    nothing to sums and gradients.
    """
    none = torch.empty(0, dtype=torch.int64)
    return PreferenceBatch(
        input_ids=torch.zeros(1, dtype=torch.int64),
        position_ids=torch.zeros(1, dtype=torch.int64),
        spans=torch.tensor([[0, 1, 0, 0]]),
        key_index=None,
        source=none,
        target=none,
        owner=none,
        length=none.view(0, num_responses),
        row=none,
        max_query=1,
        max_key=1,
        digest=none,
    )


def _flat_masks(
    examples: Sequence[tuple[list[int], list[list[int]]]], scored: Sequence[list[list[bool]] | None]
) -> np.ndarray:
    """Whether each response token is scored."""
    masks = (
        masks or [[True] * len(response) for response in responses]
        for (_, responses), masks in zip(examples, scored, strict=True)
    )
    return np.array(list(chain.from_iterable(chain.from_iterable(masks))))


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """``range(start, start + size)`` for each, behind each other."""
    return np.arange(sizes.sum()) + np.repeat(starts - np.cumsum(sizes) + sizes, sizes)
