"""Being stopped costs nothing: a run that goes on from a checkpoint equals one that never stopped, bit for bit."""

import pytest
import small_runs
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger

from dpo_lightning import PreferenceDataModule
from dpo_lightning.checkpoints import CheckpointFiles
from dpo_lightning.data.mixture import Mixture, Part
from dpo_lightning.data.sources import Rows
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.modules.resumption import noise_seed
from dpo_lightning.references import AdaptersOff, Cached, Synced


class Lines(DummyLogger):
    """All that is logged, but how fast it was."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def log_metrics(self, metrics, step):
        exact = {name: value for name, value in metrics.items() if not name.endswith("_per_second")}
        if set(exact) > {"epoch"}:
            self.lines.append((step, exact))


class SaveAt(Callback):
    """Saves behind optimizer steps, as N.ckpt, and wherever else in a run a checkpoint may be asked for."""

    def __init__(self, folder):
        self.folder = folder

    def save(self, trainer, where):
        trainer.save_checkpoint(self.folder / f"{where}-{trainer.fit_loop.epoch_loop.total_batch_idx}.ckpt")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.save(trainer, "before")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.save(trainer, "within")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.save(trainer, "behind")

    def on_validation_end(self, trainer, pl_module):
        self.save(trainer, "validated")


def mixture():
    parts = [
        Part(source=Rows(small_runs.rows(12)), weight=2.0),
        Part(source=Rows(small_runs.rows(9, seed=2)), weight=1.0),
    ]
    return Mixture(parts=parts)


def run(folder, path, ckpt_path=None, callbacks=(), train=None, num_workers=0, seed=0, **kwargs):
    """Three epochs of 18 examples in batches of 4, 4, 4, 4 and 2, logged at every second step; module and log."""
    settings = {"lora": None, "reference": None, "schedule": "linear", "dropout": False}
    dpo = small_runs.module(path, **{name: kwargs.pop(name, value) for name, value in settings.items()})
    source = PreferenceDataModule(
        train or small_runs.rows(18), small_runs.rows(5, 1), tokenizer=str(path), batch_size=4, num_workers=num_workers
    )
    lines = Lines()
    defaults = {"max_epochs": 3, "max_steps": -1, "log_every_n_steps": 2, "gradient_clip_val": 1.0}
    small_runs.fit(
        folder, dpo, source, ckpt_path, seed, callbacks,
        **{**defaults, "logger": lines, "plugins": [CheckpointFiles()], **kwargs},
    )  # fmt: skip
    return dpo, lines.lines


RUNS = {
    "workers, followed by the reference": {"num_workers": 2, "reference": Synced(alpha=0.5, interval=2)},
    "accumulated, with dropout": {"dropout": True, "accumulate_grad_batches": 2, "reference": Cached()},
    "mixture, validated within epochs": {"train": mixture(), "dropout": True, "val_check_interval": 2},
    "adapters with dropout": {"lora": LoRA(rank=2, dropout=0.3), "reference": AdaptersOff()},
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(noisy_llama, tmp_path, settings, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for scores of the reference
    saver = small_runs.every_step(tmp_path)
    whole, expected = run(tmp_path, noisy_llama, callbacks=[saver], enable_checkpointing=True, **settings)
    # Within an epoch, and between two log lines, of which the second counts batches from before.
    resumed, lines = run(tmp_path, noisy_llama, tmp_path / "step=7.ckpt", seed=1, **settings)
    assert small_runs.same(small_runs.trained(resumed), small_runs.trained(whole))
    assert lines == [line for line in expected if line[0] >= 7]
    assert len(lines) >= 2


ACCUMULATED = {"accumulate_grad_batches": 2, "dropout": True, "max_epochs": 2, "val_check_interval": 2}


@pytest.fixture(scope="module")
def saved_anywhere(noisy_llama, tmp_path_factory):
    """Folder of checkpoints from all over a run, its trained weights and its log."""
    folder = tmp_path_factory.mktemp("anywhere")
    whole, lines = run(folder, noisy_llama, callbacks=[SaveAt(folder)], enable_checkpointing=True, **ACCUMULATED)
    return folder, small_runs.trained(whole), lines


# An epoch has windows of 2, 2 and 1 batches. Batch 0 begins the run, 5 the second epoch; 7 is the first of a window.
@pytest.mark.parametrize(
    "where", ["before-0", "behind-0", "behind-6", "validated-6", "behind-7", "before-8", "within-8"]
)
def test_a_checkpoint_made_anywhere_takes_the_batches_of_its_window_again(noisy_llama, tmp_path, saved_anywhere, where):
    folder, whole, expected = saved_anywhere
    path = folder / f"{where}.ckpt"
    resumed, lines = run(tmp_path, noisy_llama, path, seed=1, **ACCUMULATED)
    assert small_runs.same(small_runs.trained(resumed), whole)
    step = torch.load(path, weights_only=True)["global_step"]
    assert lines == [line for line in expected if line[0] >= step]


def test_a_run_may_be_stopped_again_in_the_epoch_behind_the_one_at_whose_end_it_was(noisy_llama, tmp_path):
    def part(ckpt_path=None, **kwargs):
        saver = small_runs.every_step(tmp_path)
        dpo, lines = run(
            tmp_path,
            noisy_llama,
            ckpt_path,
            callbacks=[saver],
            enable_checkpointing=True,
            schedule="constant",
            **kwargs,
        )
        return small_runs.trained(dpo), lines

    whole, expected = part()
    part(tmp_path / "step=5.ckpt", max_steps=7)  # an epoch has 5 steps
    resumed, lines = part(tmp_path / "step=7-v1.ckpt")
    assert small_runs.same(resumed, whole)
    assert lines == [line for line in expected if line[0] >= 7]


def test_noise_does_not_hang_on_what_was_drawn_before(noisy_llama, tmp_path):
    def trained(seed=0, **kwargs):
        return small_runs.trained(run(tmp_path, noisy_llama, seed=seed, max_epochs=1, **kwargs)[0])

    class Draw(Callback):
        def on_validation_batch_start(self, *args, **kwargs):
            torch.rand(5)

    plain = trained(limit_val_batches=0, dropout=True)
    assert small_runs.same(plain, trained(val_check_interval=2, callbacks=[Draw()], dropout=True))
    assert not small_runs.same(plain, trained(limit_val_batches=0))  # there is noise


def test_every_batch_rank_and_seed_has_noise_of_its_own():
    seeds = {noise_seed(seed, batch, rank) for seed in (0, 1, 10) for batch in range(100) for rank in range(8)}
    assert len(seeds) == 3 * 100 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert noise_seed(1, 2, 3) == noise_seed(1, 2, 3)
