"""The grammar is a fair test bed: neutral prompts, an even and unmixed corpus, and more to say than one sentence."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import pairwise
from math import comb

import pytest

from dpo_lightning.quickstart import grammar
from dpo_lightning.quickstart.grammar import NEGATIVE_WORDS, POSITIVE_WORDS, beginnings, corpus, is_held_out, sentiment

LEXICON = POSITIVE_WORDS | NEGATIVE_WORDS
HELD_OUT = [2, 3, 9, 10, 14]  # places among the first 20 beginnings


@pytest.fixture(scope="module")
def reviews() -> list[str]:
    return list(corpus(4000, seed=0))


def continuations(num: int, seed: int) -> list[str]:
    """Rests of reviews, behind a beginning that is the same for all."""
    rng = random.Random(seed)
    return [grammar.review("The plot", rng).removeprefix("The plot") for _ in range(num)]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0.0),
        ("The plot was long.", 0.0),
        ("The plot was superb.", 1.0),
        ("The plot was dull.", -1.0),
        ("The plot was superb and dull.", 0.0),
        ("A triumph: superb, fresh, and yet dull.", 0.5),  # (3 - 1) / (3 + 1)
        ("Dull, dull and dull; what a joy.", -0.5),  # repetitions count: (1 - 3) / (1 + 3)
        ("SUPERB! Joy!", 1.0),  # neither case nor punctuation matters
        ("The gems glow joylessly.", 0.0),  # gem, glowed and joy count as whole words only
    ],
)
def test_sentiment_matches_hand_computation(text: str, expected: float) -> None:
    assert sentiment(text) == expected


def test_every_beginning_is_neutral_and_none_continues_another() -> None:
    prompts = beginnings()
    assert all(sentiment(prompt) == 0.0 for prompt in prompts)
    assert all(LEXICON.isdisjoint(words(prompt)) for prompt in prompts)  # not just as many of one sign as the other
    assert all(prompt == prompt.strip() for prompt in prompts)
    assert not any(after.startswith(before) for before, after in pairwise(sorted(prompts)))


def test_only_the_lexicon_carries_sentiment() -> None:
    """Filler that contained a lexicon word would give a review a sentiment that its coin did not choose."""
    filler = [option for options in grammar.NEUTRAL.values() for option in options]
    assert all(LEXICON.isdisjoint(words(re.sub(r"\{\w+\}", "", option))) for option in filler)
    assert POSITIVE_WORDS.isdisjoint(NEGATIVE_WORDS)
    assert grammar.POSITIVE.keys() == grammar.NEGATIVE.keys()  # a missing slot would tell sentiment by its template


def test_a_review_is_its_beginning_a_space_and_full_sentences_of_one_sentiment(reviews: list[str]) -> None:
    for text in reviews:
        assert abs(sentiment(text)) == 1.0, text
    for rest in continuations(1000, seed=1):
        assert re.fullmatch(r" [a-z][^.{}]*(\. [A-Z][^.{}]*)*\.", rest), rest
        assert "  " not in rest, rest
        assert not re.search(r"\ba [aeiou]|\b(\w+) \1\b", rest), rest  # "a awful", "the the"


def test_a_review_never_repeats_a_word_of_the_lexicon(reviews: list[str]) -> None:
    """So a policy that stutters ("superb, superb") to raise its score has left the language of its training."""
    for text in reviews:
        assert max(Counter(word for word in words(text) if word in LEXICON).values()) == 1, text


def test_the_coin_is_fair(reviews: list[str]) -> None:
    positive = sum(sentiment(text) > 0 for text in reviews) / len(reviews)
    assert 0.47 < positive < 0.53  # 3.8 standard deviations of 4,000 coins


def test_the_corpus_is_determined_by_its_seed(reviews: list[str]) -> None:
    assert list(corpus(100, seed=0)) == reviews[:100]
    assert list(corpus(100, seed=1)) != reviews[:100]


def test_a_fifth_of_the_beginnings_is_held_out_and_never_in_the_corpus(reviews: list[str]) -> None:
    held_out = tuple(prompt for prompt in beginnings() if is_held_out(prompt))
    assert 0.17 < len(held_out) / len(beginnings()) < 0.23
    assert not any(text.startswith(held_out) for text in reviews)
    # Known from before, as a split that moved would leak held-out beginnings into the training of older checkpoints.
    assert [place for place, prompt in enumerate(beginnings()[:20]) if is_held_out(prompt)] == HELD_OUT


@pytest.mark.parametrize("sign", [1, -1])
def test_each_sentiment_has_at_least_100_000_continuations(sign: int) -> None:
    """Two draws coincide with probability sum(p^2), which is at least 1 / (number of continuations)."""
    drawn = [rest for rest in continuations(20_000, seed=2) if sentiment(rest) == sign]
    coincidences = sum(comb(count, 2) for count in Counter(drawn).values())
    assert comb(len(drawn), 2) > 100_000 * coincidences


def test_words_are_many_for_a_reader_and_few_for_a_small_model(reviews: list[str]) -> None:
    seen = {word for text in reviews for word in words(text)}
    assert seen >= LEXICON  # every word of the lexicon can be learned
    assert min(len(POSITIVE_WORDS), len(NEGATIVE_WORDS)) >= 25
    assert len(seen | {word for prompt in beginnings() for word in words(prompt)}) <= 350


def test_continuations_are_of_a_readable_length() -> None:
    lengths = sorted(len(words(rest)) for rest in continuations(2000, seed=3))
    assert lengths[0] >= 3
    assert lengths[-1] <= 40
    assert lengths[len(lengths) // 4] >= 10
    assert lengths[len(lengths) * 3 // 4] <= 25
