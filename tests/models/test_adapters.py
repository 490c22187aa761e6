"""Adapters are put into a model, taken up by its weights, and told apart by what they add."""

import copy
import importlib.util

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dpo_lightning import PolicySpec
from dpo_lightning.errors import UsageError
from dpo_lightning.export import save_policy
from dpo_lightning.models.adapters import REFERENCE, TRAINED, LoRA, adapter_weights, as_reference, copy_adapter
from dpo_lightning.references import fingerprint

IDS = torch.tensor([[1, 5, 9, 20, 31]])
KINDS = {
    "lora": LoRA(rank=2),
    "rslora": LoRA(rank=2, options={"use_rslora": True}),
    "dora": LoRA(rank=2, options={"use_dora": True}),
    "two layers": LoRA(rank=2, target_modules=["q_proj", "down_proj"]),
    "embeddings": LoRA(rank=2, target_modules=["embed_tokens", "q_proj"]),
    "whole head": LoRA(rank=2, options={"modules_to_save": ["lm_head"]}),
}
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


@torch.no_grad()
def as_trained(policy):
    """Adapters with weights as training leaves them."""
    torch.manual_seed(1)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return policy.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("lora", KINDS.values(), ids=KINDS)
def test_a_new_adapter_changes_nothing_and_alone_is_trained(tiny_llama, lora):
    plain, policy = PolicySpec(path=tiny_llama).build(), PolicySpec(path=tiny_llama, lora=lora).build()
    torch.testing.assert_close(logits(policy.model), logits(plain.model), atol=1e-6, rtol=0)
    weights = {name for name, weight in policy.named_parameters() if weight.requires_grad}
    assert weights
    assert weights == {f"model.{name}" for name, _ in policy.model.named_parameters() if f".{TRAINED}." in f"{name}."}
    assert len(list(adapter_weights(policy.model, TRAINED))) == len(weights)
    logits_after = logits(as_trained(policy).model)
    assert (logits_after - logits(plain.model)).abs().max() > 1e-3


def test_constants_reach_peft(tiny_llama):
    lora = LoRA(rank=3, alpha=7.0, dropout=0.25, options={"lora_alpha": 9.0, "use_rslora": True})
    settings = PolicySpec(path=tiny_llama, lora=lora).build().model.peft_config[TRAINED]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout, settings.use_rslora) == (3, 9.0, 0.25, True)
    targets = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.rpartition(".")[2] for name in settings.target_modules} == targets  # all but the head


@pytest.mark.parametrize("lora", KINDS.values(), ids=KINDS)
def test_a_merged_copy_is_a_plain_model(tiny_llama, tmp_path, lora):
    spec = PolicySpec(path=tiny_llama, lora=lora)
    policy = as_trained(spec.build())
    before, expected = copy.deepcopy(policy.state_dict()), logits(policy.model)
    save_policy(spec, policy, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(loaded), expected, atol=2e-5, rtol=0)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert {name: type(part) for name, part in loaded.named_modules()} == {
        name: type(part) for name, part in plain.named_modules()
    }
    assert (logits(plain) - expected).abs().max() > 1e-3
    # The policy itself goes on with its adapter.
    assert policy.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert torch.equal(logits(policy.model), expected)


def test_merging_leaves_a_frozen_adapter_out(tiny_llama, tmp_path):
    spec = PolicySpec(path=tiny_llama, lora=LoRA(rank=2))
    policy = as_trained(spec.build())
    copy_adapter(policy.model)
    as_trained(policy)
    expected = logits(policy.model)
    save_policy(spec, policy, tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(whole), expected, atol=2e-5, rtol=0)
    assert not any("lora" in name for name, _ in whole.named_parameters())


@pytest.mark.parametrize("lora", KINDS.values(), ids=KINDS)
def test_a_saved_adapter_is_loaded_by_us_and_by_peft(tiny_llama, tmp_path, lora):
    spec = PolicySpec(path=tiny_llama, lora=lora)
    policy = as_trained(spec.build())
    save_policy(spec, policy, tmp_path, adapter="save")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "model.safetensors").exists()
    ours = PolicySpec(path=tiny_llama, lora=LoRA(path=str(tmp_path))).build().eval()
    assert torch.equal(logits(ours.model), logits(policy.model))
    trained = [{name for name, weight in p.named_parameters() if weight.requires_grad} for p in (ours, policy)]
    assert trained[0] == trained[1]
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), str(tmp_path))
    torch.testing.assert_close(logits(theirs), logits(policy.model), atol=1e-5, rtol=0)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_adapters_of_quantised_weights_are_merged_in_full_precision(wide_llama, tmp_path, bits):
    spec = PolicySpec(path=wide_llama, lora=LoRA(rank=2), quantize=bits)
    policy = as_trained(spec.build())
    save_policy(spec, policy, tmp_path)
    full = PolicySpec(path=wide_llama, lora=LoRA(rank=2)).build().eval()
    with torch.no_grad():
        for (_, weight), (_, trained) in zip(
            adapter_weights(full.model, TRAINED), adapter_weights(policy.model, TRAINED), strict=True
        ):
            weight.copy_(trained)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "quantization_config" not in loaded.config.to_dict()
    torch.testing.assert_close(logits(loaded), logits(full.model), atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["lora", "dora", "whole head"])
