import json
from dataclasses import dataclass

import pytest

from dpo_lightning.errors import UsageError
from dpo_lightning.evaluation.sides import Matched
from dpo_lightning.evaluation.statistics import rate_interval
from dpo_lightning.evaluation.win_rate import in_words, summary, win_rate
from dpo_lightning.judges import Judge
from dpo_lightning.scorers import Function
from dpo_lightning.tools import run_tool


@dataclass(frozen=True)
class MoreOf(Judge):
    """The response with more of a letter is better; of ones with a question mark nobody can tell."""

    letter: str = "a"

    def compare(self, comparisons, answers=None):
        with answers.open("a") as file:
            file.write(f"{len(comparisons)} asked\n")
        return [self._verdict(one.first, one.second) for one in comparisons]

    def _verdict(self, first, second):
        gap = first.count(self.letter) - second.count(self.letter)
        return None if "?" in first + second else 0.5 if gap == 0 else float(gap > 0)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sampled(row, prompt, responses, temperature=1.0):
    return {"row": row, "prompt": prompt, "temperature": temperature, "responses": responses,
            "tokens": [len(text) + 1 for text in responses], "finished": [True] * len(responses)}  # fmt: skip


GIVEN = [{"prompt": "one", "chosen": "ab", "rejected": "b"}, {"prompt": "two", "chosen": "b", "rejected": "aa"}]
SAMPLES = [
    sampled(1, "one", ["aa", "b?"], 0.5), sampled(2, "two", ["b", "aab"], 0.5),
    sampled(1, "one", ["b", "ba"], 1.0), sampled(2, "two", ["a", "a"], 1.0),
]  # fmt: skip
LENGTH = Function(path="builtins.len")


def run(tmp_path, samples, against, **options):
    result, verdicts = win_rate(samples, against, str(tmp_path / "out/rate.json"), judge=MoreOf(), **options)
    return json.loads(result.read_text()), [json.loads(line) for line in verdicts.read_text().splitlines()]


def test_a_row_a_temperature_by_hand(tmp_path):
    samples, against = lines(tmp_path / "samples.jsonl", SAMPLES), lines(tmp_path / "given.jsonl", GIVEN)
    result, verdicts = run(tmp_path, samples, against)
    cold, warm = result["rows"]
    assert (cold["temperature"], warm["temperature"]) == (0.5, 1.0)
    # against ab and b: aa wins, b? cannot be read, b ties, aab wins
    assert (cold["wins"], cold["ties"], cold["losses"], cold["unreadable"]) == (2, 1, 0, 1)
    assert cold["win_rate"] == pytest.approx(2.5 / 3)
    assert cold["interval"] == pytest.approx(list(rate_interval([1, 0.5, 1], [1, 2, 2])))
    assert (cold["compared"], cold["prompts"]) == (3, 2)
    # b loses, ba ties, a and a win
    assert (warm["wins"], warm["ties"], warm["losses"], warm["win_rate"]) == (2, 1, 1, 0.625)
    assert warm["length"] == {
        "tokens": 2.25, "tokens_against": None, "characters": 1.25, "characters_against": 1.5, "share_longer": 0.0,
    }  # fmt: skip
    assert (warm["of_like_length"]["win_rate"], warm["of_like_length"]["compared"]) == (pytest.approx(2.5 / 3), 3)
    assert [line["verdict"] for line in verdicts] == [1, None, 0.5, 1, 0, 0.5, 1, 1]
    assert (verdicts[3]["row"], verdicts[3]["sample"], verdicts[3]["first"], verdicts[3]["second"]) == (
        2,
        2,
        "aab",
        "b",
    )
    assert (tmp_path / "out/rate.answers.jsonl").read_text() == "8 asked\n"
    assert cold["without_partner"] == {"samples": 0, "against": 0}
    assert result["settings"].pop("judge")["init_args"] == {"letter": "a"}
    assert result["settings"] == {
        "samples": samples, "against": against, "column": "chosen", "samples_column": "chosen",
        "prompt_column": "prompt", "against_temperature": None, "chooser": None,
    }  # fmt: skip


