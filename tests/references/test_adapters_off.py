"""The weights under the adapters as reference: as good as a copy, and nothing of the policy is changed by asking."""

import importlib.util
import math

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from small_runs import data, fit, module, rows, same, saving, trained, trainer

import dpo_lightning.cli
from dpo_lightning import DPOModule, PolicySpec, PreferenceDataModule, SFTModule
from dpo_lightning.errors import UsageError
from dpo_lightning.export import save_policy
from dpo_lightning.losses import TDPO1Loss, WPOLoss
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.references import AdaptersOff, Cached, FrozenCopy, Synced

RANK_2 = LoRA(rank=2, alpha=8)
KINDS = {
    "lora": RANK_2,
    "rslora": LoRA(rank=2, options={"use_rslora": True}),
    "dora": LoRA(rank=2, options={"use_dora": True}),
    "two layers": LoRA(rank=2, target_modules=["q_proj", "down_proj"]),
    "whole head": LoRA(rank=2, options={"modules_to_save": ["lm_head"]}),
}


@pytest.fixture(scope="module")
def adapter(tiny_llama, tmp_path_factory):
    """Folder of an adapter that was trained."""
    folder = tmp_path_factory.mktemp("trained")
    dpo = module(tiny_llama, AdaptersOff(), RANK_2)
    fit(folder, dpo, data(tiny_llama))
    save_policy(dpo.spec, dpo.policy, folder / "adapter", adapter="save")
    return str(folder / "adapter")


@pytest.fixture(params=["new", "going on"])
def lora(request, adapter):
    return RANK_2 if request.param == "new" else LoRA(path=adapter)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_equal_those_of_a_frozen_copy(tiny_llama, tmp_path, kind):
    expected, found = (
        fit(tmp_path, module(tiny_llama, reference, KINDS[kind]), data(tiny_llama)).values
        for reference in (FrozenCopy(), AdaptersOff())
    )
    assert found == pytest.approx(expected, abs=1e-5)
    assert expected[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(expected[-1] - math.log(2)) > 1e-2


@pytest.mark.parametrize("loss", [TDPO1Loss(beta=0.5), WPOLoss(beta=0.5)])
def test_losses_of_whole_distributions(tiny_llama, tmp_path, lora, loss):
    expected, found = (
        fit(tmp_path, module(tiny_llama, reference, lora, loss=loss), data(tiny_llama)).values
        for reference in (FrozenCopy(), AdaptersOff())
    )
    assert found == pytest.approx(expected, abs=1e-5)


def test_an_adapter_that_goes_on_is_its_own_reference(tiny_llama, tmp_path, adapter):
    lora = LoRA(path=adapter)
    expected, found = (
        fit(tmp_path, module(tiny_llama, reference, lora), data(tiny_llama)).values
        for reference in (FrozenCopy(), AdaptersOff())
    )
    assert found == pytest.approx(expected, abs=1e-5)
    assert expected[0] == pytest.approx(math.log(2), abs=1e-6)
    # Not the weights below it.
    base = fit(tmp_path, module(tiny_llama, FrozenCopy(path=tiny_llama), lora), data(tiny_llama), max_steps=1)
    assert abs(base.values[0] - math.log(2)) > 1e-2


class State(Callback):
    """What asking the reference must leave alone."""

    def __init__(self):
        self.seen = []

    def of(self, module):
        parts = tuple((name, part.training) for name, part in module.policy.named_modules())
        return parts, tuple((name, weight.requires_grad) for name, weight in module.policy.named_parameters())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        before = self.of(pl_module)
        weights = {name: weight.clone() for name, weight in pl_module.policy.named_parameters()}
        first = pl_module.reference_policy(batch)
        again = pl_module.reference_policy(batch)
        pl_module.reference_policy.outputs(batch)
        assert self.of(pl_module) == before
        assert same(dict(pl_module.policy.named_parameters()), weights)
        assert torch.equal(first.total, again.total)  # dropout, if any, is off
        assert not first.total.requires_grad
        self.seen.append(first.total)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("training", [True, False])
def test_asking_changes_nothing_of_the_policy(tiny_llama, tmp_path, lora, dropout, training):
    if lora.path is None:
        lora = LoRA(rank=2, dropout=dropout)
    state, dpo = State(), module(tiny_llama, AdaptersOff(), lora, dropout=dropout > 0)
    dpo.configure_model()
    dpo.train(training)
    fit(tmp_path, dpo, data(tiny_llama), callbacks=[state], max_steps=2)
    assert len(state.seen) == 2
    dpo.policy.train(training)
    before = state.of(dpo)
    with pytest.raises(AttributeError):
        dpo.reference_policy(None)
    assert state.of(dpo) == before  # nor where it fails


def test_only_adapters_are_trained_and_kept(tiny_llama, tmp_path, lora):
    dpo = module(tiny_llama, AdaptersOff(), lora)
    before = {name: weight.clone() for name, weight in PolicySpec(path=tiny_llama).build().named_parameters()}
    run = trainer(tmp_path, max_steps=4)
    run.fit(dpo, data(tiny_llama))
    run.save_checkpoint(tmp_path / "last.ckpt")
    optimized = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in dpo.policy.parameters() if p.requires_grad}
    names = set(trained(dpo))
    assert names
    assert all(".lora_A.default." in name or ".lora_B.default." in name for name in names)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(state["state_dict"]) == {f"policy.{name}" for name in names}
    kept = {name.replace(".base_layer", ""): weight for name, weight in dpo.policy.named_parameters()}
    assert all(torch.equal(kept[name], weight) for name, weight in before.items())
    assert set(dpo._ddp_params_and_buffers_to_ignore) >= {
        f"policy.{name}" for name, weight in dpo.policy.named_parameters() if not weight.requires_grad
    }
    assert list(dpo.reference_policy.parameters()) == []


