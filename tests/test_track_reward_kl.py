import json
import math

import divided
import pytest
import small_runs
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from small_runs import same
from small_world import CountOfA
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from dpo_lightning import SFTModule
from dpo_lightning.callbacks import LogSamples, TrackRewardKL
from dpo_lightning.data.chat import Chat
from dpo_lightning.errors import UsageError
from dpo_lightning.evaluation.points import TRACKED, read_points
from dpo_lightning.evaluation.reward_kl import reward_kl
from dpo_lightning.generation import sample
from dpo_lightning.generation.prompts import PromptEncoding
from dpo_lightning.losses import SimPOLoss
from dpo_lightning.references import Cached, Synced

PROMPTS = ["the film", "we all loved", "a story"]
HOW = {"num_samples": 2, "max_new_tokens": 5}


def track(**options):
    return TrackRewardKL(PROMPTS, CountOfA(), **{**HOW, **options})


def fitted(folder, model, callback, cls=None, **options):
    kwargs = {"cls": cls} if cls else {}
    kwargs |= {name: options.pop(name) for name in ("loss", "reference", "dropout") if name in options}
    module = small_runs.module(model, **kwargs)
    source = small_runs.data(model, **({"num_responses": 1} if cls else {}))
    small_runs.fit(folder, module, source, callbacks=[callback] if callback else [], **options)
    return module


