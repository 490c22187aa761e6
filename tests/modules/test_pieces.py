"""A batch in pieces gives the losses, gradients and metrics of the batch, in the memory of a piece."""

import math

import pytest
import small_runs
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from small_runs import trained, trainer

from dpo_lightning import DPOModule, SFTModule
from dpo_lightning.batch import MicroBatches
from dpo_lightning.errors import UsageError
from dpo_lightning.losses import AOTLoss, BCOPairLoss, DPOLoss, PlackettLuceLoss
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.models.policy import CausalPolicy
from dpo_lightning.references import AdaptersOff, Cached

BUDGET = 100  # batches of eight have more than 300 tokens, an example at most 43


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


class Watch(Callback):
    """Number of pieces, loss and gradients of every training batch."""

    def __init__(self):
        self.pieces, self.losses, self.gradients = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.pieces.append(len(batch.pieces))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
        self.gradients.append(torch.cat(gradients).clone())


def run(folder, path, budget, *, cls=DPOModule, reference=None, lora=None, num_responses=None, **kwargs):
    """A fit of four steps and what was seen of it."""
    torch.manual_seed(0)
    watch = Watch()
    module = small_runs.module(path, reference, lora, cls, lr=None, optimizer=sgd)
    source = small_runs.data(path, train=26, batch_size=8, micro_batch_tokens=budget, num_responses=num_responses)
    fit = trainer(folder, max_steps=4, callbacks=[watch], **kwargs)
    fit.fit(module, source)
    return module, watch, {name: value.item() for name, value in fit.callback_metrics.items()}


