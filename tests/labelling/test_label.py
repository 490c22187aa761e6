import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from chat_server import ChatServer, Reply, first_shown, longer, shown
from sample_files import row, rows, write
from transformers import AutoTokenizer

from dpo_lightning import PreferenceDataModule
from dpo_lightning.errors import UsageError
from dpo_lightning.judges import ByScore, LLMJudge
from dpo_lightning.labelling import BradleyTerry, label
from dpo_lightning.scorers import Function, Scorer
from dpo_lightning.server.asking import EASY

LENGTH = Function(path="builtins.len")  # of prompt and response: all prompts of a row are equally long
MESSAGES = [{"role": "user", "content": "how was the film"}]


@dataclass(frozen=True)
class OfResponse(Scorer):
    """Length of the response alone, for prompts that are messages."""

    def score(self, prompts, responses):
        return [float(len(response)) for response in responses]


@pytest.fixture
def samples(tmp_path):
    return write(
        tmp_path / "samples.jsonl", row(1, ["a", "bbb", "cc", "dd"]), row(2, ["x", "yy", "x", "x"]), row(3, ["z", "z"])
    )


def test_pairs(samples, tmp_path, capsys):
    out = tmp_path / "pairs.jsonl"
    assert label(samples, str(out), labeller=LENGTH) == out
    found = rows(out)
    assert [(one["chosen"], one["rejected"]) for one in found] == [
        ("bbb", "a"), ("cc", "a"), ("dd", "a"), ("bbb", "cc"), ("bbb", "dd"), ("yy", "x"),
    ]  # fmt: skip
    assert found[0] == {
        "prompt": "prompt 1: ", "chosen": "bbb", "rejected": "a", "row": 1, "temperature": 1.0,
        "chosen_score": 13.0, "rejected_score": 11.0,
    }  # fmt: skip
    report = " ".join(capsys.readouterr().out.split())
    for said in (
        "prompts 3 responses 10 duplicates 3 left out prompts with fewer than two 1 left out",
        "compared pairs 7 ties 1 left out",
        "pairs 6 written",
        f"mean score of the better {(13 * 3 + 12 * 3) / 6:.3f} mean score of the worse {(11 * 4 + 12 * 2) / 6:.3f}",
    ):
        assert said in report


def test_comparisons_keep_ties(samples, tmp_path):
    label(samples, str(tmp_path / "out.jsonl"), labeller=LENGTH, make="comparisons")
    found = rows(tmp_path / "out.jsonl")
    assert [(one["output_1"], one["output_2"], one["label"]) for one in found] == [
        ("a", "bbb", "output_2"), ("a", "cc", "output_2"), ("a", "dd", "output_2"), ("bbb", "cc", "output_1"),
        ("bbb", "dd", "output_1"), ("cc", "dd", "tie"), ("x", "yy", "output_2"),
    ]  # fmt: skip
    assert found[0]["output_1_score"] == 11.0
    assert found[5]["verdict"] == 0.5


def test_rankings_are_best_first_with_their_scores(samples, tmp_path):
    label(samples, str(tmp_path / "out.jsonl"), labeller=LENGTH, make="rankings")
    first, second = rows(tmp_path / "out.jsonl")
    assert first["responses"] == ["bbb", "cc", "dd", "a"]
    assert first["scores"] == [13.0, 12.0, 12.0, 11.0]
    assert second["responses"] == ["yy", "x"]


def test_the_best_and_the_worst_and_some_at_random(tmp_path):
    samples = write(tmp_path / "samples.jsonl", *(row(n, ["a", "bbb", "cc", "dddd"]) for n in range(1, 21)))
    label(samples, str(tmp_path / "ends.jsonl"), labeller=LENGTH, pairs="best_worst")
    assert {(one["chosen"], one["rejected"]) for one in rows(tmp_path / "ends.jsonl")} == {("dddd", "a")}
    label(samples, str(tmp_path / "some.jsonl"), labeller=LENGTH, pairs="random", num_pairs=2)
    some = rows(tmp_path / "some.jsonl")
    assert [one["row"] for one in some] == [n for n in range(1, 21) for _ in range(2)]
    assert len({(one["row"], one["chosen"], one["rejected"]) for one in some}) == 40
    assert len({(one["chosen"], one["rejected"]) for one in some}) == 6
    label(samples, str(tmp_path / "other.jsonl"), labeller=LENGTH, pairs="random", num_pairs=2, seed=1)
    assert rows(tmp_path / "other.jsonl") != some
    label(samples, str(tmp_path / "many.jsonl"), labeller=LENGTH, pairs="random", num_pairs=99)
    assert len(rows(tmp_path / "many.jsonl")) == 120


