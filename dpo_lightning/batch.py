"""What data and models share: a batch, how its stream is laid out, and what a model says of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, compress
from typing import NamedTuple

import torch
from torch import Tensor


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
) -> PreferenceBatch:
    """One stream ``prompt | response_1 | ... | response_K``, example behind example, no padding.

    Args:
        examples: Prompt tokens and the tokens of the responses, best first; at least one token each. Examples may
            have different numbers of responses.
        rows: Number of each example in its source; 0, 1, ... unless given.
        scored: For each example which tokens of each response are scored, at least one; None where all are.

    Returns:
        A batch on the CPU, with K the largest number of responses.
    """
    num_responses = max(len(responses) for _, responses in examples)
    tokens: list[list[int]] = []
    positions: list[range] = []
    spans: list[tuple[int, int, int, int]] = []
    keys: list[range] = []
    sources: list[Iterable[int]] = []
    targets: list[Iterable[int]] = []
    lengths: list[list[int]] = []
    cursor = 0
    for (prompt_ids, responses), masks in zip(examples, scored or [None] * len(examples), strict=True):
        prompt_start, prompt = cursor, len(prompt_ids)
        prompt_end = prompt_start + prompt
        tokens.append(prompt_ids)
        positions.append(range(prompt))
        cursor = prompt_end
        for index, response in enumerate(responses):
            start, cursor = cursor, cursor + len(response)
            tokens.append(response)
            positions.append(range(prompt, prompt + len(response)))
            if index == 0:
                spans.append((prompt_start, cursor, prompt_start, prompt_start))
            else:
                spans.append((start, cursor, prompt_start, prompt_end))
                keys.append(range(prompt_start, prompt_end))
            keys.append(range(spans[-1][0], cursor))
            # The last token of the prompt predicts the first of every response.
            predictors = chain((prompt_end - 1,), range(start, cursor - 1))
            sources.append(predictors if masks is None else compress(predictors, masks[index]))
            targets.append(response if masks is None else compress(response, masks[index]))
        counts = map(len, responses) if masks is None else map(sum, masks)
        lengths.append([*counts] + [0] * (num_responses - len(responses)))
    length = torch.tensor(lengths)
    shares_prompts = num_responses > 1
    return PreferenceBatch(
        input_ids=torch.tensor(list(chain.from_iterable(tokens))),
        position_ids=torch.tensor(list(chain.from_iterable(positions))),
        spans=torch.tensor(spans),
        key_index=torch.tensor(list(chain.from_iterable(keys))) if shares_prompts else None,
        source=torch.tensor(list(chain.from_iterable(sources))),
        target=torch.tensor(list(chain.from_iterable(targets))),
        owner=torch.repeat_interleave(length.flatten()),
        length=length,
        row=torch.tensor(rows if rows is not None else range(len(examples))),
        max_query=max(end - start for start, end, _, _ in spans),
        max_key=max(end - start + stop - begin for start, end, begin, stop in spans),
    )
