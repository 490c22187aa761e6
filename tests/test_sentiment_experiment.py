"""The experiment runs from data to picture, on little data, and goes on where it was stopped."""

import csv
import gzip
import json
import lzma
import random
import shlex
import sys
from pathlib import Path

import pytest
import yaml

import dpo_lightning.cli
from dpo_lightning.quickstart.grammar import corpus

FOLDER = Path(__file__).parent.parent / "experiments/sentiment"
FEW = {
    "sft_batch_size": 16, "review_length": 96, "precision": "32-true", "max_steps": 2, "every_n_steps": 1,
    "num_samples": 1, "max_new_tokens": 8,
}  # fmt: skip


@pytest.fixture
def experiment(monkeypatch, tmp_path):
    """The script with little to do, whose commands run in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER))
    import run

    monkeypatch.setattr(run, "GRAMMAR", {**run.GRAMMAR, **FEW})
    monkeypatch.setattr(run, "IMDB", {**run.IMDB, **FEW})
    monkeypatch.setattr(run, "BETAS", (0.1,))
    monkeypatch.setattr(run, "ALPHAS", (0.5,))
    monkeypatch.setattr(run, "BEST_OF", (1, 2, 4))
    sizes = {"num_prompts": 12, "num_held_out": 6}
    monkeypatch.setattr(
        run,
        "make_data",
        lambda out, imdb, settings: (
            run.prepare.imdb(imdb, out, 128, 2, **sizes) if imdb else run.prepare.grammar(out, 64, **sizes)
        ),
    )
    run.given = []

    def here(*arguments):
        run.given.append(arguments)
        monkeypatch.setattr("sys.argv", ["dpo-lightning", *arguments])
        dpo_lightning.cli.main()

    monkeypatch.setattr(run, "run", here)
    yield run
    for name in ("run", "prepare", "fitted_sentiment"):
        sys.modules.pop(name, None)


def start(experiment, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["run.py", *arguments])
    experiment.main()


def check(out, labels):
    prompts = [json.loads(line)["prompt"] for line in (out / "data/prompts.jsonl").read_text().splitlines()]
    held_out = [json.loads(line)["prompt"] for line in (out / "data/prompts_held_out.jsonl").read_text().splitlines()]
    assert len(prompts) == 12
    assert len(held_out) == len(set(held_out)) == 6
    assert not set(prompts) & set(held_out)
    points = list(csv.DictReader((out / "frontier.csv").open()))
    assert {(point["method"], point["label"]) for point in points} >= labels
    assert {point["step"] for point in points if point["method"] == "DPO"} == {"0", "1", "2"}
    assert all(abs(float(point["kl"])) < 1e-4 for point in points if point["step"] == "0")
    assert (out / "frontier.png").stat().st_size > 10_000


LABELS = {("DPO", "beta 0.1"), ("Unlikelihood", "alpha 0.5"), ("Preferred-FT", ""), ("Best of N", "N = 4")}


@pytest.mark.slow
def test_the_experiment_on_the_grammar_and_goes_on(experiment, monkeypatch, tmp_path):
    experiment.run, whole = lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt), experiment.run
    with pytest.raises(KeyboardInterrupt):
        start(experiment, monkeypatch, "--out", "runs/grammar")
    assert {path.name for path in Path("runs/grammar/done").iterdir()} == {"prepare"}
    experiment.run = whole
    start(experiment, monkeypatch, "--out", "runs/grammar")
    check(tmp_path / "runs/grammar", LABELS)
    config = yaml.safe_load(Path("runs/grammar/configs/dpo_beta_0.1.yaml").read_text())
    assert config["model"]["init_args"]["loss"]["init_args"] == {"beta": 0.1}
    count = len(experiment.given)
    start(experiment, monkeypatch, "--out", "runs/grammar")
    assert len(experiment.given) == count  # nothing is left to do


@pytest.mark.slow
def test_the_experiment_on_reviews_in_files(experiment, monkeypatch, tmp_path):
    texts = list(corpus(80, seed=0))
    for name, some in (("train", texts), ("test", texts[:40] * 20)):
        with lzma.open(tmp_path / f"{name}.jsonl.xz", "wt") as file:
            file.writelines(json.dumps({"text": text.replace(". ", ".<br /><br />")}) + "\n" for text in some)
    words, rng = sorted({word.strip(".,").lower() for text in texts for word in text.split()}), random.Random(0)
    fitted = {"token_pattern": r"(?u)\b\w\w+\b", "intercept": 0.1, "vocab": {w: [1.0, rng.gauss(0, 3)] for w in words}}
    (tmp_path / "imdb_lr_20k.json.gz").write_bytes(gzip.compress(json.dumps(fitted).encode()))
    start(experiment, monkeypatch, "--out", "runs/imdb", "--imdb", str(tmp_path))
    check(tmp_path / "runs/imdb", LABELS)
    assert "<br" not in (tmp_path / "runs/imdb/data/reviews.jsonl").read_text()


def test_configs_are_filled_in_and_prompts_are_held_out(experiment, tmp_path, monkeypatch):
    given = list(experiment.stages(tmp_path, None))
    assert [stage.name for stage in given] == [
        *("prepare", "sft", "sample", "label", "dpo_beta_0.1", "unlikelihood_alpha_0.5", "preferred_ft"),
        *("best_of_n", "frontier"),
    ]
    for stage in (stage for stage in given if stage.name not in ("sample", "label", "best_of_n", "frontier")):
        if stage.name != "prepare":
            experiment.run = lambda *arguments: None
        stage.does()
    prompts, held_out = (
        [json.loads(line)["prompt"] for line in (tmp_path / f"data/{name}.jsonl").read_text().splitlines()]
        for name in ("prompts", "prompts_held_out")
    )
    assert not set(prompts) & set(held_out)
    assert len(held_out) == len(set(held_out)) == 6
    monkeypatch.setattr(experiment, "GRAMMAR", {})
    assert [stage.name for stage in experiment.stages(tmp_path, None)] == [stage.name for stage in given]
    for name in ("sft", "dpo_beta_0.1", "unlikelihood_alpha_0.5", "preferred_ft"):
        assert yaml.safe_load((tmp_path / f"configs/{name}.yaml").read_text())["trainer"]["precision"] == "32-true"


def test_the_fitted_sentiment_by_hand(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    from fitted_sentiment import FittedSentiment

    fitted = {"token_pattern": r"(?u)\b\w\w+\b", "intercept": 0.0, "vocab": {"good": [2.0, 1.0], "bad": [1.0, -3.0]}}
    (tmp_path / "fitted.json.gz").write_bytes(gzip.compress(json.dumps(fitted).encode()))
    scorer = FittedSentiment(path=str(tmp_path / "fitted.json.gz"))
    # A word alone has length 1 whatever its idf: sigma(1). Of both, (2 * 1 - 1 * 3) / sqrt(2 ** 2 + 1) is -0.4472.
    assert scorer.score(["", "Good ", "a "], ["good", "x bad", "film"]) == pytest.approx(
        [0.7311, 0.3900, 0.5], abs=1e-4
    )
    sys.modules.pop("fitted_sentiment", None)


def test_what_the_readme_says_is_the_command():
    readme = (FOLDER / "README.md").read_text()
    assert "python experiments/sentiment/run.py --out runs/sentiment" in readme
    assert shlex.split("python experiments/sentiment/run.py --out runs/imdb --imdb FOLDER")[1] in readme
