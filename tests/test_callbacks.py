import math

import divided
import pytest
import small_runs
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from peft import PeftModel
from small_runs import same
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_lightning import DPOModule, PolicySpec, PreferenceDataModule
from dpo_lightning.callbacks import ExportHF, LogSamples, ProgressBar
from dpo_lightning.callbacks.samples import sequence_kl
from dpo_lightning.data.chat import Chat
from dpo_lightning.errors import UsageError
from dpo_lightning.generation import Continuation, sample
from dpo_lightning.generation.prompts import PromptEncoding
from dpo_lightning.losses import DPOLoss, SimPOLoss
from dpo_lightning.models.adapters import LoRA

PROMPTS = ["the film was", "we loved", "a story"]


def fit(tiny_llama, tmp_path, callbacks, loss=None, steps=3, lora=None):
    rows = [{"prompt": "the film", "chosen": f" was good {i}", "rejected": f" was bad {i}"} for i in range(12)]
    module = DPOModule(PolicySpec(path=tiny_llama, lora=lora), loss or DPOLoss(), lr=1e-3)
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=TensorBoardLogger(tmp_path), callbacks=callbacks,
        enable_checkpointing=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, PreferenceDataModule(rows, rows[:5], tokenizer=tiny_llama, batch_size=4))
    return module, trainer


def test_samples_are_logged_as_text_and_scalars_and_printed(tiny_llama, tmp_path, capsys):
    callback = LogSamples(PROMPTS, score=len, max_new_tokens=5, num_shown=2)
    _, trainer = fit(tiny_llama, tmp_path, [callback])
    events = EventAccumulator(trainer.log_dir)
    events.Reload()
    kl = events.Scalars("samples/kl")
    assert (kl[0].step, kl[0].value) == (0, 0.0)
    assert kl[-1].step == 3
    assert kl[-1].value != 0.0
    assert events.Scalars("samples/score")[0].value == pytest.approx(callback.before[1]["score"])
    text = events.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert PROMPTS[0] in text
    assert PROMPTS[1] in text
    assert PROMPTS[2] not in text
    table = capsys.readouterr().out
    assert all(word in table for word in ("before", "after", "mean score", "share distinct", "KL to reference"))


def test_before_is_what_the_untrained_model_writes(tiny_llama, tmp_path):
    callback = LogSamples(PROMPTS, max_new_tokens=5, seed=3)
    fit(tiny_llama, tmp_path, [callback])
    untrained, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    assert callback.before[0] == sample(untrained, tokenizer, PROMPTS, max_new_tokens=5, seed=3)


def test_figures_by_hand(tiny_llama, tmp_path, monkeypatch):
    texts = ["good", "good", "bad day"]
    monkeypatch.setattr(
        "dpo_lightning.callbacks.samples.sample",
        lambda *_, **__: [Continuation([1], list(range(5, 6 + i)), text) for i, text in enumerate(texts)],
    )
    callback = LogSamples(PROMPTS, score=lambda text: 1.0 if "good" in text else -2.0, temperature=0.5)
    fit(tiny_llama, tmp_path, [callback], steps=1)
    assert callback.after[1] == pytest.approx(
        {"length": 2.0, "distinct": 1 / 3, "score": 0.0, "positive": 2 / 3, "positive_distinct": 0.0}
    )


def test_no_kl_without_a_reference(tiny_llama, tmp_path):
    callback = LogSamples(PROMPTS, max_new_tokens=3)
    fit(tiny_llama, tmp_path, [callback], loss=SimPOLoss(), steps=1)
    assert "kl" not in callback.after[1]


def test_sequence_kl_is_the_mean_log_ratio_of_the_models(tiny_llama, tmp_path):
    module, _ = fit(tiny_llama, tmp_path, [])
    tokenizer = module.spec.load_tokenizer()
    continuations = sample(module.policy.model, tokenizer, PROMPTS, max_new_tokens=6)
    expected = 0.0
    for continuation in continuations:
        ids = torch.tensor([continuation.prompt_ids + continuation.ids])
        totals = []
        for model in (module.policy.model, module.reference_policy.policy.model):
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
            totals.append(logps[len(continuation.prompt_ids) - 1 :].sum().item())
        expected += (totals[0] - totals[1]) / len(continuations)
    assert math.isclose(sequence_kl(module, continuations), expected, abs_tol=1e-4)


def test_prompts_from_a_file(tmp_path):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert LogSamples(str(good)).prompts == ["a", "b"]
    bad.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(
        UsageError, match=r"bad\.jsonl, row 2: column 'prompt' must hold a prompt.*; the row has 'text'"
    ):
        LogSamples(str(bad))


MESSAGES = [{"role": "user", "content": "the film"}]