CASES = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 2},
    "clipped": {"gradient_clip_val": 0.5},
    "clipped by value, accumulated": {
        "gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 2
    },
    "supervised": {"cls": SFTModule, "num_responses": 1},
    "supervised, accumulated": {"cls": SFTModule, "num_responses": 1, "accumulate_grad_batches": 2},
    "adapters": {"lora": LoRA(rank=2), "reference": AdaptersOff()},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_pieces_give_the_gradients_losses_and_metrics_of_the_whole(tiny_llama, tmp_path, case):
    (whole, expected, expected_metrics), (split, found, metrics) = (
        run(tmp_path, tiny_llama, budget, **CASES[case]) for budget in (None, 40 if "supervised" in case else BUDGET)
    )
    assert set(expected.pieces) == {1}
    assert max(found.pieces) >= 3
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert len(found.gradients) == 4
    for gradient, other in zip(found.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(trained(split), trained(whole), rtol=0, atol=2e-6)
    assert max(gradient.norm() for gradient in expected.gradients) > 1e-3
    exact = [name for name in metrics if "per_second" not in name]
    assert {name: metrics[name] for name in exact} == pytest.approx(
        {name: expected_metrics[name] for name in exact}, rel=1e-4, abs=1e-5
    )


def test_cached_scores_are_found_piece_by_piece(tiny_llama, tmp_path):
    results = [
        run(tmp_path, tiny_llama, budget, reference=Cached(dir=f"{tmp_path}/{budget}")) for budget in (None, BUDGET)
    ]
    (whole, expected, _), (split, found, _) = results
    assert max(found.pieces) >= 3
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    torch.testing.assert_close(trained(split), trained(whole), rtol=0, atol=2e-6)


def test_bf16_mixed_pieces_differ_by_their_rounding_alone(tiny_llama, tmp_path):
    whole, split = (run(tmp_path, tiny_llama, budget, precision="bf16-mixed") for budget in (None, BUDGET))
    exact = run(tmp_path, tiny_llama, None)[1].gradients[0]
    errors = [(watch.gradients[0] - exact).norm().item() for _, watch, _ in (whole, split)]
    assert 0 < errors[1] < 1.5 * errors[0] < 0.1 * exact.norm()
    assert split[1].losses == pytest.approx(whole[1].losses, rel=1e-2)


def test_backward_of_a_piece_is_not_under_autocast(tiny_llama, tmp_path, monkeypatch):
    seen = []
    original = DPOModule.backward

    def spy(self, loss, *args, **kwargs):
        seen.append(torch.is_autocast_enabled("cpu"))
        original(self, loss, *args, **kwargs)

    monkeypatch.setattr(DPOModule, "backward", spy)
    _, watch, _ = run(tmp_path, tiny_llama, BUDGET, precision="bf16-mixed")
    assert len(seen) == sum(watch.pieces) > len(watch.pieces)
    assert not any(seen)


def test_fp16_scales_the_loss_of_every_piece(tiny_llama, tmp_path):
    def gradients(budget):
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
        return run(tmp_path, tiny_llama, budget, plugins=plugin, gradient_clip_val=1.0)[1].gradients

    for found, expected in zip(gradients(BUDGET), gradients(None), strict=True):
        assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.fixture
def forwards(monkeypatch):
    """Tokens of every forward, and whether it is followed by a backward."""
    seen = []
    original = CausalPolicy.forward

    def spy(self, batch, *args, **kwargs):
        seen.append((len(batch.input_ids), torch.is_grad_enabled(), len(batch.row)))
        return original(self, batch, *args, **kwargs)

    monkeypatch.setattr(CausalPolicy, "forward", spy)
    return seen


@pytest.mark.parametrize("cached", [True, False])
def test_no_forward_has_more_tokens_than_are_allowed(tiny_llama, tmp_path, forwards, cached):
    reference = Cached(dir=str(tmp_path / "cache")) if cached else None
    torch.manual_seed(0)
    source = small_runs.data(tiny_llama, train=26, val=40, batch_size=8, val_batch_size=40, micro_batch_tokens=100)
    small_runs.fit(tmp_path, small_runs.module(tiny_llama, reference), source, max_epochs=2, max_steps=-1)
    with_gradients = [num for num, gradients, _ in forwards if gradients]
    without = [num for num, gradients, _ in forwards if not gradients]
    assert max(with_gradients) <= 100
    assert 300 < max(without) <= 400  # evaluation, and what scores beforehand, hold nothing for backward
    small_runs.fit(tmp_path, small_runs.module(tiny_llama), small_runs.data(tiny_llama, batch_size=8))
    assert max(num for num, gradients, _ in forwards if gradients) > 200  # all that bounds them is the option


def test_an_example_over_the_budget_is_run_alone_and_said_once(tiny_llama, tmp_path, forwards, monkeypatch):
    said = []
    monkeypatch.setattr("dpo_lightning.data.datamodule.rank_zero_info", said.append)
    source = small_runs.data(tiny_llama, micro_batch_tokens=40)
    small_runs.fit(tmp_path, small_runs.module(tiny_llama), source, max_epochs=2, max_steps=-1)
    trained_on = [(num, examples) for num, gradients, examples in forwards if gradients]
    assert max(num for num, _ in trained_on) > 40
    assert {examples for num, examples in trained_on if num > 40} == {1}
    (message,) = [text for text in said if "run alone" in text]
    num_tokens = source.examples["train"].num_tokens()
    assert message == (
        f"train: {(num_tokens > 40).sum()} of 16 examples have more tokens than the 40 that are to be run at once, up "
        f"to {num_tokens.max()}; each of them is run alone."
    )


def test_the_returned_loss_is_that_of_the_whole_batch(tiny_llama, tmp_path):
    torch.manual_seed(0)
    module = small_runs.module(tiny_llama)
    source = small_runs.data(tiny_llama, batch_size=8, micro_batch_tokens=BUDGET)
    small_runs.fit(tmp_path, module, source, max_steps=2)
    split = next(batch for batch in source.train_dataloader() if isinstance(batch, MicroBatches))
    source.micro_batch_tokens = None
    whole = list(source.train_dataloader())
    rows = sorted(row for piece in split.pieces for row in piece.row.tolist())
    (together,) = [batch for batch in whole if sorted(batch.row.tolist()) == rows]
    losses = [module.training_step(batch, 0) for batch in (split, together)]
    assert losses[0].requires_grad
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    assert losses[0].item() != pytest.approx(math.log(2), abs=1e-3)


def test_the_first_batch_is_checked_piece_by_piece(tiny_llama, tmp_path, forwards):
    class Change(Callback):
        def on_fit_start(self, trainer, pl_module):
            with torch.no_grad():
                pl_module.policy.model.lm_head.weight.mul_(1.1)

    fit = trainer(tmp_path, callbacks=[Change()])
    with pytest.raises(UsageError, match="on the first batch their log-probabilities differ by up to"):
        fit.fit(small_runs.module(tiny_llama), small_runs.data(tiny_llama, batch_size=8, micro_batch_tokens=BUDGET))
    assert len(forwards) >= 4
    assert max(num for num, *_ in forwards) <= BUDGET


def test_predictions_are_in_the_order_of_the_rows(tiny_llama, tmp_path):
    predicted = {}
    for budget in (None, 20):
        source = small_runs.PreferenceDataModule(
            test=small_runs.rows(9), tokenizer=tiny_llama, val_batch_size=6, micro_batch_tokens=budget
        )
        predicted[budget] = trainer(tmp_path).predict(small_runs.module(tiny_llama), source)
    assert [batch.row.tolist() for batch in predicted[20]] == [[1, 2, 3, 4, 5, 6], [7, 8, 9]]
    for whole, split in zip(predicted[None], predicted[20], strict=True):
        torch.testing.assert_close(split.rewards, whole.rewards, rtol=0, atol=1e-5)
        assert torch.equal(split.length, whole.length)
    supervised = {}
    for budget in (None, 20):
        source = small_runs.PreferenceDataModule(
            test=small_runs.rows(9), tokenizer=tiny_llama, val_batch_size=9, micro_batch_tokens=budget, num_responses=1
        )
        (supervised[budget],) = trainer(tmp_path).predict(small_runs.module(tiny_llama, cls=SFTModule), source)
    torch.testing.assert_close(supervised[20], supervised[None])


def test_rankings_of_unequal_numbers_of_responses_are_split(tiny_llama, tmp_path):
    results = []
    for budget in (None, 120):
        torch.manual_seed(0)
        module = small_runs.module(tiny_llama, loss=PlackettLuceLoss(), lr=None, optimizer=sgd)
        source = small_runs.data(tiny_llama, most=4, micro_batch_tokens=budget)
        small_runs.fit(tmp_path, module, source)
        results.append(trained(module))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=2e-6)


