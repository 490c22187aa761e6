import json

import pytest

from dpo_lightning.errors import UsageError
from dpo_lightning.evaluation.agreement import agreement
from dpo_lightning.evaluation.statistics import rate_interval
from dpo_lightning.evaluation.verdicts import read_ratings
from dpo_lightning.tools import run_tool


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def by_row(path, verdicts):
    return lines(path, [{"row": row, "verdict": verdict} for row, verdict in enumerate(verdicts, start=1)])


def run(tmp_path, *files, **options):
    return json.loads(agreement(list(files), str(tmp_path / "out/agreement.json"), **options).read_text())


def test_by_hand(tmp_path):
    a = by_row(tmp_path / "a.jsonl", [1, 1, 0, 0, 0.5, None, 1])
    b = by_row(tmp_path / "b.jsonl", [1, 0, 0, 0, 1, 1])
    (pair,) = run(tmp_path, a, b)["pairs"]
    assert pair["raters"] == ["a", "b"]
    assert pair["agreement"] == pytest.approx(3.5 / 5)
    assert pair["interval"] == pytest.approx(list(rate_interval([1, 0, 1, 1, 0.5], range(5))))
    assert (pair["compared"], pair["without_verdict"], pair["not_in_both"]) == (5, 1, 1)
    assert pair["without_ties"] == {"agreement": 0.75, "compared": 4}
    # a: 2, 1, 2 of 5 say 1, tie, 0; b: 2, 0, 3. By chance (2*2 + 2*3)/25 the same, (1*2 + 1*3)/25 half the same
    assert pair["kappa"] == pytest.approx((0.7 - 12.5 / 25) / (1 - 12.5 / 25))


def test_three_raters_make_three_pairs_and_a_matrix(tmp_path, capsys):
    files = [by_row(tmp_path / f"{name}.jsonl", values) for name, values in
             [("gpt", [1, 0, 1, 1]), ("concise", [1, 1, 1, 1]), ("people", [1, 0, 1, 0])]]  # fmt: skip
    run_tool("evaluate", ["agreement", *files, f"{tmp_path}/out.json"])
    result = json.loads((tmp_path / "out.json").read_text())
    assert [pair["agreement"] for pair in result["pairs"]] == [0.75, 0.75, 0.5]
    assert result["pairs"][1]["raters"] == ["gpt", "people"]
    printed = capsys.readouterr().out
    assert "gpt and people: 75.0% (30.1% to 95.4%) of 4, kappa 0.500" in printed


def test_verdicts_of_a_judge_against_labels_of_people_in_whichever_order(tmp_path):
    people = [
        {"input": "one", "output_1": "x", "output_2": "y", "label": 1},
        {"input": "two", "output_1": "x", "output_2": "y", "label": 2},
        {"input": "three", "output_1": "p", "output_2": "q", "label": 2},
        {"input": "four", "output_1": "p", "output_2": "q", "label": "tie"},
    ]
    judge = [
        {"prompt": "three", "first": "q", "second": "p", "verdict": 1},  # as people say
        {"prompt": "two", "first": "x", "second": "y", "verdict": 1},  # not so
        {"prompt": "one", "first": "y", "second": "x", "verdict": 0},  # as people say
        {"prompt": [{"role": "user", "content": "four"}], "first": "q", "second": "p", "verdict": 0.5},
    ]
    (pair,) = run(tmp_path, lines(tmp_path / "judge.jsonl", judge), lines(tmp_path / "people.jsonl", people))["pairs"]
    assert (pair["agreement"], pair["compared"], pair["not_in_both"]) == (0.75, 4, 0)


def test_pairs_of_chosen_and_rejected_are_verdicts_too(tmp_path):
    pairs = lines(tmp_path / "pairs.jsonl", [{"prompt": "one", "chosen": "b", "rejected": "a"}])
    judge = lines(tmp_path / "judge.jsonl", [{"prompt": "one", "first": "a", "second": "b", "verdict": 0}])
    assert run(tmp_path, pairs, judge)["pairs"][0]["agreement"] == 1
    assert [(one.value, one.by_text) for one in read_ratings(pairs)] == [(1, 0)]  # of "a" and "b" in this order


def test_several_samples_of_a_prompt_are_told_apart_by_their_texts(tmp_path):
    rows = [{"prompt": "one", "first": text, "second": "x", "verdict": value} for text, value in [("a", 1), ("b", 0)]]
    files = [lines(tmp_path / name, rows) for name in ("a.jsonl", "b.jsonl")]
    assert run(tmp_path, *files, names=["mine", "yours"])["pairs"][0] == {
        **{"raters": ["mine", "yours"], "agreement": 1.0, "kappa": 1.0, "compared": 2, "without_verdict": 0},
        **{"not_in_both": 0, "without_ties": {"agreement": 1.0, "compared": 2}},
        "interval": list(rate_interval([1, 1], [0, 0])),
    }