def test_the_copy_of_an_adapter_stays_what_it_was(tiny_llama, kind):
    policy = as_trained(PolicySpec(path=tiny_llama, lora=KINDS[kind]).build())
    first = logits(policy.model)
    copy_adapter(policy.model)
    assert torch.equal(logits(policy.model), first)
    assert not any(weight.requires_grad for _, weight in adapter_weights(policy.model, REFERENCE))
    assert all(weight.requires_grad for _, weight in adapter_weights(policy.model, TRAINED))
    changed = logits(as_trained(policy).model)
    assert not torch.equal(changed, first)
    with as_reference(policy.model):
        assert torch.equal(logits(policy.model), first)
    assert torch.equal(logits(policy.model), changed)


@pytest.mark.parametrize("lora", KINDS.values(), ids=KINDS)
def test_without_its_adapter_a_policy_is_what_lies_below(tiny_llama, lora):
    policy = as_trained(PolicySpec(path=tiny_llama, lora=lora).build())
    changed, below = logits(policy.model), logits(AutoModelForCausalLM.from_pretrained(tiny_llama))
    for _ in range(2):
        with as_reference(policy.model):
            torch.testing.assert_close(logits(policy.model), below, atol=1e-6, rtol=0)
        assert torch.equal(logits(policy.model), changed)


@pytest.mark.parametrize("kind", ["lora", "embeddings", "dora"])
def test_new_adapters_have_one_fingerprint_whatever_their_random_weights(tiny_llama, kind):
    prints = set()
    for seed in range(3):
        torch.manual_seed(seed)
        policy = PolicySpec(path=tiny_llama, lora=KINDS[kind]).build()
        prints.add(fingerprint(policy))
    assert len(prints) == 1
    for name, weight in policy.named_parameters():
        if weight.requires_grad and "lora_A" not in name and "lora_embedding_B" not in name:
            with torch.no_grad():
                weight.flatten()[0] += 1.0
            prints.add(fingerprint(policy))
    assert len(prints) > 3
    # Once the other factor is there, the random one counts too.
    random = next(weight for name, weight in policy.named_parameters() if "lora_A" in name)
    with torch.no_grad():
        random[0, 0] += 1.0
    assert fingerprint(policy) not in prints


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "`policy.lora.rank` must be 1 or more, got 0; 8 to 64 is usual"),
        ({"options": {"use_dorra": True}}, "`policy.lora`: peft does not take this: .*use_dorra"),
        ({"target_modules": ["qproj"]}, "`policy.lora`: peft does not take this: .*qproj"),
        ({"path": "/no/such/adapter"}, "`policy.lora`: peft does not take this: .*/no/such/adapter"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"output head alone.*modules_to_save: \[lm_head\]"),
    ],
)
def test_what_cannot_be_is_refused_in_words(tiny_llama, settings, message):
    with pytest.raises(UsageError, match=message):
        PolicySpec(path=tiny_llama, lora=LoRA(**settings)).build()


def test_an_adapter_of_another_shape_is_refused(tiny_llama, wide_llama, tmp_path):
    spec = PolicySpec(path=wide_llama, lora=LoRA(rank=2))
    save_policy(spec, spec.build(), tmp_path, adapter="save")
    with pytest.raises(UsageError, match=r"`policy.lora`: peft does not take this"):
        PolicySpec(path=tiny_llama, lora=LoRA(path=str(tmp_path))).build()


def test_peft_is_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'`policy.lora` needs peft: pip install .*"\.\[peft\]"'):
        LoRA()


def test_tied_embeddings_stay_tied(tmp_path):
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    spec = PolicySpec(path=str(tmp_path / "tied"), lora=LoRA(rank=2))
    policy = as_trained(spec.build())
    save_policy(spec, policy, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.testing.assert_close(logits(loaded), logits(policy.model), atol=2e-5, rtol=0)
