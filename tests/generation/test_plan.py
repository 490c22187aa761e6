"""Every prompt is in one chunk a temperature, beside others of its length, whoever makes it."""

import random

import pytest

from dpo_lightning.errors import UsageError
from dpo_lightning.generation.plan import Sampling, plan, seed_of


@pytest.mark.parametrize(("batch_size", "batch_tokens"), [(8, 10_000), (1, 10_000), (64, 300), (64, 1)])
def test_chunks_hold_every_prompt_once_a_temperature_within_bounds(batch_size, batch_tokens):
    lengths = [random.Random(number).randint(1, 60) for number in range(101)]
    sampling = Sampling(num_samples=4, temperatures=(1.0, 0.5), max_new_tokens=10)
    chunks = plan(lengths, sampling, batch_size, batch_tokens)
    for temperature in sampling.temperatures:
        mine = [chunk for chunk in chunks if chunk.temperature == temperature]
        assert sorted(place for chunk in mine for place in chunk.places) == [*range(101)]
        longest = [max(lengths[place] for place in chunk.places) for chunk in mine]
        assert longest == sorted(longest, reverse=True)
        for chunk, length in zip(mine, longest, strict=True):
            completions = 4 * len(chunk.places)
            assert len(chunk.places) == 1 or (completions <= batch_size and completions * (length + 10) <= batch_tokens)
    assert len({chunk.seed for chunk in chunks}) == len(chunks)


def test_by_length_little_is_padding():
    lengths = [1 + number % 100 for number in range(1000)]
    chunks = plan(lengths, Sampling(num_samples=1), 50, 1_000_000)
    slots = sum(len(chunk.places) * max(lengths[place] for place in chunk.places) for chunk in chunks)
    assert slots < 1.1 * sum(lengths)


def test_a_seed_is_of_a_chunk_of_a_temperature_of_a_call():
    seeds = {seed_of(seed, temperature, number) for seed in (0, 1) for temperature in (0.7, 1) for number in range(50)}
    assert len(seeds) == 200
    assert seed_of(0, 1, 3) == seed_of(0, 1.0, 3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_samples": 0}, "--num_samples must be 1 or more, got 0"),
        ({"max_new_tokens": 0}, "--max_new_tokens must be 1 or more"),
        ({"temperatures": ()}, "--temperatures are one or more numbers"),
        ({"temperatures": (1.0, -1.0)}, r"0 or more, got \[1.0, -1.0\]"),
        ({"temperatures": (1.0, 1.0)}, "names one of them twice"),
        ({"temperatures": (1.0, 0.0)}, "4 completions of a prompt would be the same one: give --num_samples 1"),
        ({"top_p": 0.0}, "--top_p is a probability above 0"),
        ({"top_p": 1.1}, "--top_p is a probability above 0"),
        ({"stop": ("",)}, "--stop must not be empty"),
    ],
)
def test_what_cannot_be_sampled_is_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        Sampling(**settings)
