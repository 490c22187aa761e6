import copy
import math

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import dpo_lightning.models.seam
from dpo_lightning import DPOModule, PolicySpec, PreferenceDataModule
from dpo_lightning.data.collate import collate
from dpo_lightning.errors import UsageError
from dpo_lightning.losses import (
    AOTLoss,
    BCOPairLoss,
    CPOLoss,
    DPOLoss,
    MixedLoss,
    NLLLoss,
    ORPOLoss,
    PlackettLuceLoss,
    SimPOLoss,
    TDPO1Loss,
    TDPO2Loss,
    Weighted,
    WPOLoss,
)  # fmt: skip
from dpo_lightning.references import Cached, FrozenCopy, Synced, fingerprint

WORDS = "the film was a joy and its end is slow but we all loved every minute of this bad old story".split()  # noqa: SIM905


def rows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def phrase(length):
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())

    return [{"prompt": phrase(4), "chosen": " " + phrase(5 + i % 3), "rejected": " " + phrase(4)} for i in range(count)]


def module(path, **kwargs):
    return DPOModule(**{"policy": PolicySpec(path=path), "loss": DPOLoss(beta=0.1), "lr": 1e-3, **kwargs})


def data(path, train=24, val=9, **kwargs):
    return PreferenceDataModule(
        rows(train), rows(val, seed=1), tokenizer=path, **{"batch_size": 4, "val_batch_size": 4, **kwargs}
    )


def trainer(tmp_path, **kwargs):
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "log_every_n_steps": 1,
    }
    return Trainer(**{**defaults, **kwargs})


