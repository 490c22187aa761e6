"""Reward models: the likelihood of DPO, of a scalar head at the last token of every response."""

import math

import pytest
import small_runs
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from small_runs import data, trainer
from transformers import AutoModelForSequenceClassification

from dpo_lightning import PreferenceDataModule, RewardModule
from dpo_lightning.errors import UsageError
from dpo_lightning.functional.preference import bradley_terry_nll
from dpo_lightning.memory.plan import plan
from dpo_lightning.memory.rehearsal import Case
from dpo_lightning.models.adapters import LoRA


def module(path, **kwargs):
    return small_runs.module(path, cls=RewardModule, **kwargs)


def batches(source, split="val"):
    source.setup("fit")
    return list(source.val_dataloader() if split == "val" else source.train_dataloader())


def mean_reward(reward, source, split="val"):
    """Over all responses, with the weights as they are."""
    reward.eval()
    with torch.no_grad():
        found = [reward(batch)[batch.length > 0] for batch in batches(source, split)]
    reward.train()
    return torch.cat(found).mean().item()


def test_the_loss_is_the_likelihood_of_pairs(tiny_llama):
    reward = module(tiny_llama)
    (batch,) = batches(data(tiny_llama, val_batch_size=8))
    rewards = reward(batch)
    expected = bradley_terry_nll(rewards[:, 0] - rewards[:, 1]).sum()
    torch.testing.assert_close(reward.summed_loss("validate", batch), expected)
    expected.backward()
    assert reward.policy.head.weight.grad.abs().sum() > 0


def test_the_loss_is_the_likelihood_of_rankings(tiny_llama):
    reward = module(tiny_llama)
    (batch,) = batches(data(tiny_llama, val_batch_size=8, most=3))
    assert batch.length.shape[1] == 3
    expected = 0.0
    for row, length in zip(reward(batch).tolist(), batch.length.tolist(), strict=True):
        present = [r for r, tokens in zip(row, length, strict=True) if tokens]
        for place in range(len(present)):
            expected += math.log(sum(math.exp(r) for r in present[place:])) - present[place]
    assert reward.summed_loss("validate", batch).item() == pytest.approx(expected, rel=1e-5)


def test_a_fit_recovers_an_order_that_words_have(tiny_llama, tmp_path):
    words = ["superb", "good", "slow", "bad"]
    pairs = [
        {"prompt": f"film {i}", "chosen": f" was {words[a]}", "rejected": f" was {words[b]}"}
        for i in range(4)
        for a in range(4)
        for b in range(a + 1, 4)
    ]
    torch.manual_seed(0)
    reward = module(tiny_llama, lr=3e-3)
    source = PreferenceDataModule(pairs, pairs, tokenizer=tiny_llama, batch_size=24)
    run = trainer(tmp_path, max_epochs=30)
    run.fit(reward, source)
    assert run.callback_metrics["val/rewards/accuracies"] == 1
    ranking = [{"prompt": "film 9", "responses": [f" was {word}" for word in words]}]
    unseen = PreferenceDataModule(test=ranking, tokenizer=tiny_llama)
    (scored,) = trainer(tmp_path).predict(reward, unseen)
    assert scored.rewards[0].argsort(descending=True).tolist() == [0, 1, 2, 3]
    assert scored.row.tolist() == [1]


def test_rewards_have_mean_zero_over_the_validation_data(tiny_llama, tmp_path):
    reward, source = module(tiny_llama), data(tiny_llama)
    losses = small_runs.fit(tmp_path, reward, source)
    assert losses.logged[-1]["train/rewards/mean"] != 0
    assert reward.offset == pytest.approx(mean_reward(reward, source), abs=1e-6)
    assert abs(reward.offset) > 1e-3
    held_out = PreferenceDataModule(test=small_runs.rows(5, 1), tokenizer=tiny_llama, val_batch_size=4)
    scored = trainer(tmp_path).predict(reward, held_out)
    assert torch.cat([part.rewards.flatten() for part in scored]).mean().item() == pytest.approx(0, abs=1e-6)


def test_without_validation_data_they_have_it_over_the_training_data(tiny_llama, tmp_path):
    reward, source = module(tiny_llama), data(tiny_llama)
    small_runs.fit(tmp_path, reward, source, limit_val_batches=0)
    assert reward.offset == pytest.approx(mean_reward(reward, source, "train"), abs=1e-6)
    assert reward._offset_step == 6


def test_the_last_weights_have_an_offset_of_their_own_where_no_validation_has_seen_them(tiny_llama, tmp_path):
    reward, source = module(tiny_llama), data(tiny_llama)
    small_runs.fit(tmp_path, reward, source, max_steps=3, val_check_interval=2)
    assert reward._offset_step == 3
    assert reward.offset == pytest.approx(mean_reward(reward, source), abs=1e-6)


def test_a_checkpoint_keeps_the_offset(tiny_llama, tmp_path):
    reward, source = module(tiny_llama), data(tiny_llama)
    small_runs.saving(tmp_path, reward, source)
    loaded = RewardModule.load_from_checkpoint(tmp_path / "step=6.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    assert saved["reward_offset"]["step"] == 4  # that of the validation before: this checkpoint is of the step itself
    assert loaded.offset == saved["reward_offset"]["value"] != 0


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["whole", "lora"])
def test_a_resumed_run_equals_an_uninterrupted_one(tiny_llama, tmp_path, lora):
    whole = module(tiny_llama, lora=lora)
    small_runs.saving(tmp_path, whole, data(tiny_llama))
    resumed = module(tiny_llama, lora=lora)
    small_runs.fit(tmp_path, resumed, data(tiny_llama), ckpt_path=tmp_path / "step=3.ckpt", seed=1)
    assert small_runs.same(small_runs.trained(whole), small_runs.trained(resumed))
    assert resumed.offset == whole.offset


