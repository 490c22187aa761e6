"""What docs/embedding.md says works as it stands, and models in memory train as those that are loaded by path."""

import math
import re
from pathlib import Path

import pytest
import small_runs
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from dpo_lightning import DPOModule, SFTModule
from dpo_lightning.callbacks import ExportHF, LogSamples, MemoryPlan
from dpo_lightning.errors import UsageError
from dpo_lightning.export import save_policy
from dpo_lightning.losses import DPOLoss, TDPO2Loss, WPOLoss
from dpo_lightning.models.in_memory import InMemory
from dpo_lightning.models.policy import CausalPolicy, LogitsPolicy
from dpo_lightning.references import AdaptersOff, Cached, FrozenCopy, Synced

PAGE = Path(__file__).parent.parent / "docs/embedding.md"
BLOCKS = re.findall(r"^## (.*?)$.*?```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)


def program(heading, folder, model, monkeypatch):
    """The names that a block of the page leaves."""
    monkeypatch.chdir(folder)
    (folder / "my_sft_model").symlink_to(model)
    names = {"__name__": "embedding"}
    exec(dict(BLOCKS)[heading], names)
    return names


def test_every_program_of_the_page_is_run():
    assert len(BLOCKS) == PAGE.read_text().count("```python") == 4


def test_a_model_in_memory_under_a_trainer_of_ones_own(tiny_llama, tmp_path, monkeypatch):
    names = program("A Hugging Face model that is in memory already", tmp_path, tiny_llama, monkeypatch)
    assert names["module"].policy.layout == "stream"
    first, second = names["margins"].values[-2:]
    assert second > first > 0
    logged = (tmp_path / names["trainer"].logger.log_dir / "metrics.csv").read_text()
    assert "train/grad_norm" in logged
    assert "lr-AdamW" in logged
    assert (tmp_path / "checkpoints/last.ckpt").exists()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "my_dpo_model")
    assert small_runs.same(dict(exported.named_parameters()), dict(names["model"].named_parameters()))


def test_a_policy_of_ones_own(tiny_llama, tmp_path, monkeypatch):
    names = program("A policy of your own", tmp_path, tiny_llama, monkeypatch)
    module, trained, resumed = names["module"], names["trained"], names["resumed"]
    assert isinstance(module.policy, LogitsPolicy)
    assert small_runs.same(small_runs.trained(trained), small_runs.trained(module))
    assert all(batch.rewards.abs().max() > 0 for batch in names["rewards"])
    assert (names["trainer"].global_step, names["more"].global_step) == (4, 8)
    initial = dict(names["pretrained"]().named_parameters())
    for copied in (module, trained, resumed):
        assert small_runs.same(dict(copied.reference_policy.policy.model.named_parameters()), initial)
    hyperparameters = torch.load(tmp_path / "tiny.ckpt", weights_only=True)["hyper_parameters"]
    assert hyperparameters["policy"] == {"in_memory": "TinyLM"}


def test_a_loss_beside_the_loss(tiny_llama, tmp_path, monkeypatch):
    names = program("A loss beside the loss", tmp_path, tiny_llama, monkeypatch)
    module, data, trainer = names["module"], names["data"], names["trainer"]
    assert trainer.global_step == 2
    whole = validated(module, data, tmp_path)
    module.sft_weight = 0.0
    plain = validated(module, data, tmp_path)
    scored = [module(piece) for batch in data.train_dataloader() for piece in batch.pieces]
    nll = torch.cat([-logps.total[:, 0] / logps.length[:, 0] for logps in scored]).mean().item()
    assert whole - plain == pytest.approx(0.5 * nll, rel=1e-4)


def validated(module, data, folder):
    trainer = small_runs.trainer(folder)
    trainer.validate(module, data.train_dataloader(), verbose=False)
    return trainer.callback_metrics["val/loss"].item()


def test_without_lightning(tiny_llama, tmp_path, monkeypatch):
    losses = program("The engine and a loss without Lightning", tmp_path, tiny_llama, monkeypatch)["losses"]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-6)


class Wrapped(nn.Module):
    """A module of one's own around a Hugging Face model."""

    def __init__(self, path, result="tensor"):
        super().__init__()
        self.inner, self.result, self.seen = LlamaForCausalLM.from_pretrained(path), result, None

    def forward(self, tokens, attention_mask=None):
        self.seen = attention_mask
        output = self.inner(input_ids=tokens, attention_mask=attention_mask)
        return {"tensor": output.logits, "object": output, "hidden": output.logits[0], "nothing": None}[self.result]


class Inherited(LlamaForCausalLM):
    """What the proof of the stream says nothing of."""


OWN = {
    "tensor": Wrapped,
    "object": lambda path: Wrapped(path, "object"),
    "inherited": Inherited.from_pretrained,
    "model": LlamaForCausalLM.from_pretrained,
}