def test_points_are_logged_and_kept_for_the_frontier(tiny_llama, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fitted(tmp_path, tiny_llama, track(every_n_steps=2, label="beta 0.5"), logger=logger, max_steps=5)
    points = read_points([str(tmp_path)])
    assert [(point.method, point.label, point.step) for point in points] == [
        ("DPO", "beta 0.5", step) for step in (0, 2, 4, 5)
    ]
    assert (points[0].kl, points[0].kl_se, points[0].samples, points[0].prompts) == (0.0, 0.0, 6, 3)
    assert points[-1].kl != 0
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    logged = events.Scalars("frontier/reward")
    assert [event.step for event in logged] == [0, 2, 4, 5]
    assert [event.value for event in logged] == pytest.approx([point.reward for point in points])
    assert events.Scalars("frontier/kl_se")[-1].value == pytest.approx(points[-1].kl_se)
    assert len(events.Images("frontier")) == 4


def test_behind_every_validation_unless_told_otherwise(tiny_llama, tmp_path):
    fitted(tmp_path, tiny_llama, track(), max_steps=6)
    assert [point.step for point in read_points([str(tmp_path)])] == [0, 4, 6]  # an epoch has 4 steps


def test_the_command_says_the_same_of_the_checkpoint(tiny_llama, tmp_path):
    module = fitted(tmp_path, tiny_llama, track())
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    small_runs.write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    out = tmp_path / "out.json"
    reward_kl(
        str(tmp_path / "last.ckpt"), tiny_llama, str(tmp_path / "prompts.jsonl"), str(out), scorer=CountOfA(), **HOW
    )
    (point,) = read_points([str(out)])
    tracked = read_points([str(tmp_path / TRACKED)])[-1]
    assert (point.reward, point.length_mean) == pytest.approx((tracked.reward, tracked.length_mean))
    assert (point.kl, point.kl_se) == pytest.approx((tracked.kl, tracked.kl_se), abs=1e-4)


def test_prompts_become_text_as_the_data_module_does_it(tiny_llama, tmp_path, monkeypatch):
    given = []

    def watched(model, tokenizer, prompts, **options):
        given.append((prompts[0], options["ends"]))
        return sample(model, tokenizer, prompts, **options)

    monkeypatch.setattr("dpo_lightning.evaluation.rewards.sample", watched)
    chat = Chat(template="package:data/templates/alpaca.jinja", texts=True)
    source = small_runs.data(tiny_llama, chat=chat, max_length=200, max_prompt_length=9)
    small_runs.fit(tmp_path, small_runs.module(tiny_llama), source, callbacks=[track()], max_steps=1)
    tokenizer, asked = AutoTokenizer.from_pretrained(tiny_llama), [(1, PROMPTS[0])]
    encoding = PromptEncoding(chat, max_length=9)
    expected = encoding.encode(tokenizer, asked)[0].ids, encoding.ends(tokenizer, asked)
    assert given[0] == expected
    assert given[0][0] != PromptEncoding().encode(tokenizer, asked)[0].ids


def test_training_does_not_notice(noisy_llama, tmp_path):
    """Dropout draws from the random state that samples would disturb."""
    watched = fitted(tmp_path / "a", noisy_llama, track(every_n_steps=1), dropout=True, max_steps=3)
    alone = fitted(tmp_path / "b", noisy_llama, None, dropout=True, max_steps=3)
    assert same(small_runs.trained(watched), small_runs.trained(alone))


def test_a_run_that_goes_on_is_the_run_that_was_never_stopped(noisy_llama, tmp_path):
    def run(folder, ckpt_path=None, **options):
        module = small_runs.module(noisy_llama, dropout=True)
        callbacks = [track(every_n_steps=1), small_runs.every_step(tmp_path / "checkpoints")]
        small_runs.fit(folder, module, small_runs.data(noisy_llama), ckpt_path, callbacks=callbacks,
                       enable_checkpointing=True, **options)  # fmt: skip
        return small_runs.trained(module), read_points([str(folder)])

    whole = run(tmp_path / "whole", max_steps=4)
    run(tmp_path / "halves", max_steps=3)
    checkpoint = str(tmp_path / "checkpoints/step=2.ckpt")  # behind it step 3 was measured too
    halves = run(tmp_path / "halves", checkpoint, max_steps=4)
    assert same(whole[0], halves[0])
    assert whole[1] == halves[1]


def test_without_a_reference_of_its_own_a_module_is_given_one(tiny_llama, tmp_path):
    with pytest.raises(
        UsageError, match="this SFTModule has none that scores samples and stays as it is: name the folder"
    ):
        fitted(tmp_path, tiny_llama, track(), cls=SFTModule)
    with pytest.raises(UsageError, match="this DPOModule has none"):
        fitted(tmp_path, tiny_llama, track(), loss=SimPOLoss(), max_steps=1)
    with pytest.raises(UsageError, match="this DPOModule has none"):
        fitted(tmp_path, tiny_llama, track(), reference=Cached(dir=str(tmp_path / "cache")))
    with pytest.raises(UsageError, match="this DPOModule has none"):
        fitted(tmp_path, tiny_llama, track(), reference=Synced())
    fitted(tmp_path, tiny_llama, track(reference=tiny_llama, method="Preferred-FT"), cls=SFTModule, max_steps=2)
    points = read_points([str(tmp_path)])
    assert (points[0].kl, points[0].method) == (0.0, "Preferred-FT")
    assert points[-1].kl != 0


@pytest.mark.parametrize("callback", [lambda: track(), lambda: track(reference="tiny")])
def test_kl_begins_at_0_in_16_bit_products_too(tiny_llama, tmp_path, callback):
    callback = callback()
    callback.reference = callback.reference and tiny_llama
    fitted(tmp_path, tiny_llama, callback, precision="bf16-mixed", max_steps=1)
    point = read_points([str(tmp_path)])[0]
    assert point.kl == pytest.approx(0, abs=1e-6)


def test_kl_of_log_samples_begins_at_0_in_16_bit_products(tiny_llama, tmp_path):
    callback = LogSamples(PROMPTS, max_new_tokens=5)
    fitted(tmp_path, tiny_llama, callback, precision="bf16-mixed", max_steps=1)
    assert callback.before[1]["kl"] == 0


class Failing(CountOfA):
    def score(self, prompts, responses):
        return [math.nan] * len(responses)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_measure_what_one_does(strategy, tiny_llama, two_ranks, tmp_path):
    one = divided.track(tiny_llama, tmp_path / "one")
    found = two_ranks.run(divided.track, tiny_llama, tmp_path / "two", strategy=strategy, devices=2)
    assert [len(points) for points in found] == [3, 3]
    for ours, theirs in zip(one, found[0], strict=True):
        assert theirs["step"] == ours["step"]
        for name in ("reward", "reward_se", "kl", "kl_se", "length_mean"):
            assert theirs[name] == pytest.approx(ours[name], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be 1 or more"),
        ({"num_samples": 0}, "`num_samples` must be 1 or more"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UsageError, match=message):
        track(**options)


def test_prompts_from_a_file_have_the_numbers_of_its_rows(tiny_llama, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(f"\n{json.dumps({'prompt': 'a'})}\n")
    with pytest.raises(UsageError, match="prompt 2 a reward that is no number"):
        fitted(tmp_path, tiny_llama, TrackRewardKL(str(tmp_path / "prompts.jsonl"), Failing(), **HOW))


def test_a_scorer_that_fails_ends_the_run_in_words(tiny_llama, tmp_path):
    with pytest.raises(UsageError, match="Failing gave a response to prompt 1 a reward that is no number"):
        fitted(tmp_path, tiny_llama, TrackRewardKL(PROMPTS, Failing(), **HOW))
    assert not (tmp_path / TRACKED).exists()
    assert torch.is_grad_enabled()
