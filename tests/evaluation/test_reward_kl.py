import json
import math
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from small_world import CountOfA, distribution, text, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_lightning.data.chat import Chat
from dpo_lightning.errors import UsageError
from dpo_lightning.evaluation.reward_book import rewarded
from dpo_lightning.evaluation.reward_kl import called, reward_kl
from dpo_lightning.evaluation.rewards import Drawing, Engine, best_of_n_point, draw, point_of
from dpo_lightning.generation import sample
from dpo_lightning.generation.prompts import PromptEncoding
from dpo_lightning.models.policy import CausalPolicy
from dpo_lightning.scorers import Function, RewardModel, Scorer
from dpo_lightning.tools import run_tool

LENGTH = 3
PROMPTS = ["a", "bc", "cab"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return write_model(folder / "policy", 1), write_model(folder / "reference", 2)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": PROMPTS[i % 3]}) + "\n" for i in range(60)))
    return str(path)


def exact(models, prompt):
    """Expected reward and KL from the list of all texts, and the expected reward of the best of n of the reference."""
    policy, reference = (distribution(model, prompt, LENGTH) for model in models)
    assert math.isclose(sum(map(math.exp, policy.values())), 1, abs_tol=1e-6)
    reward = sum(math.exp(logp) * CountOfA().score([], [text(ids)])[0] for ids, logp in policy.items())
    kl = sum(math.exp(logp) * (logp - reference[ids]) for ids, logp in policy.items())
    scores = np.array([CountOfA().score([], [text(ids)])[0] for ids in reference])
    order = np.argsort(scores)
    below = np.cumsum(np.exp(list(reference.values()))[order])
    return reward, kl, {n: float((scores[order] * np.diff(below**n, prepend=0)).sum()) for n in (1, 2, 4)}


def points_of(path):
    return json.loads(path.read_text())["points"]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_estimates_are_those_of_the_whole_distribution_and_errors_are_right(models):
    """Many rows of one prompt, so that all there is of chance is in the samples."""
    policy, reference = (CausalPolicy(AutoModelForCausalLM.from_pretrained(path)).eval() for path in models)
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    asked = [(row, "bc") for row in range(1, 41)]

    def measured(model, seed):
        engine = Engine(model.model, tokenizer, model.generate, model, reference, lambda batch: batch)
        return rewarded(CountOfA(), draw(engine, Drawing(4, LENGTH, seed), asked, 0))

    reward, kl, best = exact(models, "bc")
    points = [point_of(measured(policy, seed), method="DPO") for seed in range(16)]
    for name, truth in (("reward", reward), ("kl", kl)):
        own = np.array([getattr(point, name) for point in points])
        errors = np.array([getattr(point, f"{name}_se") for point in points])
        assert truth > 0.05
        assert (abs(own - truth) < 4 * errors).all()
        assert abs(own.mean() - truth) < 4 * errors.mean() / 4
        assert 0.5 < own.std(ddof=1) / errors.mean() < 1.5  # the spread of 16 has an error of 18 %
    drawn = [measured(reference, seed) for seed in range(16)]
    for n in best:
        own = [best_of_n_point(one, n) for one in drawn]
        assert (own[0].label, own[0].kl_is_bound, own[0].kl) == (f"N = {n}", True, math.log(n) - (n - 1) / n)
        mean, se = np.mean([point.reward for point in own]), np.mean([point.reward_se for point in own])
        assert abs(mean - best[n]) < 4 * se / 4


def test_a_policy_that_is_its_reference_has_no_kl_and_its_samples_serve_best_of_n(models, prompts, tmp_path):
    out = tmp_path / "same.json"
    written = reward_kl(models[1], models[1], prompts, str(out), scorer=CountOfA(), best_of=[8, 1], num_samples=2)
    own, one, eight = points_of(out)
    assert (own["kl"], own["kl_se"], own["samples"], own["method"]) == (0.0, 0.0, 60 * 8, "reference")
    assert (one["reward"], one["reward_se"]) == pytest.approx((own["reward"], own["reward_se"]))
    assert eight["reward"] > one["reward"]
    rewards = [row["rewards"] for row in rows_of(tmp_path / "same.samples.rewards.jsonl")]
    assert eight["reward"] == pytest.approx(np.mean(list(map(max, rewards))))
    assert [len(row["responses"]) for row in rows_of(written[1])] == [8] * 60


def test_figures_are_those_of_the_rows_beside(models, prompts, tmp_path):
    out = tmp_path / "out.json"
    _, samples = reward_kl(*models, prompts, str(out), scorer=CountOfA(weight=2), num_samples=3, max_new_tokens=LENGTH,
                           method="DPO", label="beta 0.1", step=40)  # fmt: skip
    rows = rows_of(samples)
    (point,) = points_of(out)
    assert [row["row"] for row in rows] == list(range(1, 61))
    assert (point["method"], point["label"], point["step"], point["samples"]) == ("DPO", "beta 0.1", 40, 180)
    rewards = rows_of(tmp_path / "out.samples.rewards.jsonl")
    assert [row["row"] for row in rewards] == list(range(1, 61))
    assert rewards[7]["rewards"] == CountOfA(weight=2).score([], rows[7]["responses"])
    means = [np.mean(row["rewards"]) for row in rewards]
    assert point["reward"] == pytest.approx(np.mean(means))
    assert point["reward_se"] == pytest.approx(np.std(means, ddof=1) / math.sqrt(60))
    noise = np.mean([np.var(row["rewards"], ddof=1) / 3 for row in rewards])
    assert noise > 0.01
    assert point["prompt_reward_sd"] == pytest.approx(math.sqrt(max(0, np.var(means, ddof=1) - noise)))
    tokens = [count for row in rows for count in row["tokens"]]
    assert (point["length_mean"], point["length_median"]) == pytest.approx((np.mean(tokens), np.median(tokens)))
    assert point["finished"] == pytest.approx(np.mean([flag for row in rows for flag in row["finished"]]))
    known = [distribution(model, PROMPTS[0], LENGTH) for model in models]
    by_text = {}
    for ids, logp in known[0].items():
        by_text.setdefault((text(ids), len(ids), ids[-1] == 3), set()).add(round(logp - known[1][ids], 3))
    for response, count, finished, ratio in zip(
        *(rows[0][name] for name in ("responses", "tokens", "finished", "log_ratios")), strict=True
    ):
        assert any(abs(ratio - value) < 2e-3 for value in by_text[response, count, finished])


def test_a_killed_run_goes_on_with_the_same_samples(models, prompts, tmp_path):
    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    how = {"scorer": CountOfA(), "num_samples": 2, "max_new_tokens": LENGTH, "batch_size": 16}
    _, samples = reward_kl(*models, prompts, str(whole), **how)
    lines = samples.read_text().splitlines(keepends=True)
    beside = tmp_path / "killed.samples.jsonl"
    beside.write_text("".join(lines[:21]) + lines[21][:30])
    (tmp_path / "killed.samples.jsonl.settings.json").write_text(
        (tmp_path / "whole.samples.jsonl.settings.json").read_text()
    )
    reward_kl(*models, prompts, str(killed), **how)
    assert beside.read_text() == samples.read_text()
    assert points_of(killed)[0]["reward"] == points_of(whole)[0]["reward"]


def test_another_scorer_scores_the_same_samples_anew(models, prompts, tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text("def score(response):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    out, how = tmp_path / "out.json", {"num_samples": 2, "max_new_tokens": LENGTH}

    def measured(scorer):
        reward_kl(*models, prompts, str(out), scorer=scorer, **how)
        return points_of(out)[0]["reward"]

    assert measured(Function(path="my_reward.score")) == 1
    (tmp_path / "my_reward.py").write_text("def score(response):\n    return 20.0\n")
    monkeypatch.delitem(sys.modules, "my_reward")
    monkeypatch.setattr("dpo_lightning.evaluation.reward_kl.draw", None)  # nothing is drawn any more
    assert measured(Function(path="my_reward.score")) == 20
    responses = [text for row in rows_of(tmp_path / "out.samples.jsonl") for text in row["responses"]]
    assert measured(CountOfA(2)) == pytest.approx(np.mean(CountOfA(2).score([], responses)))


def test_settings_that_change_no_reward_do_not_score_anew(models, prompts, tmp_path):
    out, how = tmp_path / "out.json", {"num_samples": 1, "max_new_tokens": LENGTH}
    reward_kl(*models, prompts, str(out), scorer=Batched(2), **how)
    first = points_of(out)
    reward_kl(*models, prompts, str(out), scorer=Batched(0), **how)  # which would fail if it were asked
    assert points_of(out) == first


def test_the_best_that_another_scorer_picks_is_measured_by_the_scorer(models, prompts, tmp_path):
    def found(name, **options):
        out = tmp_path / f"{name}.json"
        reward_kl(*models, prompts, str(out), scorer=CountOfA(), best_of=[1, 4], max_new_tokens=LENGTH, **options)
        return points_of(out)

    policy, one, four = found("own")
    assert four["reward"] > one["reward"]
    assert found("same", chooser=CountOfA(2, less=0.2))[2]["reward"] == pytest.approx(four["reward"])
    policy_too, same, worst = found("worst", chooser=CountOfA(-1, less=-0.1))
    assert policy_too == policy
    assert (same["reward"], worst["method"]) == (
        pytest.approx(one["reward"]),
        "Best of N by CountOfA weight=-1 less=-0.1",
    )
    rows = [row["rewards"] for row in rows_of(tmp_path / "own.reference.rewards.jsonl")]
    assert worst["reward"] == pytest.approx(np.mean(list(map(min, rows))))
    with pytest.raises(UsageError, match="say of how many by `best_of`"):
        reward_kl(*models, prompts, str(tmp_path / "none.json"), scorer=CountOfA(), chooser=CountOfA())


def test_a_chooser_is_called_by_what_tells_it_from_others_of_its_class():
    assert called(RewardModel("runs/a/hf", batch_tokens=7, device="cpu")) == "RewardModel runs/a/hf"
    assert called(RewardModel("runs/b/hf", dtype="bfloat16")) == "RewardModel runs/b/hf dtype=bfloat16"
    assert called(Function(path="my_reward.score")) == "Function my_reward.score"
    assert called(CountOfA()) == "CountOfA"


def test_prompts_become_text_as_they_are_asked_for(tiny_llama, tmp_path, monkeypatch):
    """The model is given what `dpo-lightning sample` would give it."""
    path, given = tmp_path / "prompts.jsonl", []
    path.write_text(json.dumps({"question": "a b c d e f"}) + "\n")
    chat = Chat(template="package:data/templates/alpaca.jinja", texts=True)

    def watched(model, tokenizer, prompts, **options):
        given.append((prompts, options["ends"]))
        return sample(model, tokenizer, prompts, **options)

    monkeypatch.setattr("dpo_lightning.evaluation.rewards.sample", watched)
    how = {"scorer": CountOfA(), "num_samples": 1, "max_new_tokens": 2, "column": "question"}
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    asked = [(1, "a b c d e f")]
    for number, options in enumerate([{}, {"chat": chat}, {"max_prompt_length": 3}]):
        reward_kl(tiny_llama, tiny_llama, str(path), str(tmp_path / f"{number}.json"), **how, **options)
        encoding = PromptEncoding(options.get("chat", Chat()), options.get("max_prompt_length"))
        assert given[-1] == ([encoding.encode(tokenizer, asked)[0].ids], encoding.ends(tokenizer, asked))
    assert len({tuple(prompts[0]) for prompts, _ in given}) == 3
    with pytest.raises(UsageError, match=r"0\.samples\.jsonl was begun with prompt_tokens"):
        reward_kl(tiny_llama, tiny_llama, str(path), str(tmp_path / "0.json"), **how, chat=chat)


def test_samples_of_other_weights_are_not_taken_up(models, prompts, tmp_path):
    policy = write_model(tmp_path / "model", 3)
    out = str(tmp_path / "out.json")
    reward_kl(policy, models[1], prompts, out, scorer=CountOfA(), num_samples=1, max_new_tokens=2)
    write_model(tmp_path / "model", 4)
    with pytest.raises(UsageError, match="was begun with weights_of_policy"):
        reward_kl(policy, models[1], prompts, out, scorer=CountOfA(), num_samples=1, max_new_tokens=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "`num_samples` must be 1 or more, got 0"),
        ({"best_of": [0]}, "`best_of` must be numbers of 1 or more"),
        ({"out": "points.txt"}, r"points\.json"),
    ],
)
def test_refusals(models, prompts, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        reward_kl(*models, prompts, **{"out": "out.json", "scorer": CountOfA(), **changes})


def test_models_of_different_tokens_are_refused(models, tiny_llama, prompts, tmp_path):
    with pytest.raises(UsageError, match="have different tokens"):
        reward_kl(models[0], tiny_llama, prompts, str(tmp_path / "out.json"), scorer=CountOfA())


@dataclass(frozen=True)
class Batched(Scorer):
    batch_size: int
    ASIDE = ("batch_size",)

    def score(self, prompts, responses):
        return [len(response) / min(1, self.batch_size) for response in responses]


class Broken(CountOfA):
    def score(self, prompts, responses):
        return [float("nan")] * len(responses) if self.weight else [1.0]


@pytest.mark.parametrize(("weight", "message"), [(1, "prompt 1 a reward that is no number"), (0, "gave 1 numbers for")])
def test_a_scorer_that_gives_no_numbers_is_named(models, prompts, tmp_path, weight, message):
    with pytest.raises(UsageError, match=message):
        reward_kl(*models, prompts, str(tmp_path / "out.json"), scorer=Broken(weight), num_samples=1, max_new_tokens=2)


def test_from_the_command_line(models, prompts, tmp_path, capsys):
    out = tmp_path / "out.json"
    args = ["reward_kl", *models, prompts, str(out), "--scorer", "small_world.CountOfA", "--scorer.weight", "3",
            "--num_samples", "2", "--max_new_tokens", "2", "--best_of", "[1,2]", "--method", "DPO"]  # fmt: skip
    run_tool("evaluate", args)
    printed = capsys.readouterr().out
    assert f"Written: {out}" in printed
    assert "Best of N, N = 2" in printed
    assert [point["method"] for point in points_of(out)] == ["DPO", "Best of N", "Best of N"]
    assert json.loads(out.read_text())["settings"]["scorer"]["init_args"] == {"weight": 3.0, "less": 0.1}
    with pytest.raises(SystemExit):
        run_tool("evaluate", [*args, "--temperature", "0.7"])
    assert "temperature" in capsys.readouterr().err