def test_pairs_and_comparisons_that_a_judge_labelled_are_labels_with_texts(tmp_path):
    def pair(prompt, chosen, rejected, verdict=1.0):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "row": 1, "verdict": verdict}

    a = lines(tmp_path / "a.jsonl", [pair("one", "x", "y"), pair("one", "x", "z"), pair("two", "p", "q", 0.75)])
    b = lines(tmp_path / "b.jsonl", [pair("one", "y", "x"), pair("one", "z", "x"), pair("two", "p", "q")])
    (found,) = run(tmp_path, a, b)["pairs"]
    assert (found["agreement"], found["compared"]) == (pytest.approx(0.75 / 3), 3)
    assert found["without_ties"] == {"agreement": pytest.approx(1 / 3), "compared": 3}

    def comparison(first, second, verdict):
        word = "tie" if verdict == 0.5 else "output_1" if verdict > 0.5 else "output_2"
        texts = {"output_1": first, "output_2": second}
        return {"prompt": "one", "label": word, "row": 1, "verdict": verdict, **texts}

    c = lines(tmp_path / "c.jsonl", [comparison("y", "x", 0.25), comparison("x", "z", 0.5), comparison("y", "z", 1.0)])
    (found,) = run(tmp_path, a, c)["pairs"]  # x over y by 0.75, x and z tie
    assert (found["agreement"], found["compared"], found["not_in_both"]) == (pytest.approx((0.75 + 0.5) / 2), 2, 2)
    assert [(one.value, one.by_text) for one in read_ratings(c)] == [(0.25, 0.75), (0.5, 0.5), (1.0, 1.0)]


def test_a_rater_known_by_rows_alone_is_held_against_the_order_of_the_file(tmp_path):
    rows = [("b", "a", 1), ("a", "b", 2), ("b", "a", 2)]
    people = [{"prompt": f"p{i}", "output_1": x, "output_2": y, "label": z} for i, (x, y, z) in enumerate(rows)]
    texts = [{"row": 1, "prompt": "p", "first": "b", "second": "a", "verdict": 1}]
    by = by_row(tmp_path / "judge.jsonl", [1, 0, 0])
    for rater, compared in ((people, 3), (texts, 1)):
        (found,) = run(tmp_path, by, lines(tmp_path / "people.jsonl", rater))["pairs"]
        assert (found["agreement"], found["compared"]) == (1.0, compared)


def test_quarters_lean_to_a_response(tmp_path):
    a, b = by_row(tmp_path / "a.jsonl", [0.75, 0.25, 0.75, 0.5]), by_row(tmp_path / "b.jsonl", [1, 0.75, 0.75, 0.75])
    (pair,) = run(tmp_path, a, b)["pairs"]
    assert pair["agreement"] == pytest.approx((0.75 + 0.5 + 1 + 0.75) / 4)
    assert pair["without_ties"] == {"agreement": pytest.approx(2 / 3), "compared": 3}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([{"row": 1, "verdict": 2}], [{"row": 1, "verdict": 1}], r"a\.jsonl, row 1: 'verdict' must be 1, 0, 0\.5"),
        ([{"row": 1, "verdict": True}], [{"row": 1, "verdict": 1}], "got True"),
        ([{"verdict": 1}], [{"row": 1, "verdict": 1}], "to be known by"),
        ([{"row": 1, "verdict": 1}], [{"row": 2, "verdict": 1}], "no comparison in common"),
        ([{"row": 1, "verdict": 1}], [{"row": 1, "verdict": None}], "no comparison in common"),
        ([{"row": 1, "verdict": 1}], [{"prompt": "one", "verdict": 1}], "by different things"),
        ([{"row": 1, "verdict": 1}] * 2, [{"row": 1, "verdict": 1}], "a has two verdicts of the row 1"),
        ([], [{"row": 1, "verdict": 1}], "holds no verdicts"),
    ],
)
def test_refusals(tmp_path, first, second, message):
    with pytest.raises(UsageError, match=message):
        run(tmp_path, lines(tmp_path / "a.jsonl", first), lines(tmp_path / "b.jsonl", second))


def test_one_rater_agrees_with_nobody(tmp_path):
    path = by_row(tmp_path / "a.jsonl", [1])
    with pytest.raises(UsageError, match="two raters or more"):
        run(tmp_path, path)
    with pytest.raises(UsageError, match="named twice"):
        run(tmp_path, path, path)
