"""A loss or a gradient that is not finite reaches no weight and no checkpoint, and the run says what explains it."""

import math
import re
from pathlib import Path

import pytest
import small_runs
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision

from dpo_lightning import DPOModule, SFTModule
from dpo_lightning.batch import PreferenceBatch
from dpo_lightning.errors import UsageError
from dpo_lightning.losses import SimPOLoss
from dpo_lightning.modules import guard, nonfinite
from dpo_lightning.modules.gradients import total_norm
from dpo_lightning.modules.nonfinite import NonFinite, reproduce

BAD_ROW = 3
FAULTS = {
    "nan": lambda loss: loss * torch.nan,
    "infinite": lambda loss: loss * torch.inf,
    "infinite, its gradient finite": lambda loss: loss + torch.inf,
    "finite, its gradient nan": lambda loss: loss + (0 * loss).sqrt(),
}


class Faulty:
    """A loss with a fault where a row is in the batch."""

    fault = "nan"

    def summed_loss(self, stage, piece):
        loss = super().summed_loss(stage, piece)
        return FAULTS[self.fault](loss) if BAD_ROW in piece.row.tolist() and stage == "fit" else loss


class FaultyDPO(Faulty, DPOModule):
    pass


class FaultySFT(Faulty, SFTModule):
    pass


class Snapshots(Callback):
    """Weights, the optimizer's state and checkpoints as they are before every step."""

    def __init__(self, folder):
        self.folder, self.taken, self.rows = folder, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.append([row for piece in batch.pieces for row in piece.row.tolist()])
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.taken.append((small_runs.trained(pl_module), moments(trainer), checkpoints(self.folder)))


def moments(trainer):
    return [value.clone() for state in trainer.optimizers[0].state.values() for value in state.values()]


def checkpoints(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(folder).rglob("*.ckpt")}


OPTIMIZERS = {
    "fused": None,
    "foreach": lambda weights: torch.optim.AdamW(weights, lr=1e-2, foreach=True),
    "sgd": lambda weights: torch.optim.SGD(weights, lr=1e-1, momentum=0.9),
    "fused sgd": lambda weights: torch.optim.SGD(weights, lr=1e-1, momentum=0.9, fused=True),
    "rmsprop": lambda weights: torch.optim.RMSprop(weights, lr=1e-3),
}


def stopped(tiny_llama, folder, cls=FaultyDPO, fault="nan", optimizer="fused", callbacks=(), module=None, **kwargs):
    """A fit that stops by itself: error, module, trainer and snapshots."""
    chosen = OPTIMIZERS[optimizer]
    settings = {} if chosen is None else {"lr": None, "optimizer": chosen}
    module = (module or maker(tiny_llama, cls))(settings)
    module.fault = fault
    data = {name: kwargs.pop(name) for name in ("micro_batch_tokens", "batch_size", "train") if name in kwargs}
    num_responses = 1 if isinstance(module, SFTModule) else None
    snapshots = Snapshots(folder)
    torch.manual_seed(0)
    fit = small_runs.trainer(folder, **{"max_epochs": 1, "gradient_clip_val": 1.0, **kwargs},
                             callbacks=[snapshots, *callbacks])  # fmt: skip
    with pytest.raises(NonFinite) as caught:
        fit.fit(module, small_runs.data(tiny_llama, num_responses=num_responses, **data))
    return caught.value, module, fit, snapshots


def maker(path, cls):
    """What makes a module with the optimizer that it is given."""
    loss = {"loss": small_runs.DPOLoss(beta=0.5)} if cls is FaultyDPO else {}
    return lambda optimizer: cls(small_runs.PolicySpec(path=path), **{"lr": 1e-2, **optimizer, **loss})


@pytest.fixture
def late(monkeypatch):
    """As on a GPU: optimizers that can are told, and the host reads behind them."""
    monkeypatch.setattr(guard, "reads_late", lambda norm, optimizer: guard.takes_flag(optimizer))


def assert_as_before(module, fit, snapshots, step):
    weights, state, saved = snapshots.taken[step - 1]
    assert small_runs.same(small_runs.trained(module), weights)
    # An optimizer that is told makes what state it lacks, and leaves it empty.
    assert all(torch.equal(one, other) for one, other in zip(moments(fit), state, strict=False))
    assert checkpoints(snapshots.folder) == saved