class Losses(Callback):
    """Loss of every optimizer step, as logged."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


@torch.no_grad()
def change_weights(module):
    for parameter in module.policy.parameters():
        parameter.mul_(1.1)


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.policy.parameters()])


def test_the_first_loss_is_log_2_and_training_lowers_it(tiny_llama, tmp_path):
    torch.manual_seed(0)
    losses = Losses()
    trainer(tmp_path, max_epochs=4, callbacks=[losses]).fit(module(tiny_llama), data(tiny_llama))
    assert losses.values[0] == pytest.approx(math.log(2), abs=1e-6)
    assert sum(losses.values[-6:]) / 6 < 0.8 * math.log(2)


def test_the_reference_stays_what_the_policy_was(tiny_llama, tmp_path):
    dpo = module(tiny_llama)
    dpo.configure_model()
    before = copy.deepcopy(dpo.policy.state_dict())
    fit = trainer(tmp_path)
    fit.fit(dpo, data(tiny_llama))
    after = dict(dpo.reference_policy.policy.named_parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in after.items())
    assert not torch.equal(dpo.policy.state_dict()["model.lm_head.weight"], before["model.lm_head.weight"])


def test_the_reference_is_in_no_optimizer_checkpoint_gradient_bucket_or_training_mode(tiny_llama, tmp_path):
    dpo = module(tiny_llama)
    fit = trainer(tmp_path, max_steps=2)
    fit.fit(dpo, data(tiny_llama))
    optimized = {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}
    reference = list(dpo.reference_policy.parameters())
    assert reference
    assert not any(id(p) in optimized or p.requires_grad or p.grad is not None for p in reference)
    assert not any(name.startswith("reference_policy") for name in dpo.state_dict())
    dpo.train()
    assert not any(part.training for part in dpo.reference_policy.modules())
    trained = {name for name, _ in dpo.policy.named_parameters(prefix="policy")}
    names = {name for name, _ in [*dpo.named_parameters(), *dpo.named_buffers()]}
    assert set(dpo._ddp_params_and_buffers_to_ignore) == names - trained


@pytest.mark.parametrize("loss", [SimPOLoss(), CPOLoss(), ORPOLoss(), MixedLoss(losses=[Weighted(loss=NLLLoss())])])
@pytest.mark.parametrize("reference", [None, FrozenCopy(path="./no/model"), Cached(path="./no/model"), Synced()])
def test_a_loss_without_a_reference_builds_none(tiny_llama, tmp_path, monkeypatch, loss, reference):
    for recipe in (FrozenCopy, Cached, Synced):
        monkeypatch.setattr(recipe, "build", lambda *_: pytest.fail("a reference was built"))
    dpo = module(tiny_llama, loss=loss, reference=reference)
    trainer(tmp_path, max_steps=1, limit_val_batches=1).fit(dpo, data(tiny_llama))
    assert dpo.reference_policy is None


def test_weights_changed_in_memory_before_training_are_the_reference(tiny_llama, tmp_path):
    dpo = module(tiny_llama)
    dpo.configure_model()
    change_weights(dpo)
    changed = weights(dpo).clone()
    trainer(tmp_path, max_steps=1).fit(dpo, data(tiny_llama))
    assert torch.equal(torch.cat([p.flatten() for p in dpo.reference_policy.parameters()]), changed)


class ChangePolicy(Callback):
    def on_fit_start(self, trainer, pl_module):
        change_weights(pl_module)


def test_a_policy_changed_behind_its_reference_is_refused(tiny_llama, tmp_path):
    fit = trainer(tmp_path, callbacks=[ChangePolicy()])
    with pytest.raises(UsageError, match=r"log-probabilities differ by up to .* name it by `reference.init_args.path`"):
        fit.fit(module(tiny_llama), data(tiny_llama))


def test_another_model_as_reference_is_reported_not_refused(tiny_llama, tmp_path, caplog):
    caplog.set_level("INFO", "dpo_lightning")
    fit = trainer(tmp_path, max_steps=1, callbacks=[ChangePolicy()])
    fit.fit(module(tiny_llama, reference=FrozenCopy(path=tiny_llama)), data(tiny_llama))
    assert "First batch: loss" in caplog.text


def test_kept_dropout_does_not_fail_the_check(tiny_llama, tmp_path):
    spec = PolicySpec(path=tiny_llama, dropout=True)
    dpo = module(tiny_llama, policy=spec)
    dpo.configure_model()
    for layer in dpo.policy.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    trainer(tmp_path, max_steps=1).fit(dpo, data(tiny_llama))
    assert dpo.policy.training


def test_validation_is_exact_over_unequal_batches_and_a_tie_counts_half(tiny_llama, tmp_path):
    (untrained,) = trainer(tmp_path).validate(module(tiny_llama), data(tiny_llama), verbose=False)
    assert untrained["val/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert untrained["val/rewards/accuracies"] == 0.5
    dpo = module(tiny_llama)
    trainer(tmp_path, max_steps=4).fit(dpo, data(tiny_llama))
    # Nine examples in batches of 4, 4, 1 and in one batch.
    (small,) = trainer(tmp_path).validate(dpo, data(tiny_llama), verbose=False)
    (large,) = trainer(tmp_path).validate(dpo, data(tiny_llama, val_batch_size=9), verbose=False)
    assert set(small) == {
        "val/loss", "val/rewards/chosen", "val/rewards/rejected", "val/rewards/accuracies", "val/rewards/margins",
        "val/logps/chosen", "val/logps/rejected",
    }  # fmt: skip
    assert small == pytest.approx(large, rel=1e-5)


def test_predict_gives_the_implicit_rewards(tiny_llama, tmp_path):
    dpo = module(tiny_llama)
    trainer(tmp_path, max_steps=4).fit(dpo, data(tiny_llama))
    test_rows = rows(5, seed=2)
    source = PreferenceDataModule(test=test_rows, tokenizer=tiny_llama, val_batch_size=2)
    scored = trainer(tmp_path).predict(dpo, source)
    assert torch.cat([batch.row for batch in scored]).tolist() == [1, 2, 3, 4, 5]
    rewards = torch.cat([batch.rewards for batch in scored])
    tokenizer = source.tokenizer
    for row, reward in zip(test_rows, rewards, strict=True):
        for column, key in enumerate(("chosen", "rejected")):
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = torch.tensor([[*tokenizer(row["prompt"] + row[key])["input_ids"], tokenizer.eos_token_id]])
            totals = []
            for model in (dpo.policy.model, dpo.reference_policy.policy.model):
                logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
                totals.append(logps[len(prompt) - 1 :].sum().item())
            assert reward[column].item() == pytest.approx(0.1 * (totals[0] - totals[1]), abs=1e-4)


def test_rankings_train_by_plackett_luce_and_are_refused_by_pairwise_losses(tiny_llama, tmp_path):
    ranked = [{"prompt": r["prompt"], "responses": [r["chosen"], r["rejected"], " bad"]} for r in rows(8)]
    source = PreferenceDataModule(ranked, tokenizer=tiny_llama, batch_size=4)
    losses = Losses()
    trainer(tmp_path, callbacks=[losses]).fit(module(tiny_llama, loss=PlackettLuceLoss()), source)
    assert losses.values[0] == pytest.approx(math.log(6), abs=1e-5)  # 3! orders, all alike
    with pytest.raises(UsageError, match="num_responses: 2"):
        trainer(tmp_path).fit(module(tiny_llama), source)


def checkpointed(tiny_llama, tmp_path, **kwargs):
    torch.manual_seed(0)
    dpo = module(tiny_llama, **kwargs)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    fit = trainer(tmp_path, max_steps=8, max_epochs=2, callbacks=[saver], enable_checkpointing=True)
    fit.fit(dpo, data(tiny_llama))
    return dpo, tmp_path / "step=4.ckpt", tmp_path / "step=8.ckpt"


def test_a_checkpoint_holds_plain_data_and_loads_with_weights_only(tiny_llama, tmp_path):
    dpo, _, path = checkpointed(tiny_llama, tmp_path, loss=DPOLoss(beta=0.3, label_smoothing=0.1), warmup_steps=2)
    state = torch.load(path, weights_only=True)
    assert not any("reference_policy" in name for name in state["state_dict"])
    loaded = DPOModule.load_from_checkpoint(path, weights_only=True)
    assert loaded.loss == DPOLoss(beta=0.3, label_smoothing=0.1)
    assert (loaded.spec, loaded.lr, loaded.warmup_steps) == (dpo.spec, 1e-3, 2)
    assert torch.equal(weights(loaded), weights(dpo))
    before, after = (trainer(tmp_path).validate(m, data(tiny_llama), verbose=False)[0] for m in (dpo, loaded))
    assert after == before
    assert fingerprint(loaded.reference_policy) == fingerprint(dpo.reference_policy) == state["reference_fingerprint"]


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tiny_llama, tmp_path):
    whole, middle, _ = checkpointed(tiny_llama, tmp_path, schedule="linear")
    torch.manual_seed(1)  # the order of the batches is the checkpoint's
    resumed = module(tiny_llama, schedule="linear")
    trainer(tmp_path, max_steps=8, max_epochs=2).fit(resumed, data(tiny_llama), ckpt_path=middle, weights_only=True)
    assert torch.equal(weights(resumed), weights(whole))
    assert fingerprint(resumed.reference_policy) == fingerprint(whole.reference_policy)


def test_training_on_from_a_loaded_checkpoint_keeps_the_first_reference(tiny_llama, tmp_path):
    dpo, _, path = checkpointed(tiny_llama, tmp_path)
    loaded = DPOModule.load_from_checkpoint(path)
    losses = Losses()
    trainer(tmp_path, max_steps=1, callbacks=[losses]).fit(loaded, data(tiny_llama))
    assert fingerprint(loaded.reference_policy) == fingerprint(dpo.reference_policy)
    assert losses.values[0] < 0.95 * math.log(2)


@pytest.mark.parametrize("limit", [1.0, 4])
def test_a_run_resumed_at_the_end_of_an_epoch_goes_on_with_the_next(tiny_llama, tmp_path, limit):
    def fit(seed, epochs, ckpt_path=None):
        torch.manual_seed(seed)
        dpo = module(tiny_llama)
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        trainer(
            tmp_path, max_epochs=epochs, callbacks=[saver], enable_checkpointing=True, limit_train_batches=limit
        ).fit(dpo, data(tiny_llama), ckpt_path=ckpt_path)
        return dpo

    whole = fit(0, 3)
    resumed = fit(1, 3, tmp_path / "epoch=0.ckpt")
    assert torch.equal(weights(resumed), weights(whole))


def test_a_second_fit_goes_on_against_the_first_reference(tiny_llama, tmp_path):
    dpo = module(tiny_llama)
    trainer(tmp_path).fit(dpo, data(tiny_llama))
    reference = fingerprint(dpo.reference_policy)
    losses = Losses()
    trainer(tmp_path, callbacks=[losses]).fit(dpo, data(tiny_llama))
    assert fingerprint(dpo.reference_policy) == reference
    assert losses.values[0] < 0.95 * math.log(2)


def test_a_reference_that_does_not_exist_is_found_out_before_weights_are_loaded(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(PolicySpec, "build", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(UsageError, match=r"there is no folder \./no/reference"):
        trainer(tmp_path).fit(module(tiny_llama, reference=FrozenCopy(path="./no/reference")), data(tiny_llama))


def test_pure_bf16_keeps_sums_and_rotary_frequencies_exact(tiny_llama, tmp_path):
    dpo = module(tiny_llama)
    source = data(tiny_llama, val=300, val_batch_size=4)
    (metrics,) = trainer(tmp_path, precision="bf16-true").validate(dpo, source, verbose=False)
    assert metrics["val/loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert dpo.policy.model.lm_head.weight.dtype == torch.bfloat16
    assert dpo.policy.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_pure_bf16_resumes_against_its_reference(tiny_llama, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="last")
    kwargs = {"precision": "bf16-true", "max_epochs": 2}
    first = trainer(tmp_path, max_steps=2, callbacks=[saver], enable_checkpointing=True, **kwargs)
    first.fit(module(tiny_llama), data(tiny_llama))
    resumed = trainer(tmp_path, max_steps=4, **kwargs)
    resumed.fit(module(tiny_llama), data(tiny_llama), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.global_step == 4


def test_autocast_reaches_attention(tiny_llama, tmp_path, monkeypatch):
    seen = []
    original = dpo_lightning.models.seam._attend

    def spy(query, key, value, *args, **kwargs):
        seen.append({query.dtype, key.dtype, value.dtype})
        return original(query, key, value, *args, **kwargs)

    dpo = module(tiny_llama)
    dpo.configure_model()
    monkeypatch.setattr("dpo_lightning.models.seam._attend", spy)
    trainer(tmp_path, precision="bf16-mixed").validate(dpo, data(tiny_llama), verbose=False)
    assert seen
    assert all(dtypes == {torch.bfloat16} for dtypes in seen)


def test_no_log_lines_at_all(tiny_llama, tmp_path):
    trainer(tmp_path, max_steps=2, log_every_n_steps=0).fit(module(tiny_llama), data(tiny_llama))


def test_a_reference_that_lived_in_memory_alone_is_asked_for(tiny_llama, tmp_path):
    dpo = module(tiny_llama)
    dpo.configure_model()
    change_weights(dpo)
    original = tmp_path / "original"
    dpo.policy.model.save_pretrained(original)
    saver = ModelCheckpoint(tmp_path, filename="last")
    trainer(tmp_path, max_steps=2, callbacks=[saver], enable_checkpointing=True).fit(dpo, data(tiny_llama))
    path = tmp_path / "last.ckpt"
    with pytest.raises(UsageError, match=r"another fingerprint.*reference=FrozenCopy\(path=\.\.\.\)"):
        trainer(tmp_path).validate(DPOModule.load_from_checkpoint(path), data(tiny_llama), verbose=False)
    with pytest.raises(UsageError, match="another fingerprint"):
        trainer(tmp_path, max_steps=4).fit(module(tiny_llama), data(tiny_llama), ckpt_path=path)
    given = DPOModule.load_from_checkpoint(path, reference=FrozenCopy(path=str(original)))
    before, after = (trainer(tmp_path).validate(m, data(tiny_llama), verbose=False)[0] for m in (dpo, given))
    assert after == pytest.approx(before, rel=1e-5)


def test_a_missing_policy_weight_is_still_noticed(tiny_llama, tmp_path):
    _, _, path = checkpointed(tiny_llama, tmp_path)
    state = torch.load(path, weights_only=True)
    del state["state_dict"]["policy.model.model.norm.weight"]
    torch.save(state, path)
    with pytest.raises(RuntimeError, match=r"Missing key.*policy\.model\.model\.norm\.weight"):
        DPOModule.load_from_checkpoint(path)


class Logged(Callback):
    def __init__(self):
        self.metrics = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.metrics.append(dict(trainer.logged_metrics))


def test_training_metrics_cover_every_micro_batch(tiny_llama, tmp_path):
    logged = Logged()
    fit = trainer(tmp_path, max_steps=1, accumulate_grad_batches=3, callbacks=[logged])
    fit.fit(module(tiny_llama), data(tiny_llama))
    metrics = logged.metrics[-1]
    seen = fit.train_dataloader.order
    dpo = module(tiny_llama)
    dpo.configure_model()
    examples = [fit.datamodule.examples["train"][i] for share in list(iter(seen))[:3] for i in share.pieces[0]]
    chosen = dpo(collate(examples)).total[:, 0].mean().item()
    assert metrics["train/logps/chosen"].item() == pytest.approx(chosen, rel=1e-4)
    assert {"train/grad_norm", "train/pairs_per_second", "train/tokens_per_second", "train/loss"} <= set(metrics)


def test_gradients_and_losses_survive_bf16_mixed_precision(tiny_llama, tmp_path):
    torch.manual_seed(0)
    losses = Losses()
    run = trainer(tmp_path, max_epochs=4, precision="bf16-mixed", callbacks=[losses])
    run.fit(module(tiny_llama), data(tiny_llama))
    assert losses.values[0] == pytest.approx(math.log(2), abs=1e-3)
    assert sum(losses.values[-6:]) / 6 < 0.8 * math.log(2)


def test_training_all_weights_in_16_bits_is_warned_of(tiny_llama, tmp_path, caplog):
    trainer(tmp_path, max_steps=1).fit(
        module(tiny_llama, policy=PolicySpec(path=tiny_llama, dtype="bfloat16")), data(tiny_llama)
    )
    assert "bf16-mixed" in caplog.text


def test_the_module_can_be_extended(tiny_llama, tmp_path):
    class WithBonus(DPOModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 1.0

    losses = Losses()
    dpo = WithBonus(PolicySpec(path=tiny_llama), DPOLoss(), lr=1e-3)
    assert isinstance(dpo, LightningModule)
    trainer(tmp_path, max_steps=1, callbacks=[losses]).fit(dpo, data(tiny_llama))
    assert losses.values[0] == pytest.approx(1 + math.log(2), abs=1e-6)


def test_running_sums_are_of_all_training_examples_and_kept(tiny_llama, tmp_path):
    loss = BCOPairLoss(beta=0.5)
    rewards = []

    class Watched(DPOModule):
        def _sums(self, policy, reference, add):
            if add:
                rewards.append(self.loss.rewards(policy, reference).detach())
            return super()._sums(policy, reference, add)

    torch.manual_seed(0)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    whole = Watched(PolicySpec(path=tiny_llama), loss, lr=1e-2)
    fit = trainer(tmp_path, max_steps=8, max_epochs=2, callbacks=[saver], enable_checkpointing=True)
    fit.fit(whole, data(tiny_llama))
    total = torch.cat(rewards)
    assert len(total) == 8 * 4  # neither the check nor validation counts
    assert whole._loss_sums.tolist() == pytest.approx([total.sum().item(), total.numel()], rel=1e-5)
    assert abs(whole._loss_sums[0]) > 1e-2
    first = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["loss_sums"]
    assert first == pytest.approx([total[:16].sum().item(), 32.0], rel=1e-5)

    torch.manual_seed(1)
    resumed = module(tiny_llama, loss=loss, lr=1e-2)
    trainer(tmp_path, max_steps=8, max_epochs=2).fit(resumed, data(tiny_llama), ckpt_path=tmp_path / "step=4.ckpt")
    assert torch.equal(weights(resumed), weights(whole))
    assert torch.equal(resumed._loss_sums, whole._loss_sums)
    loaded = DPOModule.load_from_checkpoint(tmp_path / "step=8.ckpt", weights_only=True)
    assert torch.equal(loaded._loss_sums, whole._loss_sums)
    before, after = (trainer(tmp_path).validate(m, data(tiny_llama), verbose=False)[0] for m in (whole, loaded))
    assert after == before


def test_a_loss_that_couples_a_batch_is_not_split(tiny_llama, tmp_path, monkeypatch):
    message = "AOTLoss compares the examples of a batch with each other.*use one device and"
    with pytest.raises(UsageError, match=message):
        trainer(tmp_path, accumulate_grad_batches=2).fit(module(tiny_llama, loss=AOTLoss()), data(tiny_llama))
    split = module(tiny_llama, loss=AOTLoss())
    split.trainer = trainer(tmp_path)
    split.setup("fit")
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "world_size", 2)
        with pytest.raises(UsageError, match=message):
            split.setup("fit")
        split.setup("validate")
    mixed = MixedLoss(losses=[Weighted(loss=DPOLoss()), Weighted(loss=AOTLoss())])
    with pytest.raises(UsageError, match="MixedLoss compares the examples of a batch"):
        trainer(tmp_path, accumulate_grad_batches=2).fit(module(tiny_llama, loss=mixed), data(tiny_llama))


def test_parts_of_a_mixed_loss_have_curves_of_their_own(tiny_llama, tmp_path):
    loss = MixedLoss(losses=[Weighted(loss=DPOLoss(), weight=2.0), Weighted(loss=NLLLoss(), weight=0.5)])
    fit = trainer(tmp_path)
    fit.fit(module(tiny_llama, loss=loss), data(tiny_llama))
    for stage in ("train", "val"):
        logged = {name: fit.callback_metrics[f"{stage}/{name}"].item() for name in ("loss", "loss/DPO", "loss/NLL")}
        assert logged["loss"] == pytest.approx(2 * logged["loss/DPO"] + 0.5 * logged["loss/NLL"], rel=1e-5)
        assert logged["loss/NLL"] > 1


def plain_distributions(model, prompt, response):
    """Log-probabilities of all words at every position of a response, and of its own tokens."""
    ids = torch.tensor([[*prompt, *response]])
    logps = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logps, logps.gather(-1, torch.tensor(response)[:, None])[:, 0]


def by_hand(loss, policy, reference, example):
    """Loss and rewards of an example from plain logits of both models."""
    ratios, kls, weight = [], [], 1.0
    for response in example.response_ids:
        (every, own), (every_ref, own_ref) = (
            plain_distributions(model, example.prompt_ids, response) for model in (policy, reference)
        )
        ratios.append((own - own_ref).sum())
        kls.append((every_ref.exp() * (every_ref - every)).sum())
        weight = weight * (own - every.mul(2).logsumexp(-1)).mean().exp()
    margin, difference = loss.beta * (ratios[0] - ratios[1]), loss.beta * (kls[1] - kls[0])
    if isinstance(loss, WPOLoss):
        return -weight * torch.nn.functional.logsigmoid(margin), [loss.beta * ratio for ratio in ratios]
    share = loss.alpha if isinstance(loss, TDPO2Loss) else 1.0
    rewards = [loss.beta * (ratio + kl) for ratio, kl in zip(ratios, kls, strict=True)]
    return -torch.nn.functional.logsigmoid(margin - share * difference), rewards


@pytest.mark.parametrize("layout", ["stream", "rows"])
@pytest.mark.parametrize("loss", [TDPO1Loss(beta=0.5), TDPO2Loss(beta=0.5, alpha=0.7), WPOLoss(beta=0.5)])
@torch.no_grad()
def test_losses_of_distributions_equal_plain_logits_of_both_models(tiny_llama, tmp_path, loss, layout):
    dpo = module(tiny_llama, policy=PolicySpec(path=tiny_llama, layout=layout), loss=loss, lr=1e-2)
    losses = Losses()
    with torch.enable_grad():
        trainer(tmp_path, max_steps=4, callbacks=[losses]).fit(dpo, data(tiny_llama))
    if not isinstance(loss, WPOLoss):
        assert losses.values[0] == pytest.approx(math.log(2), abs=1e-6)
    source = PreferenceDataModule(rows(5), rows(5), rows(5), tokenizer=tiny_llama, val_batch_size=5)
    (metrics,) = trainer(tmp_path).validate(dpo, source, verbose=False)
    (scored,) = trainer(tmp_path).predict(dpo, source)
    plain = PolicySpec(path=tiny_llama, layout="rows").build().model
    trained = copy.deepcopy(plain)
    trained.load_state_dict(dpo.policy.model.state_dict())
    examples = [source.examples["val"][i] for i in range(5)]
    expected, rewards = zip(*(by_hand(loss, trained, plain, example) for example in examples), strict=True)
    assert metrics["val/loss"] == pytest.approx(torch.stack(expected).mean().item(), abs=2e-5)
    torch.testing.assert_close(scored.rewards, torch.tensor(rewards), atol=1e-4, rtol=0)
    assert abs(metrics["val/loss"] - math.log(2)) > 1e-3
