"""A frozen copy, on the CPU or in fewer bits too, and what is refused."""

import importlib.util
import logging
import math

import pytest
import torch
from small_runs import data, fit, module, same, saving, trained, trainer, weights
from torch import nn
from transformers import AutoModelForCausalLM

from dpo_lightning import DPOModule, PolicySpec
from dpo_lightning.errors import UsageError
from dpo_lightning.losses import TDPO1Loss
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.references import FrozenCopy, fingerprint
from dpo_lightning.references import frozen as frozen_module
from dpo_lightning.references.base import FrozenPolicy
from dpo_lightning.references.frozen import OffloadedPolicy

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes, the extra `quantize`"
)


@pytest.fixture
def other(tiny_llama, tmp_path):
    """Folder of another model."""
    policy = PolicySpec(path=tiny_llama).build()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    policy.model.save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


@pytest.fixture
def tied_llama(tiny_llama, tmp_path):
    """A model whose output head is its embedding."""
    config = PolicySpec(path=tiny_llama).load_config()
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied")
    return str(tmp_path / "tied")


def test_another_model_is_the_reference_as_it_lies_there(tiny_llama, tmp_path, other, caplog):
    caplog.set_level(logging.INFO, "dpo_lightning")
    dpo = module(tiny_llama, FrozenCopy(path=other))
    fit(tmp_path, dpo, data(tiny_llama))
    expected = module(other)
    expected.configure_model()
    assert torch.equal(weights(dpo.reference_policy), weights(expected))
    assert not torch.equal(weights(dpo), weights(expected))
    assert "First batch: loss" in caplog.text


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
@pytest.mark.parametrize("loss", [{}, {"loss": TDPO1Loss(beta=0.5)}])
def test_offloaded_losses_equal_those_of_a_plain_copy(tiny_llama, tmp_path, loss, lora):
    expected, found = (
        fit(tmp_path, module(tiny_llama, reference, lora, **loss), data(tiny_llama)).values
        for reference in (FrozenCopy(), FrozenCopy(offload=True))
    )
    assert found == expected
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)


def test_an_offloaded_copy_is_nowhere(tiny_llama, tmp_path):
    dpo = module(tiny_llama, FrozenCopy(offload=True))
    saving(tmp_path, dpo, data(tiny_llama), max_steps=2)
    (copied,) = dpo.reference_policy._frozen
    assert list(dpo.parameters()) == list(dpo.policy.parameters())
    assert not any(name.startswith("reference") for name in dpo.state_dict())
    state = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    assert not any(name.startswith("reference") for name in state["state_dict"])
    assert state["reference_fingerprint"] == fingerprint(copied) != fingerprint(dpo.policy)
    dpo.to("meta")
    assert {parameter.device.type for parameter in copied.parameters()} == {"cpu"}


class Elsewhere:
    """In place of a device: what arrives there is bfloat16, which shows on the CPU."""

    type = "elsewhere"


@pytest.fixture
def elsewhere(monkeypatch):
    original = torch.Tensor.to

    def to(tensor, *args, **kwargs):
        args = [torch.bfloat16 if isinstance(argument, Elsewhere) else argument for argument in args]
        return original(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    return Elsewhere()


def test_a_layer_is_on_the_device_while_it_runs_and_only_then(elsewhere):
    layer, during = nn.Linear(3, 2), []
    home = layer.weight.data_ptr()
    frozen_module._visit(layer, elsewhere)
    layer.register_forward_pre_hook(lambda module, _: during.append(module.weight.dtype))
    layer(torch.ones(1, 3, dtype=torch.bfloat16))
    assert during == [torch.bfloat16]
    assert (layer.weight.dtype, layer.weight.data_ptr()) == (torch.float32, home)
    with pytest.raises(RuntimeError):
        layer(torch.ones(1, 3))
    assert (layer.weight.dtype, layer.weight.data_ptr()) == (torch.float32, home)  # after an error too


def test_layers_visit_one_by_one(tiny_llama, elsewhere):
    policy = PolicySpec(path=tiny_llama).build()
    offloaded = OffloadedPolicy(policy, elsewhere)
    most, seen = [], []

    def look(module, _):
        there = [name for name, parameter in policy.named_parameters() if parameter.dtype == torch.bfloat16]
        most.append(len(there))
        seen.extend(there)

    for part in policy.modules():
        part.register_forward_pre_hook(look)
    source = data(tiny_llama)
    source.setup("fit")
    batch = next(iter(source.train_dataloader()))
    outputs = offloaded.outputs(batch)
    assert max(most) == 1
    # The weight of the head is taken by itself.
    assert set(seen) == {name for name, _ in policy.named_parameters()} - {"model.lm_head.weight"}
    assert outputs.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}