class Foreign:
    """Batches of somebody else's loader."""

    def __init__(self, batches):
        self.batches = list(batches)

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [(AOTLoss(), "compares the examples of a batch with each other"), (BCOPairLoss(), "keeps sums to which a batch")],
)
def test_losses_that_need_a_batch_as_a_whole_refuse_pieces(tiny_llama, tmp_path, monkeypatch, loss, reason):
    source = small_runs.data(tiny_llama, batch_size=8, micro_batch_tokens=BUDGET)
    message = rf"{type(loss).__name__} {reason}.*leave out `data.init_args.micro_batch_tokens`"
    with monkeypatch.context() as patch:
        patch.setattr(DPOModule, "configure_model", lambda self: pytest.fail("weights were loaded"))
        with pytest.raises(UsageError, match=message):
            trainer(tmp_path).fit(small_runs.module(tiny_llama, loss=loss), source)
    source.setup("fit")
    with pytest.raises(UsageError, match=message):  # batches in pieces from anywhere else
        trainer(tmp_path).fit(small_runs.module(tiny_llama, loss=loss), Foreign(source.train_dataloader()))
    assert trainer(tmp_path).predict(small_runs.module(tiny_llama, loss=loss), Foreign(source.val_dataloader()))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shuffled_run_in_pieces_resumes_exactly(tiny_llama, tmp_path, num_workers):
    def fitted(folder, seed, ckpt_path=None, **kwargs):
        module = small_runs.module(tiny_llama)
        settings = {"batch_size": 8, "micro_batch_tokens": BUDGET, "num_workers": num_workers, **kwargs}
        losses = small_runs.saving(
            folder, module, small_runs.data(tiny_llama, **settings), seed=seed, ckpt_path=ckpt_path
        )
        return losses.values, trained(module)

    losses, expected = fitted(tmp_path / "whole", 0)
    rest, found = fitted(tmp_path / "resumed", 1, tmp_path / "whole" / "step=3.ckpt")
    assert rest == losses[3:]
    assert small_runs.same(found, expected)
    # Another budget: the same batches, in other pieces.
    rest, _ = fitted(tmp_path / "other", 1, tmp_path / "whole" / "step=3.ckpt", micro_batch_tokens=None)
    assert rest == pytest.approx(losses[3:], rel=1e-3)


