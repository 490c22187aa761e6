"""Weights are read from files in parts, wherever they lie and whatever they are called there."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpo_lightning import PolicySpec
from dpo_lightning.models.weight_files import StoredWeight, safetensors_files, stored_weights


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config("gpt2"))


def whole(weight):
    return tuple(slice(0, size) for size in weight.shape)


def test_parts_are_those_of_the_weight(tmp_path):
    weights = {"table": torch.randn(7, 5), "vector": torch.randn(4).bfloat16(), "number": torch.tensor(3.0)}
    save_file(weights, tmp_path / "file.safetensors")
    stored = {name: StoredWeight(tmp_path / "file.safetensors", name) for name in weights}
    assert stored["table"].read((slice(2, 4), slice(0, 3))).equal(weights["table"][2:4, :3])
    assert stored["vector"].read((slice(1, 4),)).equal(weights["vector"][1:])
    assert stored["number"].read(()).equal(weights["number"])


@pytest.mark.parametrize("part", ["10MB", "20KB"])
def test_every_name_of_a_weight_leads_to_it(part, model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size=part)
    assert len(safetensors_files(PolicySpec(path=str(tmp_path)).file)) == len(list(tmp_path.glob("*.safetensors")))
    stored = stored_weights(model, PolicySpec(path=str(tmp_path)).file)
    assert stored["lm_head.weight"] == stored["transformer.wte.weight"]  # of which files hold one
    for name, weight in model.state_dict().items():
        assert stored[name].read(whole(weight)).equal(weight)


def test_files_of_the_model_without_its_head(model, tmp_path):
    model.base_model.save_pretrained(tmp_path)
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    stored = stored_weights(model, PolicySpec(path=str(tmp_path)).file)
    assert stored["transformer.wte.weight"].read(whole(model.lm_head.weight)).equal(model.lm_head.weight)


def test_where_there_are_no_safetensors_nothing_is_found(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert safetensors_files(PolicySpec(path=str(tmp_path)).file) == []
    assert stored_weights(model, PolicySpec(path=str(tmp_path)).file) is None
