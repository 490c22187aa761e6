import pytest

from dpo_lightning.errors import UsageError
from dpo_lightning.judges import ByScore, Comparison
from dpo_lightning.scorers import Function

COMPARISONS = [Comparison("p", "aaa", "a"), Comparison("p", "a", "aa"), Comparison("q", "aa", "bb")]


@pytest.mark.parametrize(("margin", "verdicts"), [(0.0, [1.0, 0.0, 0.5]), (1.0, [1.0, 0.5, 0.5]), (2.0, [0.5] * 3)])
def test_the_higher_score_is_better_and_what_is_within_the_margin_ties(margin, verdicts, tmp_path):
    judge = ByScore(scorer=Function(path="builtins.len"), margin=margin)
    assert judge.compare(COMPARISONS, tmp_path / "answers.jsonl") == verdicts
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 5  # of six, two are one
    assert judge.compare(COMPARISONS) == verdicts


def test_a_negative_margin_is_refused():
    with pytest.raises(UsageError, match="`margin` must not be negative"):
        ByScore(scorer=Function(path="builtins.len"), margin=-1.0)