@pytest.mark.parametrize(
    ("optimizer", "fault"),
    [*((name, "nan") for name in OPTIMIZERS), *(("fused", fault) for fault in FAULTS if fault != "nan")],
)
def test_no_weight_takes_it_up(tiny_llama, tmp_path, optimizer, fault):
    error, module, fit, snapshots = stopped(tiny_llama, tmp_path, fault=fault, optimizer=optimizer)
    assert error.step == 1 + [BAD_ROW in rows for rows in snapshots.rows].index(True) > 1
    assert len(snapshots.taken) == error.step
    assert_as_before(module, fit, snapshots, error.step)


@pytest.mark.parametrize(("optimizer", "fault"), [("fused sgd", "nan"), *(("fused", fault) for fault in FAULTS)])
@pytest.mark.usefixtures("late")
def test_nor_where_the_host_reads_one_step_later(tiny_llama, tmp_path, optimizer, fault):
    error, module, fit, snapshots = stopped(tiny_llama, tmp_path, fault=fault, optimizer=optimizer)
    assert BAD_ROW in snapshots.rows[error.step - 1]
    assert error.rows == snapshots.rows[error.step - 1]
    assert len(snapshots.taken) == error.step + 1  # the next step was on its way
    assert_as_before(module, fit, snapshots, error.step)


@pytest.mark.parametrize("reading", ["at once", "late"])
def test_all_batches_of_the_step_are_named(tiny_llama, tmp_path, reading, request):
    if reading == "late":
        request.getfixturevalue("late")
    error, module, fit, snapshots = stopped(
        tiny_llama, tmp_path, accumulate_grad_batches=2, batch_size=2, micro_batch_tokens=60
    )
    first, second = snapshots.rows[2 * error.step - 2 : 2 * error.step]
    assert error.rows == first + second
    assert BAD_ROW in error.rows
    assert_as_before(module, fit, snapshots, error.step)
    assert f"Rows of the data: {', '.join(map(str, first + second))}." in str(error)
    saved = torch.load(error.path, weights_only=True)
    assert [len(batch["pieces"]) > 1 for batch in saved["batches"]] == [True, True]


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("reading", ["at once", "late"])
def test_checkpoints_are_of_good_steps(tiny_llama, tmp_path, reading, every, request):
    if reading == "late":
        request.getfixturevalue("late")
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=every, save_last=True, save_on_exception=True)
    error, module, fit, snapshots = stopped(tiny_llama, tmp_path, enable_checkpointing=True, callbacks=[saving])
    assert_as_before(module, fit, snapshots, error.step)
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["global_step"] == (error.step - 1) // every * every > 0
    with pytest.raises(NonFinite):  # nor does anything save it later
        fit.save_checkpoint(tmp_path / "later.ckpt")
    assert not (tmp_path / "later.ckpt").exists()


@pytest.mark.usefixtures("late")
def test_the_last_step_of_a_run_is_read_too(tiny_llama, tmp_path):
    error, _, fit, snapshots = stopped(tiny_llama, tmp_path, batch_size=16)
    assert error.step == fit.global_step == len(snapshots.taken) == 1


@pytest.mark.usefixtures("late")
def test_validation_is_not_begun_behind_a_bad_step(tiny_llama, tmp_path):
    error, _, fit, snapshots = stopped(tiny_llama, tmp_path, val_check_interval=1)
    assert error.step == fit.global_step == len(snapshots.taken)


def test_the_message_says_all_that_explains_it(tiny_llama, tmp_path):
    error, module, _, snapshots = stopped(tiny_llama, tmp_path)
    message = str(error)
    assert isinstance(error, UsageError)
    assert message.startswith(
        f"Optimizer step {error.step} was not taken: the norm of its gradient is nan, the loss nan"
    )
    assert f"Rows of the data: {', '.join(map(str, snapshots.rows[-1]))}." in message
    assert str(error.path) in message
    assert error.path == tmp_path / f"nonfinite-step={error.step}-rank=0.pt"
    shown = re.findall(r"row (\d+), response (\d): (\S+?)(?:;|\.$)", message, flags=re.MULTILINE)
    values = [abs(float(value)) for _, _, value in shown]
    assert len(values) == 5
    assert values == sorted(values, reverse=True)
    assert {int(row) for row, _, _ in shown} <= set(snapshots.rows[-1])
    # The largest of all, found again with the weights that met the batch.
    saved = torch.load(error.path, weights_only=True)
    (piece,) = saved["batches"][0]["pieces"]
    batch = PreferenceBatch(**piece)
    with torch.no_grad():
        ratios = (module(batch).total - module.reference_logps(batch).total).abs()
    assert values[0] == pytest.approx(ratios.max().item(), rel=1e-4)


