"""The two types that data and models share: what a batch holds, and what a model says of it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PreferenceBatch(NamedTuple):
    """B examples of a prompt and up to K responses, best first, as one stream of T tokens without padding.

    For each example the stream holds ``prompt | response_1 | ... | response_K``. Nothing but this type and its
    collator knows the order: the model is told which tokens attend to which, and which of them to score.

    Attributes:
        input_ids: Tokens of the stream, int64, shape ``(T,)``.
        position_ids: Position of each token in its own sequence; it restarts behind the prompt for every
            response, int64, shape ``(T,)``.
        spans: One row a sequence: ``(query start, query end, prefix start, prefix end)`` as flat positions,
            int64, shape ``(S, 4)``. The first response's queries include the prompt and its prefix is empty.
        key_index: Flat positions of each sequence's tokens, prefix first, sequence after sequence; ``None`` where
            that is the stream itself, int64, shape ``(sum of sequence lengths,)``.
        source: Flat position whose hidden state predicts a response token, int64, shape ``(N,)``.
        target: The response token, int64, shape ``(N,)``.
        owner: The response it belongs to, ``example * K + response``, ascending, int64, shape ``(N,)``.
        length: Response tokens, 0 where a response is absent, int64, shape ``(B, K)``.
        row: Number of each example in its data source, for messages, int64, shape ``(B,)``.
        max_query: Most queries in a sequence, kept on the host so that no kernel has to ask the device.
        max_key: Most tokens in a sequence, prefix included.
        reference_logps: Reference log-probabilities where the data brings them, shape ``(B, K)``.
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
    reference_logps: Tensor | None = None


class Logps(NamedTuple):
    """Log-probabilities that a model gives to the responses of a batch.

    Attributes:
        total: Summed over the tokens of a response, in nats, shape ``(B, K)``.
        length: Number of tokens in a response, 0 where it is absent, shape ``(B, K)``.
    """

    total: Tensor
    length: Tensor
