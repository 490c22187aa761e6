"""A recipe builds the model it describes, and what it cannot build it refuses in words."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from dpo_lightning.data.collate import collate
from dpo_lightning.data.example import TokenizedExample
from dpo_lightning.errors import UsageError
from dpo_lightning.models import spec as spec_module
from dpo_lightning.models.seam import ATTENTION
from dpo_lightning.models.selfcheck import Verdict
from dpo_lightning.models.spec import PolicySpec

BATCH = collate([TokenizedExample([5, 6, 7], [[8, 9], [10]], 1)])


def saved_weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same_weights(policy, expected):
    got = policy.model.state_dict()
    assert got.keys() == expected.keys()
    return all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def noisy_gpt2(tmp_path_factory):
    """Folder of a tiny model whose config asks for dropout of three kinds."""
    folder = str(tmp_path_factory.mktemp("noisy"))
    config = GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0.1
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_a_policy_is_what_was_saved_in_training_mode_on_the_stream(tiny_llama):
    policy = PolicySpec(path=tiny_llama).build()
    assert same_weights(policy, saved_weights(tiny_llama))
    assert policy.training
    assert policy.model.training
    assert all(parameter.requires_grad for parameter in policy.parameters())
    assert policy.layout == "stream"
    assert policy.model.config._attn_implementation == ATTENTION


def test_dropout_is_off_unless_it_is_kept(noisy_gpt2):
    quiet = PolicySpec(path=noisy_gpt2, layout="rows").build()
    assert quiet.training
    assert torch.equal(quiet(BATCH).total, quiet(BATCH).total)
    assert {module.p for module in quiet.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    noisy = PolicySpec(path=noisy_gpt2, layout="rows", dropout=True).build()
    assert not torch.equal(noisy(BATCH).total, noisy(BATCH).total)
    assert torch.equal(noisy.eval()(BATCH).total, quiet.eval()(BATCH).total)


def test_dropout_that_is_kept_is_noise_on_the_stream_too(noisy_gpt2):
    noisy = PolicySpec(path=noisy_gpt2, layout="stream", dropout=True).build()
    assert not torch.equal(noisy(BATCH).total, noisy(BATCH).total)


def test_no_layer_is_dropped_at_random_either(tmp_path):
    OPTForCausalLM(
        OPTConfig(
            vocab_size=97,
            hidden_size=16,
            word_embed_proj_dim=16,
            ffn_dim=32,
            num_hidden_layers=8,
            num_attention_heads=2,
            max_position_embeddings=64,
            layerdrop=0.5,
        )
    ).save_pretrained(tmp_path)
    policy = PolicySpec(path=str(tmp_path)).build()
    assert torch.equal(policy(BATCH).total, policy(BATCH).total)  # were it on: equal once in 256 tries


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_have_the_dtype_asked_for_and_log_probabilities_are_fp32(tiny_llama, dtype):
    policy = PolicySpec(path=tiny_llama, dtype=dtype).build()
    assert {parameter.dtype for parameter in policy.parameters()} == {getattr(torch, dtype)}
    assert policy(BATCH).total.dtype == torch.float32


def test_random_weights_have_the_same_shapes_and_other_values(tiny_llama):
    policy = PolicySpec(path=tiny_llama, random_init=True, dtype="bfloat16").build()
    expected = saved_weights(tiny_llama)
    got = policy.model.state_dict()
    assert {name: weight.shape for name, weight in got.items()} == {n: weight.shape for n, weight in expected.items()}
    matrices = [name for name, weight in expected.items() if weight.ndim == 2]
    assert matrices
    assert not any(torch.equal(got[name].float(), expected[name].bfloat16().float()) for name in matrices)
    assert got["lm_head.weight"].dtype == torch.bfloat16


def test_random_weights_follow_the_seed(tiny_llama):
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(PolicySpec(path=tiny_llama, random_init=True).build().model.lm_head.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("layout", ["stream", "rows"])
def test_a_layout_that_is_named_is_taken(tiny_llama, layout):
    policy = PolicySpec(path=tiny_llama, layout=layout).build()
    assert policy.layout == layout
    assert (policy.model.config._attn_implementation == ATTENTION) is (layout == "stream")


def test_a_stream_that_is_wrong_is_refused_even_when_asked_for(tiny_llama, monkeypatch):
    verdict = Verdict("rows", "llama", reason="it is Monday")
    monkeypatch.setattr(spec_module, "choose_layout", lambda *_, **__: verdict)
    with pytest.raises(UsageError, match=r"`policy.layout: stream` was asked for, but llama .* Monday.*layout: auto"):
        PolicySpec(path=tiny_llama, layout="stream").build()


def test_models_are_built_on_the_cpu_whatever_the_default_device(tiny_llama):
    with torch.device("meta"):  # stands for the GPU that Lightning makes the default
        policy = PolicySpec(path=tiny_llama).build()
    assert policy.layout == "stream"
    assert {parameter.device.type for parameter in policy.parameters()} == {"cpu"}


def test_both_layouts_give_the_same_log_probabilities(tiny_llama):
    totals = [PolicySpec(path=tiny_llama, layout=layout).build()(BATCH).total for layout in ("stream", "rows")]
    torch.testing.assert_close(*totals, atol=2e-5, rtol=0)


def test_the_layout_is_checked_where_and_in_what_the_policy_computes(tiny_llama, monkeypatch, caplog):
    asked = []

    def choose(config, **kwargs):
        asked.append((config.model_type, kwargs))
        return Verdict("rows", "llama", reason="it is Monday")

    monkeypatch.setattr(spec_module, "choose_layout", choose)
    spec_module._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        policy = PolicySpec(path=tiny_llama, dtype="bfloat16").build()
        PolicySpec(path=tiny_llama, trust_remote_code=True).build("cpu", torch.float16)
    assert policy.layout == "rows"
    assert asked == [
        ("llama", {"device": "cpu", "dtype": torch.bfloat16, "trust_remote_code": False}),
        ("llama", {"device": "cpu", "dtype": torch.float16, "trust_remote_code": True}),
    ]
    messages = [record.getMessage() for record in caplog.records if record.name == spec_module.__name__]
    assert len(messages) == 1  # a fallback is a warning, said once
    assert messages[0].startswith("llama models cannot read the token stream: it is Monday.")


@pytest.mark.parametrize(("checkpointing", "expected"), [(False, [1, 1]), (True, [2, 2]), (1, [2, 2]), (2, [2, 1])])
def test_activation_checkpointing_is_of_no_layer_every_layer_or_every_nth(tiny_llama, checkpointing, expected):
    policy = PolicySpec(path=tiny_llama, activation_checkpointing=checkpointing).build()
    runs = [0, 0]

    def count(number):
        runs[number] += 1

    for number, layer in enumerate(policy.model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: count(number))
    policy(BATCH).total.sum().backward()
    assert runs == expected  # once more in backward


def test_activation_checkpointing_takes_no_negative_number(tiny_llama):
    with pytest.raises(UsageError, match=r"`policy.activation_checkpointing` is true, false, or n.*got -1"):
        PolicySpec(path=tiny_llama, activation_checkpointing=-1)


def test_the_tokenizer_lies_with_the_model_unless_it_is_named(tiny_llama, tmp_path):
    tokenizer = PolicySpec(path=tiny_llama).load_tokenizer()
    begin, end, padding = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert len({begin, end, padding}) == 3
    ids = tokenizer("the film")["input_ids"]
    assert ids[0] == begin
    assert end not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the film"
    elsewhere = PolicySpec(path=str(tmp_path), tokenizer=tiny_llama).load_tokenizer()
    assert elsewhere.get_vocab() == tokenizer.get_vocab()


def test_pickled_weights_are_refused_unless_they_are_allowed(tiny_llama, tmp_path):
    expected = saved_weights(tiny_llama)
    shutil.copy(Path(tiny_llama) / "config.json", tmp_path)
    torch.save(expected, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"no file named model.safetensors.*can run code.*`policy.allow_pickle: true`"):
        PolicySpec(path=str(tmp_path)).build()
    assert same_weights(PolicySpec(path=str(tmp_path), allow_pickle=True).build(), expected)


@pytest.mark.parametrize(
    "path",
    ["/no/such/folder", "./nowhere", "~/no/such/folder", "a/b/c", "package:nothing", "package:quickstart/nothing"],
)
def test_a_folder_that_is_not_there_is_named(path, monkeypatch):
    monkeypatch.setattr(spec_module.AutoConfig, "from_pretrained", None)  # no hub is asked
    message = rf"`policy.path`: there is no folder {path}, and it is no name on a hub \(owner/model\)"
    with pytest.raises(UsageError, match=message):
        PolicySpec(path=path).build()


def test_a_name_that_the_hub_does_not_have_is_reported_as_one(monkeypatch):
    def unreachable(*args, **kwargs):
        assert kwargs["local_files_only"] is False
        assert kwargs["trust_remote_code"] is False
        raise OSError("there is no such repository")

    monkeypatch.setattr(spec_module.AutoConfig, "from_pretrained", unreachable)
    message = r"cannot load AutoConfig from owner/model, which is no folder here .*there is no such repository"
    with pytest.raises(UsageError, match=message):
        PolicySpec(path="owner/model").build()


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(
        UsageError, match=f"`policy.path`: cannot load AutoConfig from folder {tmp_path}: .*config.json"
    ):
        PolicySpec(path=str(tmp_path)).build()


def test_a_path_in_the_package_is_found():
    policy = PolicySpec(path="package:quickstart/model").build()
    assert policy.model.config.model_type == "llama"