def test_a_ratio_that_is_not_finite_comes_first():
    scores = nonfinite.Scores(torch.tensor([3, 9]), torch.tensor([[1.0, -80.0], [torch.nan, 2.0]]), None)
    line = nonfinite._ratios_line([nonfinite.Trace(None, scores=[scores])], "log pi")
    assert line == (
        "Largest log pi, in nats: row 9, response 1: nan; row 3, response 2: -80; row 9, response 2: 2; "
        "row 3, response 1: 1."
    )


@pytest.mark.parametrize("cls", [FaultyDPO, FaultySFT])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_what_was_saved_runs_again(tiny_llama, tmp_path, cls, precision):
    fault = "finite, its gradient nan"
    error, module, _, _ = stopped(
        tiny_llama, tmp_path, cls=cls, fault=fault, accumulate_grad_batches=2, batch_size=2, precision=precision
    )
    saved = torch.load(error.path, weights_only=True)
    weights = small_runs.trained(module)
    again = reproduce(module, error.path)
    assert small_runs.same(small_runs.trained(module), weights)
    assert math.isnan(again.gradient_norm)
    assert "policy.model.lm_head.weight" in again.nonfinite
    assert again.losses == pytest.approx([batch["loss"] for batch in saved["batches"]], rel=1e-5)
    module.fault = "nan"
    assert sum(map(math.isnan, reproduce(module, error.path).losses)) == 1


def test_a_checkpoint_and_what_was_saved_are_enough(tiny_llama, tmp_path):
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    error, module, _, _ = stopped(tiny_llama, tmp_path, enable_checkpointing=True, callbacks=[saving], fault="infinite")
    loaded = FaultyDPO.load_from_checkpoint(saving.best_model_path, weights_only=True)
    loaded.fault = module.fault
    assert reproduce(loaded, error.path).losses == [math.inf]
    type(loaded).fault = "nan"


def test_without_a_reference_log_probabilities_are_named(tiny_llama, tmp_path):
    def module(settings):
        return FaultyDPO(policy=small_runs.PolicySpec(path=tiny_llama), loss=SimPOLoss(), **settings)

    error, *_ = stopped(tiny_llama, tmp_path, module=module)
    assert "Largest log pi, in nats: row" in str(error)


def test_where_nothing_can_be_written_the_run_stops_all_the_same(tiny_llama, tmp_path, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(nonfinite.torch, "save", full)
    error, *_ = stopped(tiny_llama, tmp_path)
    assert error.path is None
    assert "could not be saved" in str(error)
    assert "No space left on device" in str(error)


def test_the_scaler_of_fp16_skips_steps_by_itself(tiny_llama, tmp_path):
    torch.manual_seed(0)
    module = small_runs.module(tiny_llama, cls=DPOModule)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**40))
    before = None

    class First(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            nonlocal before
            before = before or (small_runs.trained(pl_module), plugin.scaler.get_scale())

    initial = small_runs.fit(tmp_path, module, small_runs.data(tiny_llama), plugins=plugin, callbacks=[First()])
    assert before[1] < 2.0**40  # the first step was skipped
    assert len(initial.values) == 6


@pytest.mark.parametrize("reading", ["at once", "late"])
def test_clipping_and_log_share_one_norm(tiny_llama, tmp_path, monkeypatch, reading, request):
    if reading == "late":
        request.getfixturevalue("late")
    counted, reads = [], []
    monkeypatch.setattr(
        "dpo_lightning.modules.optimised.total_norm", lambda found: counted.append(1) or total_norm(found)
    )
    read = guard.Number.read
    monkeypatch.setattr(guard.Number, "read", lambda self: reads.append(1) or read(self))
    small_runs.fit(tmp_path, small_runs.module(tiny_llama), small_runs.data(tiny_llama), gradient_clip_val=0.1)
    assert len(counted) == len(reads) == 6