@pytest.mark.parametrize("reference", [AdaptersOff(), FrozenCopy()])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tiny_llama, tmp_path, lora, reference):
    whole, resumed = (module(tiny_llama, reference, lora) for _ in range(2))
    expected = saving(tmp_path, whole, data(tiny_llama))
    found = fit(tmp_path, resumed, data(tiny_llama), tmp_path / "step=3.ckpt", seed=1)
    assert found.values == expected.values[3:]
    assert same(trained(resumed), trained(whole))


def test_pure_bf16_resumes(tiny_llama, tmp_path, lora):
    whole, resumed = (module(tiny_llama, AdaptersOff(), lora) for _ in range(2))
    saving(tmp_path, whole, data(tiny_llama), precision="bf16-true")
    fit(tmp_path, resumed, data(tiny_llama), tmp_path / "step=3.ckpt", seed=1, precision="bf16-true")
    assert same(trained(resumed), trained(whole))


@pytest.mark.parametrize("reference", [AdaptersOff(), FrozenCopy(), None])
def test_a_loaded_checkpoint_is_the_policy_and_goes_on(tiny_llama, tmp_path, lora, reference):
    if reference is None:
        dpo = module(tiny_llama, lora=lora, cls=SFTModule)
        source = {"num_responses": 1}
    else:
        dpo, source = module(tiny_llama, reference, lora), {}
    saving(tmp_path, dpo, data(tiny_llama, **source))
    loaded = type(dpo).load_from_checkpoint(tmp_path / "step=6.ckpt", weights_only=True)
    assert loaded.spec.lora == lora
    assert same(trained(loaded), trained(dpo))
    before, after = (trainer(tmp_path).validate(m, data(tiny_llama, **source), verbose=False)[0] for m in (dpo, loaded))
    assert after == before
    losses = fit(tmp_path, loaded, data(tiny_llama, **source), max_steps=1)
    again = fit(tmp_path, dpo, data(tiny_llama, **source), max_steps=1)
    assert losses.values == again.values


def test_adapters_of_other_weights_are_refused(tiny_llama, tmp_path, lora):
    dpo = module(tiny_llama, AdaptersOff(), lora)
    saving(tmp_path, dpo, data(tiny_llama), max_steps=1)
    other = PolicySpec(path=tiny_llama).build()
    with torch.no_grad():
        other.model.lm_head.weight[0, 0] += 1e-3
    other.model.save_pretrained(tmp_path / "other")
    another = module(tmp_path / "other", AdaptersOff(), lora)
    message = "trained on other weights than .*/other holds now; set `policy.path` to those"
    with pytest.raises(UsageError, match=message):
        fit(tmp_path, another, data(tiny_llama), tmp_path / "step=1.ckpt")
    spec = {"path": str(tmp_path / "other"), "lora": lora}
    with pytest.raises(UsageError, match=message):
        DPOModule.load_from_checkpoint(tmp_path / "step=1.ckpt", policy=PolicySpec(**spec))


