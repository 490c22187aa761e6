"""A batch worked by hand, and what holds of every batch."""

import itertools
import random

import pytest
import torch

from dpo_lightning.data.collate import collate
from dpo_lightning.data.example import TokenizedExample

SEEDS = range(8)


def random_examples(seed, most=4):
    rng = random.Random(seed)

    def ids(longest):
        return [rng.randrange(1, 100) for _ in range(rng.randint(1, longest))]

    return [
        TokenizedExample(ids(9), [ids(7) for _ in range(rng.randint(1, most))], row)
        for row in range(1, rng.randint(1, 5) + 1)
    ]


def sequences(examples):
    """Prompt and response of every sequence, in the order of the stream."""
    return [(example.prompt_ids, response) for example in examples for response in example.response_ids]


def test_a_batch_by_hand():
    first = TokenizedExample([10, 11], [[20, 21, 22], [30]], 7)
    second = TokenizedExample([12], [[40], [50, 51], [60, 61]], 9)
    batch = collate([first, second])
    assert batch.input_ids.tolist() == [10, 11, 20, 21, 22, 30, 12, 40, 50, 51, 60, 61]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 2, 0, 1, 1, 2, 1, 2]
    assert batch.spans.tolist() == [[0, 5, 0, 0], [5, 6, 0, 2], [6, 8, 6, 6], [8, 10, 6, 7], [10, 12, 6, 7]]
    assert batch.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 6, 8, 9, 6, 10, 11]
    assert batch.source.tolist() == [1, 2, 3, 1, 6, 6, 8, 6, 10]
    assert batch.target.tolist() == [20, 21, 22, 30, 40, 50, 51, 60, 61]
    assert batch.owner.tolist() == [0, 0, 0, 1, 3, 4, 4, 5, 5]  # 2 is the absent third response of the first
    assert batch.length.tolist() == [[3, 1, 0], [1, 2, 2]]
    assert batch.row.tolist() == [7, 9]
    assert (batch.max_query, batch.max_key) == (5, 5)


def test_the_longest_sequence_may_be_another_than_the_longest_query():
    batch = collate([TokenizedExample([1, 2, 3], [[4], [5, 6, 7]], 1)])
    assert (batch.max_query, batch.max_key) == (4, 6)


def test_without_siblings_the_stream_itself_is_the_keys():
    batch = collate([TokenizedExample([1, 2], [[3]], 1), TokenizedExample([4], [[5, 6]], 2)])
    assert batch.key_index is None
    assert batch.spans.tolist() == [[0, 3, 0, 0], [3, 6, 3, 3]]
    assert batch.length.tolist() == [[1], [2]]


@pytest.mark.parametrize("seed", SEEDS)
def test_queries_partition_the_stream_in_order(seed):
    batch = collate(random_examples(seed))
    start, end, _, _ = batch.spans.unbind(1)
    assert start[0] == 0
    assert end[-1] == len(batch.input_ids) == len(batch.position_ids)
    assert torch.equal(start[1:], end[:-1])
    assert (end > start).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_keys_of_every_sequence_spell_its_prompt_and_response(seed):
    examples = random_examples(seed)
    batch = collate(examples)
    start, end, begin, stop = batch.spans.unbind(1)
    lengths = (end - start + stop - begin).tolist()
    keys = batch.key_index if batch.key_index is not None else torch.arange(len(batch.input_ids))
    for key, (prompt, response) in zip(keys.split(lengths), sequences(examples), strict=True):
        assert batch.input_ids[key].tolist() == prompt + response
        assert batch.position_ids[key].tolist() == list(range(len(key)))
    assert batch.max_key == max(lengths)
    assert batch.max_query == (end - start).max()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_prompt_stands_in_the_stream_once(seed):
    examples = random_examples(seed)
    expected = itertools.chain.from_iterable(
        [*example.prompt_ids, *itertools.chain(*example.response_ids)] for example in examples
    )
    assert collate(examples).input_ids.tolist() == list(expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_response_token_is_scored_once_from_the_position_before_it(seed):
    examples = random_examples(seed)
    batch = collate(examples)
    expected = list(itertools.chain.from_iterable(response for _, response in sequences(examples)))
    assert batch.target.tolist() == expected
    target_position = torch.cat([torch.arange(len(p), len(p) + len(r)) for p, r in sequences(examples)])
    assert torch.equal(batch.position_ids[batch.source], target_position - 1)
    before = [token for prompt, response in sequences(examples) for token in (prompt + response)[len(prompt) - 1 : -1]]
    assert batch.input_ids[batch.source].tolist() == before


@pytest.mark.parametrize("seed", SEEDS)
def test_owners_ascend_and_count_to_the_lengths_absent_responses_last(seed):
    examples = random_examples(seed)
    batch = collate(examples)
    assert (batch.owner.diff() >= 0).all()
    assert torch.equal(batch.owner.bincount(minlength=batch.length.numel()).view_as(batch.length), batch.length)
    most = max(len(example.response_ids) for example in examples)
    for example, lengths in zip(examples, batch.length.tolist(), strict=True):
        present = [len(response) for response in example.response_ids]
        assert lengths == present + [0] * (most - len(present))
