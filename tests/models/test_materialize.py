"""Models divided among two ranks have the weights, buffers and log-probabilities of whole ones."""

import divided
import pytest
import torch
from families import TINY
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_lightning import PolicySpec
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.models.materialize import fill, without_storage

EQUAL = {"unequal": [], "twin": [], "fingerprint": True, "base": True}
FAMILIES = ("llama", "gpt2", "gemma3_text", "phi3")
OTHERS = ("gpt_neox", "qwen2", "qwen3", "mistral", "gemma2", "opt", "granite", "cohere2", "gpt_oss", "bloom", "mamba")


@pytest.fixture(scope="module")
def save(tiny_config, tmp_path_factory):
    """A function from a family to a folder of a model without a zero or a one among its weights."""

    def saved(family, part=lambda model: model, config=None, dtype=torch.float32, **options):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config or tiny_config(family), dtype=dtype)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.1)
        folder = tmp_path_factory.mktemp(family)
        model.config.save_pretrained(folder)
        part(model).save_pretrained(folder, **options)
        model.config.save_pretrained(folder)
        return folder

    return saved


def check(two_ranks, spec, logps=1e-5):
    for found in two_ranks.run(divided.compare, spec):
        assert found["logps"] <= logps
        assert 0.4 < found["share"] < 0.6  # 97 words and odd biases do not divide by two
        assert {name: found[name] for name in EQUAL} == EQUAL


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(other, marks=pytest.mark.slow) for other in OTHERS)])
def test_a_divided_model_equals_a_whole_one(family, save, two_ranks):
    check(two_ranks, PolicySpec(path=str(save(family))))


def test_in_several_files(save, two_ranks):
    folder = save("llama", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    check(two_ranks, PolicySpec(path=str(folder)))


def test_saved_without_its_head_and_prefix(save, tiny_config, two_ranks):
    config = tiny_config("llama")
    config.tie_word_embeddings = True
    folder = save("llama", part=lambda model: model.model, config=config)
    assert "embed_tokens.weight" in load_file(folder / "model.safetensors")
    check(two_ranks, PolicySpec(path=str(folder)))


def test_two_stored_weights_that_should_be_one(save, tiny_config, two_ranks):
    config = tiny_config("llama")
    config.tie_word_embeddings = True
    folder = save("llama", config=config)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    spec = PolicySpec(path=str(folder))
    check(two_ranks, spec)
    weights["lm_head.weight"][-1, -1] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert all("stored with different values" in said for said in two_ranks.run(divided.refusal, spec))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_bfloat16(stored, save, two_ranks):
    check(two_ranks, PolicySpec(path=str(save("gemma3_text", dtype=stored)), dtype="bfloat16"), logps=0.05)


def test_what_is_refused(save, tiny_config, two_ranks, monkeypatch):
    folder = save("llama", max_shard_size="20KB")
    name = "model.layers.1.mlp.up_proj.weight"
    file = next(file for file in folder.glob("*.safetensors") if name in load_file(file))
    weights = load_file(file)
    whole = weights.pop(name)
    save_file({**weights, "spare": torch.zeros(1)}, file, metadata={"format": "pt"})

    def refused(why, **options):
        said = two_ranks.run(divided.refusal, PolicySpec(path=str(folder), **options))
        assert all(words is not None and why in words for words in said), said

    refused(f"lacks weights: {name}.")
    save_file({**weights, name: whole[1:]}, file, metadata={"format": "pt"})
    refused(f"{name} has the shape (63, 32), and by its config the model has (64, 32)")
    refused("`policy.quantize`: packed weights cannot be divided", quantize="4bit", lora=LoRA())
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = {"quant_method": "fp8"}
    config.save_pretrained(folder)
    refused("is quantised: packed weights cannot be divided")


def test_a_family_without_layers_that_can_be_told_is_refused(save, two_ranks):
    config = AutoConfig.for_model("gpt_neox_japanese", **TINY)
    spec = PolicySpec(path=str(save("gpt_neox_japanese", config=config)))
    said = two_ranks.run(divided.refusal, spec)
    assert all("`trainer.strategy: fsdp2`: " in words and "has no decoder layers" in words for words in said)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 2, "head_dim": 8}


def test_stored_in_another_form(save, two_ranks):
    spec = PolicySpec(path=str(save("qwen3_moe", config=AutoConfig.for_model("qwen3_moe", **{**TINY, **MOE}))))
    check(two_ranks, spec)
    assert all("qwen3_moe: every rank loads the whole model" in said for said in two_ranks.run(divided.warned, spec))


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "lora",
    [LoRA(rank=4), LoRA(rank=4, options={"modules_to_save": ["lm_head"]}), LoRA(rank=4, options={"use_dora": True}),
     LoRA(rank=4, options={"init_lora_weights": "pissa"})],
    ids=["lora", "head", "dora", "pissa"],
)  # fmt: skip
def test_adapters_begin_alike(family, lora, save, two_ranks):
    check(two_ranks, PolicySpec(path=str(save(family)), lora=lora))


def test_adapters_may_be_off_at_first(save, two_ranks):
    spec = PolicySpec(path=str(save("llama")), lora=LoRA(rank=4))
    assert all(error < 0.05 for error in two_ranks.run(divided.adapters_off_first, spec))


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)])
def test_random_weights_are_one_model(lora, save, two_ranks):
    check(two_ranks, PolicySpec(path=str(save("llama")), random_init=True, lora=lora))


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4, 3))
        self.other = torch.nn.Parameter(torch.zeros(2))
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("rate", torch.ones(1))


def test_buffers_that_are_stored_are_read_too():
    model = Scaled()
    stored = {"weight": torch.randn(4, 3), "scale": torch.full((1,), 7.0)}
    missed = fill(model, {name: lambda box, whole=whole: whole[box] for name, whole in stored.items()})
    assert missed == {"other"}
    assert (model.weight.equal(stored["weight"]), model.scale.item(), model.rate.item()) == (True, 7.0, 1.0)


def test_what_a_family_does_not_compute_anew_is_told(tiny_config):
    def make(change):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
        change(model.model)
        return model

    assert without_storage(lambda: make(lambda model: None)) is not None
    assert without_storage(lambda: make(lambda model: setattr(model, "table", torch.arange(3)))) is None
    assert without_storage(lambda: make(lambda model: model.register_buffer("table", torch.arange(3)))) is None