def test_temperatures_are_apart_unless_they_are_pooled(tmp_path):
    samples = write(
        tmp_path / "samples.jsonl", row(1, ["a", "bb"]), row(1, ["ccc", "bb"], temperature=0.5), row(2, ["a", "bb"])
    )
    label(samples, str(tmp_path / "apart.jsonl"), labeller=LENGTH)
    found = rows(tmp_path / "apart.jsonl")
    assert [(one["row"], one["temperature"], one["chosen"], one["rejected"]) for one in found] == [
        (1, 1.0, "bb", "a"), (1, 0.5, "ccc", "bb"), (2, 1.0, "bb", "a")
    ]  # fmt: skip
    label(samples, str(tmp_path / "pooled.jsonl"), labeller=LENGTH, pool=True)
    pooled = rows(tmp_path / "pooled.jsonl")
    assert [(one["chosen"], one["rejected"]) for one in pooled] == [
        ("bb", "a"),
        ("ccc", "a"),
        ("ccc", "bb"),
        ("bb", "a"),
    ]
    assert "temperature" not in pooled[0]


def test_unfinished_responses_are_kept_and_said_or_dropped(tmp_path, capsys):
    samples = write(tmp_path / "samples.jsonl", row(1, ["a", "bb", "ccc"], finished=[True, False, True]))
    label(samples, str(tmp_path / "kept.jsonl"), labeller=LENGTH)
    assert len(rows(tmp_path / "kept.jsonl")) == 3
    assert "unfinished 1 kept; training reads them as if they ended" in " ".join(capsys.readouterr().out.split())
    label(samples, str(tmp_path / "dropped.jsonl"), labeller=LENGTH, unfinished="drop")
    assert len(rows(tmp_path / "dropped.jsonl")) == 1
    assert "unfinished 1 left out" in " ".join(capsys.readouterr().out.split())


def test_responses_without_a_word_are_left_out(tmp_path, capsys):
    samples = write(tmp_path / "samples.jsonl", row(1, ["a", "", "bb", " \n"]), row(2, ["", "x"]))
    label(samples, str(tmp_path / "out.jsonl"), labeller=LENGTH)
    assert [(one["chosen"], one["rejected"]) for one in rows(tmp_path / "out.jsonl")] == [("bb", "a")]
    assert "without a word 3 left out prompts with fewer than two 1" in " ".join(capsys.readouterr().out.split())


def test_labels_drawn_at_the_odds_of_scores(tmp_path, capsys):
    many = 2000
    samples = write(tmp_path / "samples.jsonl", *(row(n, ["a", "bb", "dddd"], prompt="p") for n in range(1, many + 1)))
    drawn = BradleyTerry(scorer=LENGTH, temperature=2.0)
    label(samples, str(tmp_path / "out.jsonl"), labeller=drawn, make="comparisons")
    for first, second in (("a", "bb"), ("a", "dddd"), ("bb", "dddd")):
        labels = [
            one["label"]
            for one in rows(tmp_path / "out.jsonl")
            if (one["output_1"], one["output_2"]) == (first, second)
        ]
        expected = 1 / (1 + math.exp((len(second) - len(first)) / 2.0))
        error = math.sqrt(expected * (1 - expected) / many)
        assert labels.count("output_1") / many == pytest.approx(expected, abs=4 * error)
    assert "against the scores" in capsys.readouterr().out
    label(samples, str(tmp_path / "ranked.jsonl"), labeller=drawn, make="rankings")
    ranked = rows(tmp_path / "ranked.jsonl")
    weights = {text: math.exp(len(text) / 2.0) for text in ("a", "bb", "dddd")}
    expected = weights["bb"] / sum(weights.values()) * weights["dddd"] / (weights["a"] + weights["dddd"])
    share = sum(one["responses"] == ["bb", "dddd", "a"] for one in ranked) / many
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / many))
    assert all(one["scores"] == [3.0, 2.0, 1.0] for one in ranked)
    assert all(one["true_scores"] == [len(text) + 1.0 for text in one["responses"]] for one in ranked)