@pytest.mark.parametrize(
    ("prompt", "chat", "side"),
    [
        (MESSAGES, Chat(), "right"),
        ("the film", Chat(template="package:data/templates/alpaca.jinja", texts=True), "left"),
    ],
    ids=["messages", "texts by a template"],
)
def test_prompts_become_text_as_the_data_module_does_it(tiny_llama, tmp_path, capsys, prompt, chat, side):
    scored = []
    callback = LogSamples([prompt], score=lambda text: scored.append(text) or 1.0, max_new_tokens=4, temperature=0)
    source = small_runs.data(tiny_llama, chat=chat, max_length=200, max_prompt_length=9, truncation_side=side)
    small_runs.fit(tmp_path, small_runs.module(tiny_llama), source, callbacks=[callback], max_steps=1)
    tokenizer, asked = AutoTokenizer.from_pretrained(tiny_llama), [(1, prompt)]
    encoding = PromptEncoding(chat, max_length=9, truncation_side=side)
    (expected,) = encoding.encode(tokenizer, asked)
    assert len(expected.ids) == 9
    (before,) = callback.before[0]
    assert before.prompt_ids == expected.ids
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    ends = encoding.ends(tokenizer, asked)
    assert before == sample(model, tokenizer, [expected.ids], max_new_tokens=4, temperature=0, ends=ends)[0]
    assert scored[0] == ("" if prompt == MESSAGES else prompt) + before.text
    assert "\n  the film ...\n" in capsys.readouterr().out


def test_the_exported_folder_is_the_trained_policy(tiny_llama, tmp_path):
    module, _ = fit(tiny_llama, tmp_path, [ExportHF(str(tmp_path / "hf"))])
    model, tokenizer = (auto.from_pretrained(tmp_path / "hf") for auto in (AutoModelForCausalLM, AutoTokenizer))
    ids = torch.tensor([tokenizer("the film was good")["input_ids"]])
    expected = module.policy.model(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    untrained = AutoModelForCausalLM.from_pretrained(tiny_llama)(input_ids=ids).logits
    assert not torch.allclose(untrained, expected)
    assert model.config._attn_implementation == "sdpa"  # nothing of ours is left in the config


@pytest.mark.parametrize("adapter", ["merge", "save"])
def test_adapters_are_exported_with_the_weights_or_alone(tiny_llama, tmp_path, adapter):
    folder = tmp_path / "hf"
    module, _ = fit(tiny_llama, tmp_path, [ExportHF(str(folder), adapter)], lora=LoRA(rank=2), steps=6)
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("the film was good")["input_ids"]])
    with torch.no_grad():
        expected = module.policy.model.eval()(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
        assert not torch.allclose(plain(input_ids=ids).logits, expected, atol=1e-4)
        if adapter == "merge":
            model = AutoModelForCausalLM.from_pretrained(folder)
            assert [type(part) for part in model.modules()] == [type(part) for part in plain.modules()]
            assert model.config._attn_implementation == "sdpa"
            assert not (folder / "adapter_config.json").exists()
        else:
            model = PeftModel.from_pretrained(plain, str(folder))
            assert not (folder / "model.safetensors").exists()
            ours = PolicySpec(path=tiny_llama, lora=LoRA(path=str(folder))).build().eval().model
            assert torch.equal(ours(input_ids=ids).logits, expected)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=2e-5, rtol=0)


def test_the_export_lies_with_the_logs_unless_told_otherwise(tiny_llama, tmp_path):
    callback = ExportHF()
    _, trainer = fit(tiny_llama, tmp_path, [callback], steps=1)
    assert str(callback.written) == f"{trainer.log_dir}/hf"
    assert (callback.written / "model.safetensors").is_file()


def test_the_progress_bar_shows_loss_accuracy_and_margin(tiny_llama, tmp_path):
    bar = ProgressBar()
    module, trainer = fit(tiny_llama, tmp_path, [bar])
    shown = bar.get_metrics(trainer, module)
    assert {"loss", "accuracy", "margin", "val loss", "val accuracy", "val margin"} <= set(shown)
    assert "v_num" not in shown


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_sample_and_export_what_one_process_does(strategy, tiny_llama, two_ranks, tmp_path):
    one = divided.sample_and_export(tiny_llama, tmp_path / "one")
    ranks = two_ranks.run(divided.sample_and_export, tiny_llama, tmp_path / "two", strategy=strategy, devices=2)
    assert one["after"][0] != one["before"][0]
    for found in ranks:
        assert found["weights"].keys() == one["weights"].keys()
        for stage in ("before", "after"):
            assert found[stage][0] == one[stage][0]
            assert found[stage][1] == pytest.approx(one[stage][1], abs=1e-4)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "hf").state_dict()
    assert same(written, ranks[0]["weights"])