def in_memory(model, loss=None, reference=None, **kwargs):
    return DPOModule(model, loss or DPOLoss(beta=0.5), reference, **{"lr": 1e-2, **kwargs})


@pytest.mark.parametrize("kind", OWN)
def test_it_trains_as_the_model_that_it_wraps(tiny_llama, tmp_path, kind):
    by_path = small_runs.module(tiny_llama)
    expected = small_runs.fit(tmp_path, by_path, small_runs.data(tiny_llama))
    module = in_memory(OWN[kind](tiny_llama))
    found = small_runs.fit(tmp_path, module, small_runs.data(tiny_llama))
    assert type(module.policy) is (CausalPolicy if kind == "model" else LogitsPolicy)
    assert found.values == pytest.approx(expected.values, rel=1e-5, abs=1e-5)
    torch.testing.assert_close(small_runs.weights(module), small_runs.weights(by_path), rtol=0, atol=2e-4)


@pytest.mark.parametrize("loss", [TDPO2Loss(), WPOLoss()], ids=lambda loss: type(loss).__name__)
def test_losses_that_ask_for_the_whole_vocabulary_know_logits_too(tiny_llama, tmp_path, loss):
    expected = small_runs.fit(tmp_path, small_runs.module(tiny_llama, loss=loss), small_runs.data(tiny_llama))
    found = small_runs.fit(tmp_path, in_memory(Wrapped(tiny_llama), loss), small_runs.data(tiny_llama))
    assert found.values == pytest.approx(expected.values, rel=1e-5, abs=1e-5)


def test_under_bf16_mixed_and_sft(tiny_llama, tmp_path):
    source = small_runs.data(tiny_llama, num_responses=1)
    by_path = small_runs.fit(tmp_path, small_runs.module(tiny_llama, cls=SFTModule), source, precision="bf16-mixed")
    found = small_runs.fit(tmp_path, SFTModule(Wrapped(tiny_llama), lr=1e-2), source, precision="bf16-mixed")
    assert found.values == pytest.approx(by_path.values, rel=2e-2)
    pairs = small_runs.data(tiny_llama)
    by_path = small_runs.fit(tmp_path, small_runs.module(tiny_llama), pairs, precision="bf16-mixed")
    found = small_runs.fit(tmp_path, in_memory(Wrapped(tiny_llama)), pairs, precision="bf16-mixed")
    assert found.values[0] == pytest.approx(math.log(2), rel=1e-6)
    assert found.values == pytest.approx(by_path.values, rel=2e-2)


@pytest.mark.parametrize("result", ["hidden", "nothing"])
def test_what_is_no_logits_is_named(tiny_llama, tmp_path, result):
    with pytest.raises(UsageError, match=r"Wrapped returns .* must return logits of shape \(rows, columns, vocab"):
        small_runs.fit(tmp_path, in_memory(Wrapped(tiny_llama, result)), small_runs.data(tiny_llama))


