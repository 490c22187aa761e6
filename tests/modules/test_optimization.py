import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from dpo_lightning import PolicySpec, PreferenceDataModule, SFTModule
from dpo_lightning.errors import UsageError


def rows(count):
    return [{"text": f"the film number {number} was good"} for number in range(count)]


class Rates(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.values.append(trainer.optimizers[0].param_groups[0]["lr"])


def fit(tiny_llama, tmp_path, steps=8, epochs=None, **kwargs):
    rates = Rates()
    module = SFTModule(PolicySpec(path=tiny_llama), **kwargs)
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, callbacks=[rates],
        log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, PreferenceDataModule(rows(32), tokenizer=tiny_llama, batch_size=4))
    return trainer, module, rates.values


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1, *[(1 + math.cos(math.pi * done / 4)) / 2 for done in range(4)]]),
    ],
)
def test_warm_up_then_schedule_in_steps(tiny_llama, tmp_path, schedule, expected):
    _, _, rates = fit(tiny_llama, tmp_path, lr=1e-3, warmup_steps=4, schedule=schedule)
    assert rates == pytest.approx([1e-3 * factor for factor in expected])


def test_the_default_is_adamw_without_weight_decay_at_the_papers_rate(tiny_llama, tmp_path):
    trainer, _, rates = fit(tiny_llama, tmp_path, steps=1)
    assert type(trainer.optimizers[0]) is torch.optim.AdamW
    assert trainer.optimizers[0].defaults["weight_decay"] == 0
    assert rates == [1e-6]


def test_an_own_optimizer_and_schedule(tiny_llama, tmp_path):
    trainer, _, rates = fit(
        tiny_llama, tmp_path, steps=4,
        optimizer=lambda parameters: torch.optim.RMSprop(parameters, lr=1e-4),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1),
    )  # fmt: skip
    assert isinstance(trainer.optimizers[0], torch.optim.RMSprop)
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": 1e-3, "optimizer": torch.optim.SGD}, "optimizer.init_args.lr"),
        ({"warmup_steps": 3, "lr_scheduler": torch.optim.lr_scheduler.StepLR}, "keep one of the two"),
        ({"lr": 0.0}, "`lr` must be positive, got 0.0"),
        ({"warmup_steps": -1}, "`warmup_steps` must be 0 or more, got -1"),
    ],
)
def test_contradictions_are_refused_before_a_weight_is_loaded(kwargs, message):
    with pytest.raises(UsageError, match=message):
        SFTModule(PolicySpec(path="nowhere"), **kwargs)


def test_sft_loss_and_perplexity_are_those_of_the_model_itself(tiny_llama, tmp_path):
    trainer, module, _ = fit(tiny_llama, tmp_path, steps=3)
    data = PreferenceDataModule(val=rows(5), tokenizer=tiny_llama, val_batch_size=2)
    (metrics,) = trainer.validate(module, data, verbose=False)
    nll = tokens = 0
    for row in rows(5):
        ids = torch.tensor([[*data.tokenizer(row["text"])["input_ids"], data.tokenizer.eos_token_id]])
        scored = ids.shape[1] - 1
        nll += module.policy.model(input_ids=ids, labels=ids).loss.item() * scored
        tokens += scored
    assert metrics["val/loss"] == pytest.approx(nll / tokens, rel=1e-5)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)


def test_sft_refuses_rejected_answers(tiny_llama):
    pairs = [{"prompt": "it was", "chosen": " good", "rejected": " bad"}] * 4
    data = PreferenceDataModule(val=pairs, tokenizer=tiny_llama)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    with pytest.raises(UsageError, match=r"up to 2; keep the best by `data.init_args.num_responses: 1`"):
        trainer.validate(SFTModule(PolicySpec(path=tiny_llama)), data)


def test_a_schedule_that_falls_needs_an_end(tiny_llama, tmp_path):
    with pytest.raises(UsageError, match=r"set `trainer\.max_steps` or `max_epochs`"):
        fit(tiny_llama, tmp_path, steps=-1, epochs=-1, schedule="linear", lr=1e-3)