def test_the_best_of_n_by_hand(tmp_path):
    samples, against = lines(tmp_path / "samples.jsonl", SAMPLES), lines(tmp_path / "given.jsonl", GIVEN)
    choice = {"chooser": LENGTH, "best_of": [2, 1]}
    result, verdicts = run(tmp_path, samples, against, **choice)
    first, longest = verdicts[:4], verdicts[4:]
    assert [(line["first"], line["best_of"], line["verdict"]) for line in first] == [
        ("aa", 1, 1), ("b", 1, 0.5), ("b", 1, 0), ("a", 1, 1),
    ]  # fmt: skip
    # b? is as long as aa, which comes before it
    assert [(line["first"], line["sample"], line["best_of"], line["verdict"]) for line in longest] == [
        ("aa", 1, 2, 1), ("aab", 2, 2, 1), ("ba", 2, 2, 0.5), ("a", 1, 2, 1),
    ]  # fmt: skip
    assert [(row["best_of"], row["temperature"], row["win_rate"], row["compared"]) for row in result["rows"]] == [
        (1, 0.5, 0.75, 2), (1, 1.0, 0.5, 2), (2, 0.5, 1.0, 2), (2, 1.0, 0.75, 2),
    ]  # fmt: skip
    assert result["settings"]["chooser"]["init_args"]["path"] == "builtins.len"
    kept = (tmp_path / "out/rate.scores.jsonl").read_text()
    assert len(kept.splitlines()) == 7  # a and a of a prompt are one
    run(tmp_path, samples, against, **choice)
    assert (tmp_path / "out/rate.scores.jsonl").read_text() == kept


def test_prompts_are_matched_by_their_words_where_rows_differ(tmp_path):
    against = lines(tmp_path / "given.jsonl", [GIVEN[1], {"prompt": "three", "chosen": "aaaa"}, GIVEN[0]])
    _, verdicts = run(tmp_path, lines(tmp_path / "samples.jsonl", SAMPLES), against)
    assert [line["verdict"] for line in verdicts] == [1, None, 0.5, 1, 0, 0.5, 1, 1]


def test_whole_dialogues_without_a_column_of_prompts_are_matched_by_row_and_lose_the_prompt(tmp_path):
    against = lines(tmp_path / "given.jsonl", [{"chosen": "oneab"}, {"chosen": "twob"}])
    _, verdicts = run(tmp_path, lines(tmp_path / "samples.jsonl", SAMPLES), against)
    assert [line["second"] for line in verdicts[:3]] == ["ab", "ab", "b"]


def test_samples_against_samples_the_nth_with_the_nth(tmp_path):
    samples = lines(tmp_path / "samples.jsonl", SAMPLES)
    with pytest.raises(UsageError, match=r"temperatures 0\.5, 1; choose one by --against_temperature"):
        run(tmp_path, samples, samples)
    result, verdicts = run(tmp_path, samples, samples, against_temperature=1.0)
    assert [line["second"] for line in verdicts[:4]] == ["b", "ba", "a", "a"]
    assert result["rows"][1]["win_rate"] == 0.5
    assert result["rows"][1]["ties"] == 4
    assert result["rows"][1]["length"]["tokens_against"] == 2.25


def test_samples_without_a_partner_are_counted_and_said(tmp_path, capsys):
    many = [
        sampled(1, "one", ["aa", "b", "a", "a"]),
        sampled(2, "two", ["a", "a", "a"]),
        sampled(1, "one", [""], 0),
    ]
    few = lines(tmp_path / "few.jsonl", [sampled(1, "one", ["a", "b"]), sampled(2, "two", ["b"])])
    result, verdicts = run(tmp_path, lines(tmp_path / "many.jsonl", many), few, against_temperature=1.0)
    # the third and the fourth of one have none; the three of two share the only one; the first alone is met at 0
    assert [row["without_partner"] for row in result["rows"]] == [
        {"samples": 2, "against": 0},
        {"samples": 0, "against": 1},
    ]
    assert [row["compared"] for row in result["rows"]] == [5, 1]
    assert len(verdicts) == 6
    assert result["settings"]["against_temperature"] == 1
    warm, cold = capsys.readouterr().out.splitlines()
    assert warm.endswith("   without a partner 2 of the samples")
    assert cold.endswith("   without a partner 1 of the other side")
    both = summary([Matched(1, 1, 1.0, "p", "a", "b", (1, 1))], [1]) | {
        "temperature": 1, "best_of": None, "without_partner": {"samples": 3, "against": 4}
    }  # fmt: skip
    assert in_words(both).endswith("without a partner 3 of the samples and 4 of the other side")