def test_masks_are_given_to_who_asks_for_them(tiny_llama, tmp_path):
    model = Wrapped(tiny_llama)
    small_runs.fit(tmp_path, in_memory(model), small_runs.data(tiny_llama))
    assert model.seen.dtype == torch.int64
    assert set(model.seen.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("reference", [FrozenCopy(), Synced(interval=2), "cached"], ids=str)
def test_a_resumed_run_equals_an_uninterrupted_one(tiny_llama, tmp_path, reference):
    if reference == "cached":
        reference = Cached(dir=str(tmp_path / "cache"))
    whole = in_memory(Wrapped(tiny_llama), reference=reference)
    expected = small_runs.saving(tmp_path, whole, small_runs.data(tiny_llama))
    rest = in_memory(Wrapped(tiny_llama), reference=reference)
    found = small_runs.fit(tmp_path, rest, small_runs.data(tiny_llama), ckpt_path=tmp_path / "step=3.ckpt", seed=1)
    assert found.values == expected.values[3:]
    assert small_runs.same(small_runs.trained(rest), small_runs.trained(whole))


@pytest.mark.parametrize("way", ["resumed", "loaded"])
def test_an_object_with_other_weights_is_refused(tiny_llama, tmp_path, way):
    module = in_memory(Wrapped(tiny_llama))
    small_runs.saving(tmp_path, module, small_runs.data(tiny_llama), max_steps=2)
    path, other = tmp_path / "step=2.ckpt", module.policy.model  # which is trained by now
    ways = {
        "resumed": lambda: small_runs.fit(tmp_path, in_memory(other), small_runs.data(tiny_llama), ckpt_path=path),
        "loaded": lambda: DPOModule.load_from_checkpoint(path, policy=other, weights_only=True),
    }
    with pytest.raises(UsageError, match="or hand over the policy in memory with the weights that it had then"):
        ways[way]()
    with pytest.raises(UsageError, match=r"was a Wrapped in memory.*load_from_checkpoint"):
        DPOModule.load_from_checkpoint(path, weights_only=True)


def test_scores_of_weights_that_are_gone_are_refused(tiny_llama, tmp_path):
    def cached(name):
        return Cached(dir=str(tmp_path / name))

    module = in_memory(Wrapped(tiny_llama), reference=cached("first"))
    small_runs.saving(tmp_path, module, small_runs.data(tiny_llama), max_steps=2)
    other = in_memory(Wrapped(tiny_llama), reference=cached("second"))
    with pytest.raises(UsageError, match="the Wrapped in memory began with are gone"):
        small_runs.fit(tmp_path, other, small_runs.data(tiny_llama), ckpt_path=tmp_path / "step=2.ckpt")


@pytest.mark.parametrize("trained", [False, True])
def test_adapters_of_ones_own(tiny_llama, tmp_path, trained):
    peft = pytest.importorskip("peft")

    def model():
        torch.manual_seed(0)
        made = LlamaForCausalLM.from_pretrained(tiny_llama)
        made.add_adapter(peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=not trained))
        return made

    module = in_memory(model(), reference=AdaptersOff())
    losses = small_runs.saving(tmp_path, module, small_runs.data(tiny_llama))
    assert losses.values[0] == pytest.approx(math.log(2), rel=1e-6)
    assert losses.values[-1] < losses.values[0]
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    assert [name for name in saved if name.startswith("policy.") and ".default." not in name] == []
    rest = in_memory(model(), reference=AdaptersOff())
    found = small_runs.fit(tmp_path, rest, small_runs.data(tiny_llama), ckpt_path=tmp_path / "step=3.ckpt", seed=1)
    assert found.values == losses.values[3:]


def test_adapters_are_asked_for_where_there_are_none(tiny_llama, tmp_path):
    with pytest.raises(UsageError, match=r"model\.add_adapter"):
        small_runs.fit(tmp_path, in_memory(Wrapped(tiny_llama), reference=AdaptersOff()), small_runs.data(tiny_llama))


def test_a_frozen_model_and_what_cannot_be_done_with_an_object_are_refused(tiny_llama, tmp_path):
    source = small_runs.data(tiny_llama)
    with pytest.raises(UsageError, match="All weights of the Wrapped in memory are frozen"):
        small_runs.fit(tmp_path, in_memory(Wrapped(tiny_llama).requires_grad_(False)), source)
    with pytest.raises(UsageError, match=r"name them by `reference\.path`"):
        small_runs.fit(tmp_path, in_memory(Wrapped(tiny_llama), reference=FrozenCopy(quantize="8bit")), source)
    recipe = InMemory(Wrapped(tiny_llama))
    with pytest.raises(UsageError, match="came without a tokenizer"):
        recipe.load_tokenizer()
    with pytest.raises(UsageError, match="is no Hugging Face model"):
        save_policy(recipe, recipe.build(), tmp_path / "out")


def test_samples_are_refused_of_a_model_that_does_not_write(tiny_llama, tmp_path):
    with pytest.raises(UsageError, match="the Wrapped in memory has no `generate`"):
        small_runs.fit(
            tmp_path, in_memory(Wrapped(tiny_llama)), small_runs.data(tiny_llama), callbacks=[LogSamples(["the film"])]
        )


def test_another_model_may_be_its_reference(tiny_llama, tmp_path):
    module = in_memory(Wrapped(tiny_llama), reference=FrozenCopy(path=tiny_llama))
    losses = small_runs.fit(tmp_path, module, small_runs.data(tiny_llama))
    assert losses.values[0] == pytest.approx(math.log(2), rel=1e-5)
    assert type(module.reference_policy.policy) is CausalPolicy


def test_callbacks_know_models_in_memory(tiny_llama, tmp_path):
    tokenizer = small_runs.PolicySpec(path=tiny_llama).load_tokenizer()
    module = in_memory(InMemory(LlamaForCausalLM.from_pretrained(tiny_llama), tokenizer))
    export, plan = ExportHF(str(tmp_path / "hf")), MemoryPlan()
    small_runs.fit(tmp_path, module, small_runs.data(tiny_llama), callbacks=[export, plan])
    assert plan.plan is None
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert small_runs.same(dict(exported.named_parameters()), dict(module.policy.model.named_parameters()))


def test_a_policy_is_taken_as_it_stands(tiny_llama):
    policy = CausalPolicy(LlamaForCausalLM.from_pretrained(tiny_llama), "rows")
    module = in_memory(policy)
    module.configure_model()
    assert module.policy is policy
