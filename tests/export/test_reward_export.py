"""An exported reward model gives transformers the rewards that it was trained to give."""

import shutil
from dataclasses import replace

import pytest
import small_runs
import torch
from families import FAMILIES, TINY
from lightning.pytorch.callbacks import ModelCheckpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from dpo_lightning import PreferenceDataModule, RewardModule
from dpo_lightning.callbacks import ExportHF
from dpo_lightning.data.chat import Chat
from dpo_lightning.errors import UsageError
from dpo_lightning.export import export
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.scorers import RewardModel

OFFSET = 0.75
MORE = {
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 6},
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
}


@pytest.fixture(scope="module")
def bare_tokenizer():
    """One whose end token pads, and that has no other to take, as that of GPT-2."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([" ".join(small_runs.WORDS)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<end>", eos_token="<end>", pad_token="<end>")


def language_model(folder, family, tokenizer):
    settings = {**TINY, **FAMILIES.get(family, {}), **MORE.get(family, {}), "vocab_size": len(tokenizer)}
    settings.update(pad_token_id=None, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    if family == "gpt_neo":
        settings = {name: settings[name] for name in settings if not name.startswith(("num_hidden", "num_attention"))}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def as_trained(path, checkpoint, **kwargs):
    """A reward model such as training might leave, and its checkpoint."""
    reward = small_runs.module(path, cls=RewardModule, **kwargs)
    reward.configure_model()
    with torch.no_grad():
        for weight in reward.policy.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.1)
    reward.offset, reward._offset_step = OFFSET, 4
    content = {"state_dict": reward.state_dict(), "hyper_parameters": dict(reward.hparams)}
    content.update({"pytorch-lightning_version": "2.0.0"})
    reward.on_save_checkpoint(content)
    torch.save(content, checkpoint)
    return reward.eval()


def examples_of(path):
    source = PreferenceDataModule(test=small_runs.rows(6, most=3), tokenizer=path, val_batch_size=6)
    source.setup("test")
    (batch,) = source.test_dataloader()
    examples = source.examples["test"].__getitems__(list(range(6)))
    return batch, [example.prompt_ids + response for example in examples for response in example.response_ids]


@torch.no_grad()
def rewards_of(model, sequences, side):
    """What transformers gives for a padded batch."""
    width, padding = max(map(len, sequences)), model.config.pad_token_id
    spaces = [width - len(ids) for ids in sequences]
    if side == "right":
        ids = [ids + [padding] * space for ids, space in zip(sequences, spaces, strict=True)]
        mask = [[1] * (width - space) + [0] * space for space in spaces]
    else:
        ids = [[padding] * space + ids for ids, space in zip(sequences, spaces, strict=True)]
        mask = [[0] * space + [1] * (width - space) for space in spaces]
    mask = torch.tensor(mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # families with learned positions do not derive them from the mask
    return model.eval()(input_ids=torch.tensor(ids), attention_mask=mask, position_ids=positions).logits[:, 0]


def loaded(folder):
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gpt_neox", "gpt_neo", "gemma2", "qwen3_moe"])
def test_transformers_gives_the_rewards_of_the_stream(bare_tokenizer, tmp_path, family):
    path = language_model(tmp_path / "model", family, bare_tokenizer)
    reward = as_trained(path, tmp_path / "it.ckpt")
    model = loaded(export(str(tmp_path / "it.ckpt"), str(tmp_path / "hf")))
    batch, sequences = examples_of(path)
    expected = reward(batch)[batch.length > 0].detach()
    assert expected.std() > 0.1
    for side in ("right", "left"):
        torch.testing.assert_close(rewards_of(model, sequences, side), expected, atol=1e-5, rtol=0)
    assert (model.config.num_labels, model.config.reward_offset) == (1, OFFSET)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.pad_token_id == model.config.pad_token_id
    assert family == "qwen2" or tokenizer.pad_token_id == len(bare_tokenizer)  # Qwen's own class brings more tokens
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, model.config.eos_token_id)


def test_gradients_are_those_of_padded_rows(bare_tokenizer, tmp_path):
    path = language_model(tmp_path / "model", "llama", bare_tokenizer)
    reward = as_trained(path, tmp_path / "it.ckpt")
    model = loaded(export(str(tmp_path / "it.ckpt"), str(tmp_path / "hf")))
    batch, sequences = examples_of(path)
    reward(batch)[batch.length > 0].square().sum().backward()
    with torch.enable_grad():
        rewards_of.__wrapped__(model, sequences, "right").square().sum().backward()
    theirs = {name: weight.grad for name, weight in model.named_parameters()}
    for name, weight in reward.policy.model.named_parameters():
        torch.testing.assert_close(theirs[name][: len(weight)], weight.grad, atol=1e-4, rtol=1e-4)


def test_a_tokens_for_padding_that_is_there_is_taken(tiny_llama, tmp_path):
    as_trained(tiny_llama, tmp_path / "it.ckpt")
    model = loaded(export(str(tmp_path / "it.ckpt"), str(tmp_path / "hf")))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.pad_token == "<pad>"
    assert model.config.vocab_size == len(tokenizer) == len(AutoTokenizer.from_pretrained(tiny_llama))


@pytest.mark.parametrize("kind", ["checkpoint", "folder", "callback"])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["whole", "lora"])
def test_a_scorer_gives_rewards_less_the_offset_wherever_it_reads_them(tiny_llama, tmp_path, kind, lora):
    reward, saver = small_runs.module(tiny_llama, cls=RewardModule, lora=lora), ModelCheckpoint(tmp_path)
    run = {"callbacks": [saver, ExportHF(str(tmp_path / "callback"))], "enable_checkpointing": True}
    small_runs.fit(tmp_path, reward, small_runs.data(tiny_llama), max_steps=2, max_epochs=1, **run)
    place = {"checkpoint": saver.best_model_path, "callback": tmp_path / "callback"}.get(kind)
    if kind == "folder":
        place = export(saver.best_model_path, str(tmp_path / "hf"))
    some = small_runs.rows(4, 3)
    scored = PreferenceDataModule(test=some, tokenizer=tiny_llama)
    (expected,) = small_runs.trainer(tmp_path).predict(reward, scored)
    assert reward.offset != 0
    prompts = [row["prompt"] for row in some for _ in range(2)]
    responses = [row[name] for row in some for name in ("chosen", "rejected")]
    found = RewardModel(str(place), batch_tokens=64).score(prompts, responses)
    torch.testing.assert_close(torch.tensor(found), expected.rewards.flatten(), atol=1e-5, rtol=0)


def test_adapters_alone_bring_the_head(tiny_llama, tmp_path):
    from peft import PeftModel

    reward = as_trained(tiny_llama, tmp_path / "it.ckpt", lora=LoRA(rank=2))
    export(str(tmp_path / "it.ckpt"), str(tmp_path / "hf"), adapter="save")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1)
    batch, sequences = examples_of(tiny_llama)
    found = rewards_of(PeftModel.from_pretrained(base, str(tmp_path / "hf")), sequences, "right")
    torch.testing.assert_close(found, reward(batch)[batch.length > 0].detach(), atol=1e-5, rtol=0)


def test_training_goes_on_from_an_exported_reward_model(tiny_llama, tmp_path):
    reward = as_trained(tiny_llama, tmp_path / "it.ckpt")
    export(str(tmp_path / "it.ckpt"), str(tmp_path / "hf"))
    again = small_runs.module(tmp_path / "hf", cls=RewardModule)
    again.configure_model()
    assert torch.equal(again.policy.head.weight, reward.policy.head.weight)


def test_the_card_says_how_rewards_are_read(tiny_llama, tmp_path):
    as_trained(tiny_llama, tmp_path / "it.ckpt")
    card = (export(str(tmp_path / "it.ckpt"), str(tmp_path / "hf")) / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "AutoModelForSequenceClassification.from_pretrained(folder)" in card
    assert "model.config.reward_offset" in card
    assert "- Offset" in card


def test_families_without_a_class_are_refused_before_training(tmp_path, bare_tokenizer):
    path = language_model(tmp_path / "model", "granite", bare_tokenizer)
    with pytest.raises(UsageError, match="no class for sequence classification with granite"):
        small_runs.module(path, cls=RewardModule).configure_model()


def test_a_model_with_more_labels_is_refused(tiny_llama, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="tells 3 classes apart, and a reward is one number"):
        small_runs.module(tmp_path, cls=RewardModule).configure_model()


def test_that_there_is_no_offset_yet_is_said(tiny_llama, tmp_path, caplog):
    reward = small_runs.module(tiny_llama, cls=RewardModule)
    small_runs.saving(tmp_path, reward, small_runs.data(tiny_llama), max_steps=2, limit_val_batches=0)
    model = loaded(export(str(tmp_path / "step=1.ckpt"), str(tmp_path / "hf")))
    assert "No validation has found an offset yet" in caplog.text
    assert model.config.reward_offset == 0


CLOSING = (
    "{% for message in messages %}{{ message.content }}{% if message.role == 'assistant' %}{{ end or '<pad>' }}"
    "{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("where", ["tokenizer", "training"])
def test_what_closes_an_answer_does_not_pad(tiny_llama, tmp_path, where):
    source, own = tiny_llama, str(tmp_path / "model")
    shutil.copytree(source, own)
    if where == "tokenizer":
        tokenizer = AutoTokenizer.from_pretrained(own)
        tokenizer.chat_template = CLOSING
        tokenizer.save_pretrained(own)
    as_trained(own, tmp_path / "it.ckpt")
    if where == "training":
        content = torch.load(tmp_path / "it.ckpt", weights_only=True)
        torch.save({**content, "data": {"provenance": {"chat_template": CLOSING}}}, tmp_path / "it.ckpt")
    model = loaded(export(str(tmp_path / "it.ckpt"), str(tmp_path / "hf")))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.chat_template == CLOSING
    assert tokenizer.pad_token == "<|pad|>"
    assert model.config.pad_token_id == tokenizer.pad_token_id == model.config.vocab_size - 1


READINGS = {
    "no end token": {"end_token": False},
    "texts": {"chat": Chat(template="package:data/templates/transcript.jinja", texts=True)},
    "variables": {"chat": Chat(template=None, variables={"end": "<unk>"}, texts=True)},
}


@pytest.mark.parametrize("reading", READINGS.values(), ids=READINGS)
def test_a_scorer_reads_texts_as_training_did(tiny_llama, tmp_path, reading):
    if not getattr(reading.get("chat"), "template", "none"):
        (tmp_path / "closing.jinja").write_text(CLOSING)
        reading = {"chat": replace(reading["chat"], template=str(tmp_path / "closing.jinja"))}
    reward, saver = small_runs.module(tiny_llama, cls=RewardModule), ModelCheckpoint(tmp_path)
    run = {"callbacks": [saver, ExportHF(str(tmp_path / "callback"))], "enable_checkpointing": True}
    small_runs.fit(tmp_path, reward, small_runs.data(tiny_llama, **reading), max_steps=2, max_epochs=1, **run)
    some = small_runs.rows(3, 3)
    scored = PreferenceDataModule(test=some, tokenizer=tiny_llama, **reading)
    (expected,) = small_runs.trainer(tmp_path).predict(reward, scored)
    prompts = [row["prompt"] for row in some for _ in range(2)]
    responses = [row[name] for row in some for name in ("chosen", "rejected")]
    export(saver.best_model_path, str(tmp_path / "hf"))
    for place in (saver.best_model_path, tmp_path / "callback", tmp_path / "hf"):
        found = torch.tensor(RewardModel(str(place)).score(prompts, responses))
        torch.testing.assert_close(found, expected.rewards.flatten(), atol=1e-5, rtol=0)
    if "chat" in reading:
        other = torch.tensor(RewardModel(str(tmp_path / "hf"), chat=Chat()).score(prompts, responses))
        assert (other - expected.rewards.flatten()).abs().max() > 1e-3