def test_the_heaviest_piece_is_what_training_meets(tiny_llama, tmp_path, forwards):
    for budget in (None, 110):
        torch.manual_seed(3)
        source = small_runs.data(tiny_llama, train=18, micro_batch_tokens=budget)
        source.setup("fit")
        state = torch.get_rng_state()
        heaviest = source.heaviest()
        assert torch.equal(torch.get_rng_state(), state)
        assert source.seed is None
        del forwards[:]
        small_runs.fit(tmp_path, small_runs.module(tiny_llama), source, seed=3, max_epochs=1, max_steps=-1)
        assert len(heaviest.input_ids) == max(num for num, gradients, _ in forwards if gradients)


def test_the_heaviest_of_a_stream_is_made_of_its_longest_examples(tiny_llama):
    source = small_runs.data(tiny_llama, train=20, stream_buffer=5)
    source.setup("fit")
    whole = small_runs.data(tiny_llama, train=16)
    whole.setup("fit")
    num_tokens = sorted(whole.examples["train"].num_tokens())
    assert len(source.heaviest().input_ids) == sum(num_tokens[-4:])
    source.micro_batch_tokens = 110
    assert len(source.heaviest().input_ids) == max(num_tokens[-4:][0] + num_tokens[-1], num_tokens[-2] + num_tokens[-3])


def test_what_has_no_scores_comes_longest_first(tiny_llama):
    source = small_runs.data(tiny_llama, train=40, val=5, micro_batch_tokens=60)
    source.setup("fit")
    batches = list(source.unscored(source.digests()[:7], 0, 1))
    assert sum(len(batch.row) for batch in batches) == 38
    lengths = [len(batch.input_ids) / len(batch.row) for batch in batches]
    assert lengths == sorted(lengths, reverse=True)
    assert all(len(batch.input_ids) <= 240 for batch in batches)
    assert all(len(batch.row) > 4 for batch in batches[:-1])  # more than `val_batch_size`


@pytest.mark.parametrize("accumulated", [1, 2])
def test_gradients_of_a_step_are_gone_before_the_next_forward(tiny_llama, tmp_path, accumulated):
    held = []

    class Watched(DPOModule):
        def summed_loss(self, stage, piece):
            if stage == "fit":
                held.append(any(parameter.grad is not None for parameter in self.parameters()))
            return super().summed_loss(stage, piece)

    module = small_runs.module(tiny_llama, cls=Watched, loss=DPOLoss())
    source = small_runs.data(tiny_llama, micro_batch_tokens=60)  # an example a piece
    small_runs.fit(tmp_path, module, source, max_steps=2, accumulate_grad_batches=accumulated)
    assert held == 2 * [False, *[True] * (4 * accumulated - 1)]
