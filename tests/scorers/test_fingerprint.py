"""What a scorer is known by changes with its code, and not with what changes no score."""

import importlib
import sys
from dataclasses import dataclass, field

import pytest

from dpo_lightning.errors import UsageError
from dpo_lightning.scorers import Function, RewardModel, ScoreBook, Scorer, scores_of

CODE = """
from dataclasses import dataclass
from dpo_lightning.scorers import Scorer

@dataclass(frozen=True)
class Length(Scorer):
    sign: float = 1.0

    def score(self, prompts, responses):
        return [{} * self.sign * len(response) for response in responses]
"""


@dataclass(frozen=True)
class Twice(Scorer):
    inner: Scorer
    others: list = field(default_factory=list)

    def score(self, prompts, responses):
        return [2 * score for score in self.inner.score(prompts, responses)]


@dataclass(frozen=True)
class Few(Scorer):
    def score(self, prompts, responses):
        return [1.0] * (len(responses) - 1)


@pytest.fixture
def length(tmp_path, monkeypatch):
    """A function that writes a scorer's code and gives the scorer."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(factor):
        (tmp_path / "length_scorer.py").write_text(CODE.format(factor))
        sys.modules.pop("length_scorer", None)
        importlib.invalidate_caches()
        return importlib.import_module("length_scorer").Length

    yield make
    sys.modules.pop("length_scorer", None)


def test_scores_of_code_that_changed_are_not_kept(length, tmp_path):
    found = []
    for factor in ("1", "1", "-10"):
        with ScoreBook(length(factor)(), tmp_path / "kept.jsonl") as book:
            found.append(book.score(["", ""], ["a", "bb"]))
    assert found == [[1, 2], [1, 2], [-10, -20]]
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == 4


def test_the_code_of_a_scorer_within_another_counts_too(length):
    first, same, changed = (length(factor)() for factor in ("1", "1", "-10"))
    for wrap in (lambda scorer: Twice(scorer), lambda scorer: Twice(Function(path="builtins.len"), [scorer])):
        marks = []
        for factor, scorer in (("1", first), ("1", same), ("-10", changed)):
            length(factor)
            marks.append(wrap(scorer).fingerprint())
        assert marks[0] == marks[1] != marks[2]


def test_settings_count(length):
    cls = length("1")
    assert cls(2.0).fingerprint() != cls(1.0).fingerprint()


def test_where_and_in_what_batches_a_reward_model_runs_is_not_what_it_computes():
    marks = [RewardModel("here", batch_tokens=n, device=d).fingerprint() for n, d in ((10, None), (20, "cpu"))]
    assert marks[0] == marks[1] != RewardModel("here", dtype="bfloat16").fingerprint()


def test_too_few_numbers_are_refused_in_words():
    words = "Few gave 1 numbers for 2 responses; it must give one each"
    with pytest.raises(UsageError, match=words):
        ScoreBook(Few()).score(["", ""], ["a", "b"])
    with pytest.raises(UsageError, match=words):
        scores_of(Few(), ["", ""], ["a", "b"])
