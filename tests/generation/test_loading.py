"""A model is loaded from wherever it may be, and what is none is refused in words."""

import json
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from small_runs import module
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from dpo_lightning import SFTModule
from dpo_lightning.errors import UsageError
from dpo_lightning.generation import loading
from dpo_lightning.generation.loading import load, load_tokenizer, which_model
from dpo_lightning.models.adapters import LoRA

IDS = torch.tensor([[1, 5, 9, 20, 31, 7]])
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def checkpoint_of(path, model, **kwargs):
    """A module whose weights have changed, and its checkpoint with a chat template of the data's."""
    trained = module(model, **kwargs)
    trained.configure_model()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in trained.policy.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.05)
    record = {"hyper_parameters": dict(trained.hparams), "data": {"provenance": {"chat_template": TEMPLATE}}}
    trained.on_save_checkpoint(record)
    if path.suffix == ".ckpt":
        torch.save({"state_dict": trained.state_dict(), **record}, path)
    else:
        dcp.save({"state_dict": trained.state_dict()}, checkpoint_id=path, no_dist=True)
        torch.save(record, path / "meta.pt")
    return trained


@pytest.mark.parametrize(
    ("name", "settings"),
    [("a.ckpt", {}), ("a.ckpt", {"cls": SFTModule}), ("a.ckpt", {"lora": LoRA(rank=2)}), ("sharded", {})],
)
def test_a_checkpoint_is_loaded_as_it_was_trained(tiny_llama, tmp_path, name, settings):
    trained = checkpoint_of(tmp_path / name, tiny_llama, **settings)
    model, tokenizer = load(str(tmp_path / name))
    trained.policy.eval()
    torch.testing.assert_close(logits(model), logits(trained.policy.model), atol=1e-5, rtol=0)
    assert (logits(AutoModelForCausalLM.from_pretrained(tiny_llama)) - logits(model)).abs().max() > 1e-2
    assert not model.training
    assert tokenizer.chat_template == TEMPLATE == load_tokenizer(str(tmp_path / name)).chat_template


def test_a_folder_is_loaded_in_the_dtype_that_is_asked_for(tiny_llama):
    model, tokenizer = load(tiny_llama, dtype="bfloat16")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert tokenizer.get_vocab() == load_tokenizer(tiny_llama).get_vocab()


def test_a_checkpoint_whose_base_has_moved_is_told_where_it_is(tiny_llama, tmp_path):
    moved = shutil.copytree(tiny_llama, tmp_path / "before")
    checkpoint_of(tmp_path / "a.ckpt", str(moved), lora=LoRA(rank=2))
    shutil.move(moved, tmp_path / "after")
    for function in (load, load_tokenizer):
        with pytest.raises(UsageError, match="say --base where it is now"):
            function(str(tmp_path / "a.ckpt"))
        function(str(tmp_path / "a.ckpt"), base=str(tmp_path / "after"))


def test_what_is_no_model_is_refused_in_words(tiny_llama, tmp_path):
    (tmp_path / "empty").mkdir()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (tmp_path / "bad.ckpt").write_bytes(b"no zip")
    for path, words in {
        "./nowhere": "There is no model ./nowhere: give a Hugging Face folder",
        str(tmp_path / "nowhere.ckpt"): "There is no checkpoint",
        str(tmp_path / "empty"): "holds no model: there is no config.json in it, and no checkpoint",
        str(adapter): "adapters alone; export the checkpoint with `--adapter merge`",
        str(tmp_path / "bad.ckpt"): "is no checkpoint",
    }.items():
        for function in (load, load_tokenizer):
            with pytest.raises(UsageError, match=words):
                function(path)


def test_a_model_that_gives_numbers_is_refused(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "reward")
    config = LlamaConfig(**json.loads((folder / "config.json").read_text()), num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    with pytest.raises(UsageError, match=r"is a reward model or a classifier \(LlamaForSequenceClassification\)"):
        load(str(folder))


def test_a_model_that_was_trained_anew_is_another(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    first = which_model(str(folder))
    assert first["model"] == str(folder)
    assert which_model(str(folder)) == first
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01)
    model.save_pretrained(folder)
    second = which_model(str(folder))
    assert {name for name in first if first[name] != second[name]} == {"weights"}
    assert which_model("owner/model") == {"model": "owner/model"}


@pytest.mark.parametrize("most", [256 << 20, 64 << 10], ids=["whole", "in chunks"])
def test_a_copy_is_the_same_model_and_one_with_another_middle_is_not(tmp_path, monkeypatch, most):
    monkeypatch.setattr(loading, "MOST_READ", most)
    (tmp_path / "first").mkdir()
    content = bytearray(range(256)) * (3 << 12)  # 3 MiB
    (tmp_path / "first/model.safetensors").write_bytes(content)
    copy = shutil.copytree(tmp_path / "first", tmp_path / "second", copy_function=shutil.copyfile)
    expected = which_model(str(tmp_path / "first"))["weights"]
    assert which_model(str(copy))["weights"] == expected
    middle = slice(5 << 18, 7 << 18)  # as long as a matrix of weights, far from both ends
    content[middle] = bytes(byte ^ 1 for byte in content[middle])
    (copy / "model.safetensors").write_bytes(content)
    assert which_model(str(copy))["weights"] != expected