def test_without_adapters_it_is_refused_before_weights_are_loaded(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(PolicySpec, "build", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(UsageError, match=r"needs a policy with adapters, `policy.lora`; .* use FrozenCopy"):
        fit(tmp_path, module(tiny_llama, AdaptersOff()), data(tiny_llama))


@pytest.mark.parametrize("init", ["pissa", False])
def test_adapters_that_change_the_policy_at_once_are_noticed(tiny_llama, tmp_path, init):
    lora = LoRA(rank=2, options={"init_lora_weights": init})
    with pytest.raises(UsageError, match=r"log-probabilities differ by up to .* name it by `reference.init_args.path`"):
        fit(tmp_path, module(tiny_llama, AdaptersOff(), lora), data(tiny_llama))
    if init == "pissa":  # split into a rest and an adapter, the weights are still the same ones together
        named = module(tiny_llama, FrozenCopy(path=tiny_llama), lora)
        losses = fit(tmp_path, named, data(tiny_llama), max_steps=1)
        assert losses.values[0] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("reference", [AdaptersOff(), FrozenCopy(), "cached", Synced(alpha=0.5, interval=2)])
def test_adapters_of_quantised_weights_train(wide_llama, tmp_path, bits, reference):
    reference = Cached(dir=str(tmp_path / "cache")) if reference == "cached" else reference
    dpo = module(wide_llama, reference, RANK_2, quantize=bits)
    losses = fit(tmp_path, dpo, data(wide_llama))
    assert losses.values[0] == pytest.approx(math.log(2), abs=1e-3)
    assert abs(losses.values[-1] - math.log(2)) > 1e-2
    assert {p.dtype for p in dpo.policy.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_adapters_of_quantised_weights_resume(wide_llama, tmp_path):
    # Not of 4 bits: bitsandbytes packs those anew for the CPU, and then counts with bfloat16, from an evaluation on.
    whole, resumed = (module(wide_llama, AdaptersOff(), RANK_2, quantize="8bit") for _ in range(2))
    saving(tmp_path, whole, data(wide_llama))
    fit(tmp_path, resumed, data(wide_llama), tmp_path / "step=3.ckpt", seed=1)
    assert same(trained(resumed), trained(whole))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_quantised_weights_without_adapters_are_not_trained(tiny_llama, tmp_path):
    dpo = module(tiny_llama, quantize="8bit")
    with pytest.raises(UsageError, match=r"Quantised weights cannot be trained: add adapters by `policy.lora`"):
        fit(tmp_path, dpo, data(tiny_llama))
    trainer(tmp_path).validate(dpo, data(tiny_llama), verbose=False)


@pytest.mark.parametrize("lora", KINDS.values(), ids=KINDS)
def test_sft_trains_adapters_alone(tiny_llama, tmp_path, lora):
    sft = module(tiny_llama, lora=lora, cls=SFTModule)
    losses = saving(tmp_path, sft, data(tiny_llama, num_responses=1))
    assert losses.values[-1] < losses.values[0]
    state = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    assert set(state["state_dict"]) == {f"policy.{name}" for name in trained(sft)}
    assert "base_fingerprint" in state


def test_the_command_line_takes_any_option_of_peft(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lora = {"rank": 3, "alpha": 6, "dropout": 0.1, "target_modules": ["q_proj", "up_proj"]}
    lora["options"] = {"use_dora": True, "use_rslora": True, "modules_to_save": ["lm_head"]}
    model = {"policy": {"path": tiny_llama, "lora": lora}, "loss": {"class_path": "DPOLoss"}, "lr": 1e-2}
    config = {
        "model": {"class_path": "DPOModule", "init_args": {**model, "reference": {"class_path": "AdaptersOff"}}},
        "data": {"class_path": "PreferenceDataModule", "init_args": {"train": "pairs.parquet", "batch_size": 4}},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_model_summary": False},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows(8)), "pairs.parquet")
    monkeypatch.setattr("sys.argv", ["dpo-lightning"])
    cli = dpo_lightning.cli.run(["fit", "--config", "config.yaml", "--model.init_args.policy.lora.rank", "2"])
    settings = cli.model.policy.model.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (2, 6, 0.1)
    assert (settings.use_dora, settings.use_rslora, settings.modules_to_save) == (True, True, ["lm_head"])
    assert settings.target_modules == {"q_proj", "up_proj"}
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    loaded = DPOModule.load_from_checkpoint(checkpoint, weights_only=True)
    assert loaded.spec.lora == LoRA(**{**lora, "rank": 2})
    assert same(trained(loaded), trained(cli.model))


def test_an_example_without_a_trainer(tiny_llama, lora):
    source = PreferenceDataModule(rows(4), tokenizer=tiny_llama, batch_size=4)
    source.setup("fit")
    dpo = module(tiny_llama, AdaptersOff(), lora)
    batch = next(iter(source.train_dataloader()))
    assert torch.equal(dpo(batch).total, dpo.reference_logps(batch).total)
