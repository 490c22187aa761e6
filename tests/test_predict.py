"""Rewards that predict finds are written row by row, and compared with the file's order."""

import json

import pytest
import small_runs
import torch
from small_runs import rows, trainer

import dpo_lightning.cli
from dpo_lightning import PreferenceDataModule, RewardModule, SFTModule
from dpo_lightning.callbacks import WriteRewards
from dpo_lightning.callbacks.rewards import Scored, agreement


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_predict_writes_the_rewards_of_a_policy(workplace, capsys):
    compared = [
        {"input": f"the film {i}", "output_1": f" was good {i}", "output_2": f" was bad {i}", "label": 1 + i % 2}
        for i in range(5)
    ]
    small_runs.write_rows(workplace / "test.jsonl", compared)
    dpo_lightning.cli.run(["fit", "--config", "config.yaml"])
    checkpoint = str(next(workplace.rglob("*.ckpt")))
    arguments = ["--config", "config.yaml", "--ckpt_path", checkpoint, "--data.init_args.test", "test.jsonl"]
    cli = dpo_lightning.cli.run(["predict", *arguments])
    (scored,) = cli.trainer.predict_loop.predictions
    path = workplace / cli.trainer.log_dir / "rewards.jsonl"
    assert written(path) == [
        {"row": row, "rewards": rewards, "tokens": tokens}
        for row, rewards, tokens in zip(*(part.tolist() for part in scored), strict=True)
    ]
    right = sum(first > second for first, second in scored.rewards.tolist()) / 5
    output = capsys.readouterr().out
    assert f"Agreement with the file: {right:.1%} of the pairs" in output
    assert "rewards.jsonl" in output
    named = ["--trainer.callbacks+=WriteRewards", "--trainer.callbacks.path", "mine.jsonl"]
    cli = dpo_lightning.cli.run(["predict", *arguments, *named])
    assert written(workplace / "mine.jsonl") == written(path)
    assert sum(isinstance(callback, WriteRewards) for callback in cli.trainer.callbacks) == 1


def sampled(*responses):
    """Columns of a row of samples."""
    return {
        "responses": list(responses),
        "tokens": [len(text) for text in responses],
        "finished": [True] * len(responses),
    }


def test_samples_are_scored_as_they_are(workplace, capsys):
    texts = [[" was good", " was good", "", " was bad"], [" was good"], [" was bad", " was long"]]
    prompts = ["the film 1", "the film 1", "the plot"]
    samples = [{"prompt": prompt, **sampled(*some)} for prompt, some in zip(prompts, texts, strict=True)]
    wanted = [(row, number) for row, some in enumerate(texts, 1) for number, text in enumerate(some, 1) if text]
    alone = [{"prompt": prompts[row - 1], "completion": texts[row - 1][number - 1]} for row, number in wanted]
    small_runs.write_rows(workplace / "samples.jsonl", samples)
    small_runs.write_rows(workplace / "completions.jsonl", alone)
    dpo_lightning.cli.run(["fit", "--config", "config.yaml"])
    arguments = ["--config", "config.yaml", "--ckpt_path", str(next(workplace.rglob("*.ckpt")))]

    def scored(*more):
        cli = dpo_lightning.cli.run(["predict", *arguments, *more])
        return written(workplace / cli.trainer.log_dir / "rewards.jsonl")

    capsys.readouterr()
    found = scored("--data.init_args.test", "samples.jsonl", "--data.init_args.micro_batch_tokens", "5")
    assert [(line["row"], line["response"]) for line in found] == wanted
    output = capsys.readouterr().out
    assert "Rewards of 6 examples" in output
    assert "Agreement" not in output
    expected = scored("--data.init_args.test", "completions.jsonl")
    assert [line["row"] for line in expected] == list(range(1, 7))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["rewards"] == pytest.approx(theirs["rewards"], abs=1e-6)
    assert len({line["rewards"][0] for line in expected}) == 4
    others = [{"frage": row["prompt"], "antworten": row["responses"]} for row in samples]
    small_runs.write_rows(workplace / "others.jsonl", others)
    named = "{class_path: Samples, init_args: {prompt: frage, responses: antworten}}"
    again = scored("--data.init_args.test", "others.jsonl", "--data.init_args.format", named)
    assert [line["rewards"] for line in again] == [pytest.approx(line["rewards"], abs=1e-6) for line in found]


def predicted(model, folder, devices=1, strategy="auto", name="rewards.jsonl", some=None):
    """Lines that a prediction of some rows, or of seven rankings, writes on some ranks."""
    callback = WriteRewards(f"{folder}/{name}")
    source = PreferenceDataModule(test=some or rows(7, most=3), tokenizer=model, batch_size=2, val_batch_size=4)
    run = trainer(folder, devices=devices, strategy=strategy, callbacks=[callback])
    torch.manual_seed(0)
    run.predict(small_runs.module(model, cls=RewardModule), source)
    return None if callback.written is None else written(callback.written)


def test_two_ranks_write_every_row_once(tiny_llama, two_ranks, tmp_path):
    one = predicted(tiny_llama, str(tmp_path), name="one.jsonl")
    first, second = two_ranks.run(predicted, tiny_llama, str(tmp_path), 2, "ddp")
    assert second is None
    assert [line["row"] for line in first] == [line["row"] for line in one] == list(range(1, 8))
    for ours, theirs in zip(first, one, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["rewards"] == pytest.approx(theirs["rewards"], abs=1e-5)
    assert {len(line["rewards"]) for line in one} == {2, 3}


def test_two_ranks_write_every_sample_once(tiny_llama, two_ranks, tmp_path):
    samples = [{"prompt": f"the film {i}", **sampled(" a", "", " a", f" b {i}")} for i in range(3)]
    one = predicted(tiny_llama, str(tmp_path), name="one.jsonl", some=samples)
    first, _ = two_ranks.run(predicted, tiny_llama, str(tmp_path), 2, "ddp", some=samples)
    places = [(line["row"], line["response"]) for line in one]
    assert places == [(row, response) for row in (1, 2, 3) for response in (1, 3, 4)]
    assert [(line["row"], line["response"]) for line in first] == places
    for ours, theirs in zip(first, one, strict=True):
        assert ours["rewards"] == pytest.approx(theirs["rewards"], abs=1e-5)


def test_log_probabilities_of_sft_are_no_rewards(tiny_llama, tmp_path):
    callback = WriteRewards(str(tmp_path / "rewards.jsonl"))
    source = PreferenceDataModule(test=rows(3), tokenizer=tiny_llama)
    trainer(tmp_path, callbacks=[callback]).predict(small_runs.module(tiny_llama, cls=SFTModule), source)
    assert callback.written is None


def test_agreement_by_hand():
    scored = [
        Scored(1, [2.0, 1.0], [3, 3]),
        Scored(2, [1.0, 1.0], [3, 3]),  # a tie
        Scored(3, [3.0, 1.0, 2.0], [3, 3, 3]),  # two of three
        Scored(4, [1.0], [3]),  # nothing to order
    ]
    share = (1 + 1 / 2 + 2 / 3) / 3
    words = agreement(scored)
    assert f"{share:.1%} of the pairs" in words
    assert "3 rows" in words
    assert agreement(scored[3:]) is None