def test_two_columns_of_one_file_are_compared_and_messages_are_answers(tmp_path):
    pairs = [{"input": "one", "good": [{"role": "assistant", "content": "aa"}], "bad": "b"}]
    path = lines(tmp_path / "pairs.jsonl", pairs)
    result, verdicts = run(tmp_path, path, path, samples_column="bad", column="good", prompt_column="input")
    assert (verdicts[0]["first"], verdicts[0]["second"], verdicts[0]["prompt"]) == ("b", "aa", "one")
    assert (result["rows"][0]["win_rate"], result["rows"][0]["temperature"]) == (0.0, None)


def test_answers_stay_for_a_run_that_goes_on_and_go_when_it_begins_anew(tmp_path):
    samples, against = lines(tmp_path / "samples.jsonl", SAMPLES), lines(tmp_path / "given.jsonl", GIVEN)
    for overwrite, expected in ((False, 1), (False, 2), (True, 1)):
        run(tmp_path, samples, against, overwrite=overwrite)
        assert (tmp_path / "out/rate.answers.jsonl").read_text().count("asked") == expected


@pytest.mark.parametrize(
    ("against", "options", "message"),
    [
        ([{"prompt": "one", "chosen": "a"}], {}, r"given\.jsonl has no response to prompt 2, 'two'"),
        ([{"prompt": "one"}], {}, "row 1: column 'chosen' must hold a response"),
        (SAMPLES, {"against_temperature": 0.7}, r"no samples of temperature 0\.7, but of 0\.5, 1"),
        (GIVEN, {"against_temperature": 0.7}, "is no file of samples"),
        (GIVEN, {"best_of": [1, 3], "chooser": LENGTH}, "`best_of` 3 needs .* and prompt 1 has 2"),
        (GIVEN, {"best_of": [2]}, r"`best_of` \[2\] needs a `chooser`"),
        (GIVEN, {"chooser": LENGTH}, "say of how many by `best_of`, .*, got None"),
        (GIVEN, {"best_of": [0, 1], "chooser": LENGTH}, r"numbers of 1 or more .*, got \[0, 1\]"),
    ],
)
def test_refusals(tmp_path, against, options, message):
    samples = lines(tmp_path / "samples.jsonl", SAMPLES)
    with pytest.raises(UsageError, match=message):
        run(tmp_path, samples, lines(tmp_path / "given.jsonl", against), **options)


def test_rows_of_one_prompt_are_one_prompt():
    prompts = ["p", [{"role": "user", "content": "p"}], "p", "q"]
    matched = [Matched(row, 1, 1.0, prompt, "a", "b", (1, 1)) for row, prompt in enumerate(prompts, start=1)]
    found = summary(matched, [1, 1, 1, 0])
    expected = list(rate_interval([1, 1, 1, 0], [1, 1, 1, 2]))
    assert (found["interval"], found["of_like_length"]["interval"], found["prompts"]) == (expected, expected, 2)


def test_nothing_readable_has_no_rate():
    found = summary([Matched(1, 1, 1.0, "p", "a", "b", (1, 1))], [None])
    assert (found["win_rate"], found["interval"], found["compared"], found["unreadable"]) == (None, None, 0, 1)


def test_from_the_command_line(tmp_path, capsys):
    samples, against = lines(tmp_path / "samples.jsonl", SAMPLES), lines(tmp_path / "given.jsonl", GIVEN)
    judge = ["--judge", "evaluation.test_win_rate.MoreOf", "--judge.letter", "b"]
    run_tool("evaluate", ["win_rate", samples, against, f"{tmp_path}/rate.json", *judge, "--column", "rejected"])
    printed = capsys.readouterr().out
    assert "temperature 0.5    win rate" in printed
    assert "partner" not in printed
    assert f"Written: {tmp_path}/rate.verdicts.jsonl" in printed
    best = ["--best_of", "[1,2]", "--chooser", "Function", "--chooser.path", "builtins.len"]
    run_tool("evaluate", ["win_rate", samples, against, f"{tmp_path}/best.json", *judge, *best])
    assert "temperature 0.5, best of 2   win rate" in capsys.readouterr().out
