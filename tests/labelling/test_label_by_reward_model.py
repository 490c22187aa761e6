"""A reward model of this library labels and chooses: the rewards that it goes by are those that transformers finds."""

import json

import pytest
import small_runs
import torch
from sample_files import row, rows, write
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import dpo_lightning.cli
from dpo_lightning import RewardModule

RESPONSES = [" was a joy", " is slow", " and its end", " was bad old story", " we all loved"]
PROMPTS = ["the film", "every minute"]


@pytest.fixture(scope="module")
def trained(tiny_llama, tmp_path_factory):
    """Folder with the checkpoint of a reward model that was trained for two steps."""
    place = tmp_path_factory.mktemp("trained")
    reward = small_runs.module(tiny_llama, cls=RewardModule)
    small_runs.saving(place, reward, small_runs.data(tiny_llama), max_steps=2)
    return place


@pytest.fixture
def command(trained, tmp_path, monkeypatch):
    """A function that runs a command line in a folder with samples and the reward model, exported."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["dpo-lightning", *map(str, words)])
        dpo_lightning.cli.main()

    monkeypatch.chdir(tmp_path)
    run("export", trained / "step=2.ckpt", "reward_model")
    write(tmp_path / "samples.jsonl", *(row(n, RESPONSES, prompt) for n, prompt in enumerate(PROMPTS, start=1)))
    return run


@torch.no_grad()
def rewards(texts):
    """What transformers gives by itself, one text after the other."""
    tokenizer = AutoTokenizer.from_pretrained("reward_model")
    model = AutoModelForSequenceClassification.from_pretrained("reward_model").eval()
    ids = [tokenizer(text + tokenizer.eos_token, return_tensors="pt").input_ids for text in texts]
    return [model(one).logits[0, 0].item() - model.config.reward_offset for one in ids]


def test_pairs_by_a_reward_model(command, tmp_path):
    command("label", "samples.jsonl", "pairs.jsonl", "--labeller", "RewardModel", "--labeller.path", "reward_model")
    pairs = rows(tmp_path / "pairs.jsonl")
    assert len(pairs) == 20
    found = {side: rewards([pair["prompt"] + pair[side] for pair in pairs]) for side in ("chosen", "rejected")}
    for side, expected in found.items():
        assert [pair[f"{side}_score"] for pair in pairs] == pytest.approx(expected, abs=1e-5)
    assert all(better > worse for better, worse in zip(*found.values(), strict=True))
    assert {pair["chosen"] for pair in pairs} & {pair["rejected"] for pair in pairs}  # between best and worst


def test_labels_drawn_at_the_odds_of_a_reward_model(command, tmp_path):
    (tmp_path / "noisy.yaml").write_text("""\
labeller:
  class_path: BradleyTerry
  init_args:
    scorer: {class_path: RewardModel, init_args: {path: reward_model}}
    temperature: 1.0e-6
make: rankings
""")
    command("label", "samples.jsonl", "rankings.jsonl", "--config", "noisy.yaml")
    for prompt, ranking in zip(PROMPTS, rows(tmp_path / "rankings.jsonl"), strict=True):
        found = dict(zip(RESPONSES, rewards([prompt + response for response in RESPONSES]), strict=True))
        assert ranking["responses"] == sorted(RESPONSES, key=found.get, reverse=True)
        assert ranking["true_scores"] == pytest.approx([found[text] for text in ranking["responses"]], abs=1e-5)


def test_the_best_of_n_as_a_reward_model_chooses_it(command, tmp_path, tiny_llama):
    write(tmp_path / "prompts.jsonl", *({"prompt": prompt} for prompt in PROMPTS))
    command(
        *("evaluate", "reward_kl", tiny_llama, tiny_llama, "prompts.jsonl", "best.json"),
        *("--scorer", "Function", "--scorer.path", "builtins.len", "--best_of", "[1,4]", "--max_new_tokens", "8"),
        *("--chooser", "RewardModel", "--chooser.path", "reward_model"),
    )
    points = json.loads((tmp_path / "best.json").read_text())["points"]
    lengths = []
    for drawn in rows(tmp_path / "best.samples.jsonl"):
        texts = [drawn["prompt"] + response for response in drawn["responses"]]
        found = rewards(texts)
        assert len(texts) == len(set(found)) == 4
        lengths.append(len(texts[found.index(max(found))]))
    assert points[-1]["method"] == "Best of N by RewardModel reward_model"
    assert points[-1]["reward"] == pytest.approx(sum(lengths) / len(lengths))
    assert points[-1]["reward"] != points[-2]["reward"]