def test_half_the_memory_is_reported_not_refused(tiny_llama, tmp_path, caplog):
    caplog.set_level(logging.INFO, "dpo_lightning")
    for path in (None, tiny_llama):
        dpo = module(tiny_llama, FrozenCopy(dtype="bfloat16", path=path))
        losses = fit(tmp_path, dpo, data(tiny_llama), max_steps=1)
        assert {p.dtype for p in dpo.reference_policy.parameters()} == {torch.bfloat16}
        assert dpo.policy.model.lm_head.weight.dtype == torch.float32
        assert losses.values[0] != pytest.approx(math.log(2), abs=1e-7)
        assert losses.values[0] == pytest.approx(math.log(2), abs=2e-2)
        assert caplog.text.count("First batch: loss") == 1
        caplog.clear()


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_a_copy_in_few_bits_is_reported_not_refused(wide_llama, tmp_path, caplog, bits, lora):
    caplog.set_level(logging.INFO, "dpo_lightning")
    dpo = module(wide_llama, FrozenCopy(quantize=bits, dtype="bfloat16"), lora)
    losses = fit(tmp_path, dpo, data(wide_llama), max_steps=2)
    layers = {type(part).__name__ for part in dpo.reference_policy.modules()}
    assert {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[bits] in layers
    assert not any("bit" in type(part).__name__ for part in dpo.policy.modules())
    assert dpo.reference_policy.policy.model.lm_head.weight.dtype == torch.bfloat16
    assert losses.values[0] != pytest.approx(math.log(2), abs=1e-7)
    assert losses.values[0] == pytest.approx(math.log(2), abs=0.1)
    assert "First batch: loss" in caplog.text


def test_bitsandbytes_is_asked_for(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = r'`quantize` needs bitsandbytes: pip install .*"\.\[quantize\]"'
    with pytest.raises(UsageError, match=message):
        PolicySpec(path=tiny_llama, quantize="8bit")
    monkeypatch.setattr(PolicySpec, "build", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(UsageError, match=message):
        fit(tmp_path, module(tiny_llama, FrozenCopy(quantize="8bit")), data(tiny_llama))


def test_random_weights_have_no_quantised_copy(tiny_llama):
    with pytest.raises(UsageError, match=r"Random weights cannot be quantised"):
        PolicySpec(path=tiny_llama, quantize="8bit", random_init=True)


@pytest.mark.parametrize("reference", [FrozenCopy(), FrozenCopy(offload=True)])
def test_new_adapters_resume_whatever_the_seed(tiny_llama, tmp_path, reference):
    whole = module(tiny_llama, reference, LoRA(rank=2))
    saving(tmp_path, whole, data(tiny_llama))
    resumed = module(tiny_llama, reference, LoRA(rank=2))
    fit(tmp_path, resumed, data(tiny_llama), tmp_path / "step=3.ckpt", seed=1)
    assert same(trained(resumed), trained(whole))
    loaded = DPOModule.load_from_checkpoint(tmp_path / "step=6.ckpt", weights_only=True)
    before, after = (trainer(tmp_path).validate(m, data(tiny_llama), verbose=False)[0] for m in (whole, loaded))
    assert after == before


def test_under_mixed_precision_linear_weights_are_kept_narrow_and_give_the_same_bits(tiny_llama, tmp_path):
    dpo, examples = module(tiny_llama), data(tiny_llama)
    fit(tmp_path, dpo, examples, precision="bf16-mixed")
    model = dpo.reference_policy.policy.model
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert model.model.embed_tokens.weight.dtype == model.model.norm.weight.dtype == torch.float32
    plain = FrozenPolicy(PolicySpec(path=tiny_llama).build())
    assert dpo.reference_policy.fingerprint == plain.fingerprint
    batch = next(iter(examples.train_dataloader()))
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(batch).total
        assert torch.equal(dpo.reference_policy(batch).total, expected)
    assert torch.equal(dpo.reference_policy(batch).total, expected)  # whatever surrounds it
    assert not torch.equal(plain(batch).total, expected)


def test_an_output_head_that_is_the_embedding_too_stays_as_it_is(tied_llama):
    policy = FrozenPolicy(PolicySpec(path=tied_llama).build(), torch.bfloat16).policy
    assert policy.model.lm_head.weight is policy.model.model.embed_tokens.weight
    assert policy.model.lm_head.weight.dtype == torch.float32


def test_offload_and_compiled_layers_are_refused_together(tiny_llama, tmp_path):
    with pytest.raises(UsageError, match=r"`reference.offload`.*`policy.compile`"):
        fit(tmp_path, module(tiny_llama, FrozenCopy(offload=True), compile=True), data(tiny_llama))