def test_draws_hang_on_seed_and_row_alone(tmp_path):
    samples = [row(n, ["a", "bb", "ccc"]) for n in range(1, 31)]

    def drawn(name, rows_given, seed=0):
        labeller = BradleyTerry(scorer=LENGTH, temperature=3.0, seed=seed)
        label(write(tmp_path / f"{name}.in.jsonl", *rows_given), str(tmp_path / f"{name}.jsonl"), labeller=labeller)
        return sorted(str(one) for one in rows(tmp_path / f"{name}.jsonl"))

    whole = drawn("whole", samples)
    assert drawn("turned", samples[::-1]) == whole
    assert drawn("seeded", samples, seed=1) != whole
    assert set(drawn("part", samples[10:20])) < set(whole)


def test_a_judge_makes_pairs_and_comparisons(samples, tmp_path):
    with ChatServer(longer) as chat:
        judge = LLMJudge(server=chat.server())
        label(samples, str(tmp_path / "pairs.jsonl"), labeller=judge, pairs="random", num_pairs=6)
        found = rows(tmp_path / "pairs.jsonl")
        assert [(one["chosen"], one["rejected"]) for one in found] == [
            ("bbb", "a"), ("cc", "a"), ("dd", "a"), ("bbb", "cc"), ("bbb", "dd"), ("yy", "x"),
        ]  # fmt: skip
        assert {one["verdict"] for one in found} == {1.0}
        asked = len(chat.bodies)
        kept = str(tmp_path / "pairs.jsonl.answers.jsonl")
        label(samples, str(tmp_path / "compared.jsonl"), labeller=judge, make="comparisons", answers=kept)
        assert [one["label"] for one in rows(tmp_path / "compared.jsonl")].count("tie") == 1
        assert len(chat.bodies) == asked == 14
        biased = LLMJudge(server=chat.server(model="other"))
        chat.reply = first_shown
        label(samples, str(tmp_path / "none.jsonl"), labeller=biased)
        assert rows(tmp_path / "none.jsonl") == []


def test_what_a_judge_left_out_stays_so_until_it_is_asked_again(samples, tmp_path):
    out = tmp_path / "pairs.jsonl"

    def fails(number, question, body):
        bad = question != EASY[0]["content"] and "bbb" in shown(question)
        return Reply(status=500, body="{}") if bad else longer(number, question, body)

    with ChatServer(fails) as chat:
        judge = LLMJudge(server=chat.server(retries=0, concurrency=1))
        label(samples, str(out), labeller=judge)
        before, asked = out.read_bytes(), len(chat.bodies)
        assert len(rows(out)) == 3
        chat.reply = longer
        label(samples, str(out), labeller=judge)
        assert (out.read_bytes(), len(chat.bodies)) == (before, asked)
        again = replace(judge, ask_again=True)
        with pytest.raises(UsageError, match=r"a judge has answered what it did not before.*give --overwrite"):
            label(samples, str(out), labeller=again)
        label(samples, str(out), labeller=judge, overwrite=True)
        assert len(rows(out)) == 6
        assert len(chat.bodies) == asked + 6


