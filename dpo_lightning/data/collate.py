"""Tokenised examples to one flat stream: the only place that knows how a stream is laid out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch

from dpo_lightning.batch import PreferenceBatch
from dpo_lightning.data.example import TokenizedExample


def collate(examples: Sequence[TokenizedExample]) -> PreferenceBatch:
    """One stream ``prompt | response_1 | ... | response_K``, example behind example, no padding.

    Args:
        examples: At least one example; they may have different numbers of responses.

    Returns:
        A batch on the CPU, with K the largest number of responses.
    """
    num_responses = max(len(example.response_ids) for example in examples)
    tokens: list[list[int]] = []
    positions: list[range] = []
    spans: list[tuple[int, int, int, int]] = []
    keys: list[range] = []
    sources: list[chain[int]] = []
    lengths: list[list[int]] = []
    cursor = 0
    for example in examples:
        prompt_start, prompt = cursor, len(example.prompt_ids)
        prompt_end = prompt_start + prompt
        tokens.append(example.prompt_ids)
        positions.append(range(prompt))
        cursor = prompt_end
        for index, response in enumerate(example.response_ids):
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
            sources.append(chain((prompt_end - 1,), range(start, cursor - 1)))
        absent = num_responses - len(example.response_ids)
        lengths.append([len(response) for response in example.response_ids] + [0] * absent)
    length = torch.tensor(lengths)
    shares_prompts = any(len(example.response_ids) > 1 for example in examples)
    return PreferenceBatch(
        input_ids=torch.tensor(list(chain.from_iterable(tokens))),
        position_ids=torch.tensor(list(chain.from_iterable(positions))),
        spans=torch.tensor(spans),
        key_index=torch.tensor(list(chain.from_iterable(keys))) if shares_prompts else None,
        source=torch.tensor(list(chain.from_iterable(sources))),
        target=torch.tensor(list(chain.from_iterable(chain.from_iterable(e.response_ids for e in examples)))),
        owner=torch.repeat_interleave(length.flatten()),
        length=length,
        row=torch.tensor([example.row for example in examples]),
        max_query=max(end - start for start, end, _, _ in spans),
        max_key=max(end - start + stop - begin for start, end, begin, stop in spans),
    )
