"""A batch worked by hand, and what holds of every batch."""

import itertools
import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from dpo_lightning.data.collate import collate, collate_pieces
from dpo_lightning.data.example import TokenizedExample
from dpo_lightning.models.policy import padded_rows

SEEDS = range(8)
IDS = st.integers(1, 9)  # few of them, so that a token in the wrong place is not found out by its id alone


def random_examples(seed, most=4):
    rng = random.Random(seed)

    def ids(longest):
        return [rng.randrange(1, 100) for _ in range(rng.randint(1, longest))]

    return [
        TokenizedExample(ids(9), [ids(7) for _ in range(rng.randint(1, most))], row)
        for row in range(1, rng.randint(1, 5) + 1)
    ]


@st.composite
def masked_examples(draw):
    """Examples some of whose response tokens are not scored, in each response at least one that is."""
    examples = []
    for row in range(draw(st.integers(1, 4))):
        responses = draw(st.lists(st.lists(IDS, min_size=1, max_size=6), min_size=1, max_size=3))
        scored = None
        if draw(st.booleans()):
            masks = [draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))) for ids in responses]
            scored = [mask if any(mask) else [*mask[:-1], True] for mask in masks]
        examples.append(TokenizedExample(draw(st.lists(IDS, min_size=1, max_size=6)), responses, row, scored))
    return examples


def scored_places(examples):
    """For each scored token: its response, the whole sequence, and its place there."""
    most = max(len(example.response_ids) for example in examples)
    for number, example in enumerate(examples):
        masks = example.scored or [[True] * len(ids) for ids in example.response_ids]
        for index, (ids, mask) in enumerate(zip(example.response_ids, masks, strict=True)):
            for place, scored in enumerate(mask, start=len(example.prompt_ids)):
                if scored:
                    yield number * most + index, example.prompt_ids + ids, place


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


def test_a_batch_with_masks_by_hand():
    first = TokenizedExample([10, 11], [[20, 21, 22], [30, 31]], 7, [[True, False, True], [False, True]])
    second = TokenizedExample([12], [[40, 41]], 9)
    batch = collate([first, second])
    assert batch.input_ids.tolist() == [10, 11, 20, 21, 22, 30, 31, 12, 40, 41]  # what is not scored is read
    assert batch.source.tolist() == [1, 3, 5, 7, 8]
    assert batch.target.tolist() == [20, 22, 31, 40, 41]
    assert batch.owner.tolist() == [0, 0, 1, 2, 2]
    assert batch.length.tolist() == [[2, 1], [2, 0]]


def test_a_batch_knows_the_numbers_of_responses_in_no_order():
    first, second = TokenizedExample([1], [[2]], 7, response=3), TokenizedExample([1], [[2]], 8)
    assert collate([first, second]).response.tolist() == [3, 0]
    assert collate([second]).response is None


def test_the_longest_sequence_may_be_another_than_the_longest_query():
    batch = collate([TokenizedExample([1, 2, 3], [[4], [5, 6, 7]], 1)])
    assert (batch.max_query, batch.max_key) == (4, 6)


def test_without_siblings_the_stream_itself_is_the_keys():
    batch = collate([TokenizedExample([1, 2], [[3]], 1), TokenizedExample([4], [[5, 6]], 2)])
    assert batch.key_index is None
    assert batch.spans.tolist() == [[0, 3, 0, 0], [3, 6, 3, 3]]
    assert batch.length.tolist() == [[1], [2]]


def test_pieces_have_the_k_of_their_batch():
    pair, lone = TokenizedExample([1, 2], [[3], [4, 5]], 1), TokenizedExample([6], [[7, 8]], 2)
    split = collate_pieces([[lone], [pair]], torch.tensor([1, 0]))
    assert [piece.length.tolist() for piece in split.pieces] == [[[2, 0]], [[1, 2]]]
    assert split.pieces[0].owner.tolist() == [0, 0]
    assert split.pieces[0].key_index is None
    assert split.joined([piece.row for piece in split.pieces]).tolist() == [1, 2]
    later = collate([lone, pair], 3)
    assert later.length.tolist() == [[2, 0, 0], [1, 2, 0]]
    assert later.owner.tolist() == [0, 0, 3, 4, 4]


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


@given(masked_examples())
@settings(derandomize=True, deadline=None, max_examples=100)
def test_stream_and_padded_rows_predict_every_scored_token_from_what_stands_before_it(examples):
    """Both give the model, for each scored token and no other, exactly prompt and response up to that token."""
    batch = collate(examples)
    rows, mask, predictor = padded_rows(batch)
    start, end, begin, stop = batch.spans.unbind(1)
    keys = batch.key_index if batch.key_index is not None else torch.arange(len(batch.input_ids))
    keys_of_sequence = keys.split((end - start + stop - begin).tolist())
    expected = list(scored_places(examples))
    assert len(expected) == len(batch.target) == len(batch.source) == len(batch.owner) == len(predictor)
    for number, (owner, whole, place) in enumerate(expected):
        assert batch.owner[number] == owner
        assert batch.target[number] == whole[place]

        row, column = divmod(predictor[number].item(), rows.shape[1])
        assert column == place - 1
        assert batch.input_ids[rows[row, : column + 1]].tolist() == whole[:place]
        assert mask[row].tolist() == [int(column < len(whole)) for column in range(rows.shape[1])]

        # In the stream a sequence sees its keys up to the position of its query.
        source, keys = batch.source[number], keys_of_sequence[row]
        assert (begin[row] <= source < stop[row]) or (start[row] <= source < end[row])
        assert batch.position_ids[source] == place - 1
        assert batch.input_ids[keys[:place]].tolist() == whole[:place]
        assert keys[place - 1] == source
        assert batch.position_ids[keys].tolist() == list(range(len(whole)))
    assert len(batch.input_ids) == sum(len(e.prompt_ids) + sum(map(len, e.response_ids)) for e in examples)


@given(masked_examples())
@settings(derandomize=True, deadline=None, max_examples=50)
def test_a_mask_of_all_is_no_mask(examples):
    bare = [example._replace(scored=None) for example in examples]
    masked = [e._replace(scored=[[True] * len(ids) for ids in e.response_ids]) for e in examples]
    for left, right in zip(collate(bare), collate(masked), strict=True):
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