def test_a_judge_that_scores(samples, tmp_path):
    label(samples, str(tmp_path / "out.jsonl"), labeller=ByScore(scorer=LENGTH, margin=1.0))
    assert [(one["chosen"], one["rejected"]) for one in rows(tmp_path / "out.jsonl")] == [("bbb", "a")]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"make": "rankings"}, "gives no scores to rank by"),
        ({"make": "rankings", "pairs": "best_worst"}, "leave out `pairs`"),
        ({"pairs": "best_worst"}, "nobody knows the best and the worst"),
        ({"pairs": "random"}, "give both, or neither"),
        ({"num_pairs": 3}, "give both, or neither"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_written(samples, tmp_path, settings, said):
    with pytest.raises(UsageError, match=said):
        label(samples, str(tmp_path / "out.jsonl"), labeller=ByScore(scorer=LENGTH), **settings)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_response_that_a_function_fails_on_is_named_with_its_row(tmp_path, monkeypatch):
    (tmp_path / "failing_score.py").write_text("def score(response): return 1 / (len(response) - 3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    samples = write(tmp_path / "samples.jsonl", row(4, ["a", "bb"]), row(7, ["dddd", "ccc"]))
    with pytest.raises(UsageError, match=r"row 7, response 'ccc': failing_score.score failed: ZeroDivisionError"):
        label(samples, str(tmp_path / "out.jsonl"), labeller=Function(path="failing_score.score"))


def test_the_same_command_again_changes_nothing_and_other_settings_are_refused(samples, tmp_path):
    out = tmp_path / "out.jsonl"
    label(samples, str(out), labeller=LENGTH)
    before = out.read_text()
    label(samples, str(out), labeller=LENGTH)
    assert out.read_text() == before
    with pytest.raises(UsageError, match="begun with make = 'pairs', and now it is 'rankings'"):
        label(samples, str(out), labeller=LENGTH, make="rankings")
    label(samples, str(out), labeller=LENGTH, make="rankings", overwrite=True)
    assert "responses" in rows(out)[0]
    write(tmp_path / "samples.jsonl", row(1, ["other", "ones"]))
    with pytest.raises(UsageError, match="begun with samples = "):
        label(samples, str(out), labeller=LENGTH, make="rankings")


def test_scores_that_changed_since_are_not_mixed(samples, tmp_path, monkeypatch):
    import sys

    module = tmp_path / "changing_score.py"
    monkeypatch.syspath_prepend(tmp_path)
    module.write_text("def score(response): return len(response)\n")
    label(samples, str(tmp_path / "out.jsonl"), labeller=Function(path="changing_score.score"))
    module.write_text("def score(response): return -len(response)  # now the shorter\n")
    sys.modules.pop("changing_score")
    with pytest.raises(UsageError, match=r"holds labels that would be others now \(prompt of row 1\)"):
        label(samples, str(tmp_path / "out.jsonl"), labeller=Function(path="changing_score.score"))


@pytest.mark.parametrize("prompt", [None, MESSAGES], ids=["text", "messages"])
@pytest.mark.parametrize("make", ["pairs", "comparisons", "rankings"])
@pytest.mark.parametrize("noisy", [False, True], ids=["scores", "drawn"])
def test_the_data_module_reads_what_is_written_by_itself(make, prompt, noisy, tmp_path, tiny_llama):
    samples = write(
        tmp_path / "samples.jsonl",
        *(row(n, ["a joy", "dull and long", "", "we all loved it"], prompt=prompt) for n in range(1, 5)),
    )
    scorer = OfResponse()
    labeller = BradleyTerry(scorer=scorer, temperature=5.0) if noisy else scorer
    label(samples, str(tmp_path / "out.jsonl"), labeller=labeller, make=make)
    loss_rows = rows(tmp_path / "out.jsonl")
    data = PreferenceDataModule(train=str(tmp_path / "out.jsonl"), tokenizer=tiny_llama, batch_size=100)
    data.setup("fit")
    read = list(data.examples["train"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    texts = [[tokenizer.decode(ids, skip_special_tokens=True) for ids in one.response_ids] for one in read]
    if make == "pairs":
        assert texts == [[one["chosen"], one["rejected"]] for one in loss_rows]
    elif make == "rankings":
        assert texts == [one["responses"] for one in loss_rows]
    else:
        sides = [(one["output_1"], one["output_2"]) for one in loss_rows]
        assert texts == [
            list(pair if one["label"] == "output_1" else pair[::-1]) for pair, one in zip(sides, loss_rows, strict=True)
        ]


def test_comparisons_that_mostly_tie_are_read_too(tmp_path, tiny_llama):
    samples = write(tmp_path / "samples.jsonl", *(row(n, ["aa", "bb", "cc"]) for n in range(1, 9)), row(9, ["a", "bb"]))
    label(samples, str(tmp_path / "out.jsonl"), labeller=LENGTH, make="comparisons")
    data = PreferenceDataModule(train=str(tmp_path / "out.jsonl"), tokenizer=tiny_llama, batch_size=100)
    data.setup("fit")
    assert len(data.examples["train"]) == 1


@pytest.mark.parametrize(
    ("out", "answers", "words"),
    [
        ("samples.jsonl", None, "is both `samples` and `out`; name another file for `out`"),
        ("./samples.jsonl", None, "is both `samples` and `out`"),
        ("out.jsonl", "out.jsonl", "is both `out` and `answers`"),
        ("out.jsonl", "samples.jsonl", "is both `samples` and `answers`"),
    ],
)
def test_no_file_is_written_over_another(samples, tmp_path, monkeypatch, out, answers, words):
    monkeypatch.chdir(tmp_path)
    before = Path(samples).read_text()
    with pytest.raises(UsageError, match=words):
        label(samples, out, labeller=LENGTH, answers=answers, overwrite=True)
    assert Path(samples).read_text() == before