def test_micro_batches_and_accumulation_change_nothing(tiny_llama, tmp_path):
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    found = []
    for settings, run in (
        ({"batch_size": 8}, {}),
        ({"batch_size": 8, "micro_batch_tokens": 60}, {}),
        ({"batch_size": 4}, {"accumulate_grad_batches": 2}),
    ):
        reward = module(tiny_llama, lr=None, optimizer=sgd)
        small_runs.fit(tmp_path, reward, data(tiny_llama, most=3, **settings), max_steps=2, **run)
        found.append(small_runs.weights(reward))
    assert (found[0] - small_runs.weights(_built(module(tiny_llama)))).abs().max() > 1e-3
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-6, rtol=0)


def _built(reward):
    reward.configure_model()
    return reward


def test_the_head_is_trained_whole_in_float32_beside_adapters_and_in_mixed_precision(tiny_llama, tmp_path):
    reward = module(tiny_llama, lora=LoRA(rank=2), dtype="bfloat16")
    reward.configure_model()
    before = reward.policy.head.weight.detach().clone()
    small_runs.fit(tmp_path, reward, data(tiny_llama), max_steps=2, precision="bf16-mixed")
    trained = {name for name, weight in reward.policy.named_parameters() if weight.requires_grad}
    assert [name for name in trained if "lora" not in name] == ["model.score.modules_to_save.default.weight"]
    assert reward.policy.head.weight.dtype == torch.float32
    assert not torch.equal(reward.policy.head.weight, before)


def test_the_head_is_small_and_its_seed_fixes_it(tiny_llama):
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(heads))
        reward = RewardModule({"path": tiny_llama, "head_seed": seed})
        heads.append(_built(reward).policy.head.weight.detach())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert heads[0].std().item() == pytest.approx(33**-0.5, rel=0.3)


def test_the_guard_speaks_of_rewards(tiny_llama, tmp_path):
    class Break(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:
                with torch.no_grad():
                    pl_module.policy.head.weight.fill_(math.inf)

    with pytest.raises(UsageError, match="Largest reward, in nats"):
        small_runs.fit(tmp_path, module(tiny_llama), data(tiny_llama), callbacks=[Break()])


def test_a_model_in_memory_is_trained_itself(tiny_llama, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1)
    before = model.score.weight.detach().clone()
    small_runs.fit(tmp_path, RewardModule(model, lr=1e-3), data(tiny_llama), max_steps=1)
    assert not torch.equal(model.score.weight, before)


def test_other_modules_in_memory_are_refused(tiny_llama, tmp_path):
    with pytest.raises(UsageError, match="Linear in memory is no Hugging Face model"):
        RewardModule(torch.nn.Linear(2, 1))
    two = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=2)
    with pytest.raises(UsageError, match="no decoder with a scalar head"):
        RewardModule(two).configure_model()


def test_a_stream_without_validation_rows_has_no_offset_and_says_so(tiny_llama, tmp_path, caplog):
    source = PreferenceDataModule(small_runs.rows(16), tokenizer=tiny_llama, batch_size=4, stream_buffer=8)
    reward = module(tiny_llama)
    small_runs.fit(tmp_path, reward, source, max_steps=2, max_epochs=-1)
    assert reward.offset == 0
    assert "give `data.init_args.val`" in caplog.text


def test_a_plan_of_memory_counts_a_head_and_no_vocabulary(tiny_llama, tmp_path):
    reward, (batch,) = module(tiny_llama), batches(data(tiny_llama, val_batch_size=8))
    reward.trainer = trainer(tmp_path)
    reward.trainer.strategy.connect(reward)
    found = plan(reward, Case(reward.spec, None, batch))
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1)
    assert found.weights == pytest.approx(4 * sum(weight.numel() for weight in model.parameters()), rel=0.01)
    assert found.reference == 0


class StopAt(Callback):
    """Ends a fit behind a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.should_stop = True


EARLY = EarlyStopping("train/loss", stopping_threshold=1e6, check_on_train_epoch_end=True)


@pytest.mark.parametrize(
    ("stop", "step", "split", "settings"),
    [(StopAt(2), 2, "val", {}), (StopAt(2), 2, "train", {"limit_val_batches": 0}), (EARLY, 4, "val", {})],
    ids=["behind a step", "without validation", "behind the epoch"],
)
def test_a_fit_that_a_callback_ends_has_an_offset_of_its_last_weights(
    tiny_llama, tmp_path, stop, step, split, settings
):
    reward, source = module(tiny_llama), data(tiny_llama)
    settings = {"max_steps": 100, "val_check_interval": 3, "check_val_every_n_epoch": None, **settings}
    small_runs.fit(tmp_path, reward, source, callbacks=[stop], **settings)
    assert reward._offset_step == step
    assert reward.offset == pytest.approx(mean_reward(reward, source, split), abs=1e-6)


def test_the_last_checkpoint_of_a_fit_that_time_ends_has_it(tiny_llama, tmp_path):
    reward, source = module(tiny_llama), data(tiny_llama)
    saver = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
    small_runs.fit(
        tmp_path, reward, source, max_steps=100, limit_val_batches=0, callbacks=[StopAt(2), saver],
        enable_checkpointing=True,
    )  # fmt: skip
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["reward_offset"]
    assert saved == {"value": reward.offset, "step": 2}
