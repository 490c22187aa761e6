"""The same command again goes on where its earlier run stopped."""

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dpo_lightning.cli
from dpo_lightning.errors import UsageError
from dpo_lightning.resuming import GoesOn, changes

FIT = ["fit", "--config", "config.yaml", "--trainer.max_epochs", "2"]  # 6 steps


class StopAt(Callback):
    """Ends the process's run behind a step, as a kill does: nothing is written any more."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            raise InterruptedError


SAVER = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 2}}
SAMPLES = {"class_path": "LogSamples", "init_args": {"prompts": ["the film"], "max_new_tokens": 4}}


def fit(*more, stop=None, callbacks=(SAVER,)):
    stopping = [{"class_path": "test_resuming.StopAt", "init_args": {"step": stop}}] if stop else []
    arguments = [*FIT, "--trainer.callbacks", yaml.safe_dump([*callbacks, *stopping], default_flow_style=True)]
    if not stop:
        return dpo_lightning.cli.run([*arguments, *more])
    with pytest.raises(InterruptedError):
        dpo_lightning.cli.run([*arguments, *more])
    return None


def trained(cli):
    return torch.cat([weight.detach().flatten() for weight in cli.model.policy.parameters()])


def runs(workplace):
    return sorted(path.name for path in (workplace / "lightning_logs").iterdir())


@pytest.mark.parametrize(
    "resume", [["--resume", "true"], pytest.param(["--ckpt_path", "last"], marks=pytest.mark.slow)]
)
def test_the_same_command_goes_on_in_the_same_folder(workplace, resume, caplog, recwarn):
    whole = fit("--trainer.default_root_dir", "whole")
    fit(stop=5)
    caplog.set_level("INFO")
    resumed = fit(*resume)
    assert "Goes on behind step 4, from" in caplog.text
    assert not [warning for warning in recwarn if "Other than" in str(warning.message)]
    assert torch.equal(trained(resumed), trained(whole))
    assert runs(workplace) == ["version_0"]
    folder = workplace / "lightning_logs" / "version_0"
    (left,) = (folder / "checkpoints").glob("*.ckpt")
    assert left.name == "epoch=1-step=6.ckpt"
    # What the first run has logged behind its checkpoint does not count any more.
    events = EventAccumulator(str(folder)).Reload()
    assert [point.step for point in events.Scalars("train/loss")] == [0, 1, 2, 3, 4, 5]
    checkpoint = torch.load(left, weights_only=True)
    assert yaml.safe_load(checkpoint["config"])["model"]["init_args"]["lr"] == 1e-3
    assert checkpoint["seed"] == 0
    assert checkpoint["versions"]["torch"] == torch.__version__


def test_without_an_earlier_run_it_starts_anew_or_says_so(workplace, caplog):
    with pytest.raises(UsageError, match="no earlier run with these folders has left a checkpoint"):
        fit("--ckpt_path", "last")
    with pytest.raises(UsageError, match="Both `resume` and `ckpt_path` are given"):
        fit("--resume", "true", "--ckpt_path", "x.ckpt")
    assert not (workplace / "lightning_logs").exists()
    caplog.set_level("INFO")
    assert fit("--resume", "true").trainer.global_step == 6
    assert "starts anew" in caplog.text


def test_a_finished_run_says_so(workplace, caplog):
    first = fit()
    caplog.set_level("INFO")
    again = fit("--resume", "true")
    assert "has done all of its 6 steps" in caplog.text
    assert again.trainer.global_step == 6
    assert torch.equal(trained(again), trained(first))
    with pytest.raises(UsageError, match=r"`trainer\.max_steps` is 3, but the run that is to go on has done 6 already"):
        fit("--resume", "true", "--trainer.max_steps", "3")


def test_the_newest_run_with_a_whole_checkpoint_counts(workplace, caplog):
    fit(stop=3)
    fit("--model.init_args.lr", "1e-4", stop=5)
    fit(stop=1)  # before it saved anything
    assert runs(workplace) == ["version_0", "version_1", "version_2"]
    caplog.set_level("INFO")
    with pytest.warns(match="Other than in the earlier run: model.init_args.lr: 0.0001 -> 0.001"):
        fit("--resume", "true", stop=5)
    assert "version_1" in caplog.text
    (path,) = (workplace / "lightning_logs" / "version_1").rglob("*.ckpt")
    path.write_bytes(path.read_bytes()[:5000])
    caplog.clear()
    validated = dpo_lightning.cli.run(["validate", "--config", "config.yaml", "--ckpt_path", "last"])
    assert f"Left out: {path} is cut off or damaged" in caplog.text
    assert "version_0" in validated.trainer.ckpt_path
    assert "version_3" in runs(workplace)  # a validation is a run of its own


def test_a_run_with_a_folder_of_its_own_and_a_named_version(workplace, caplog):
    saver = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "kept", "every_n_train_steps": 2}}
    fit(stop=5, callbacks=[saver])
    fit("--resume", "true", callbacks=[saver])
    assert runs(workplace) == ["version_0"]
    named = [
        *("--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "."),
        *("--trainer.logger.name", "lightning_logs", "--trainer.logger.version", "mine", "--resume", "true"),
    ]
    fit(*named, stop=5)  # not from version_0
    caplog.set_level("INFO")
    fit(*named)
    assert runs(workplace) == ["mine", "version_0"]
    assert "lightning_logs/mine/checkpoints/epoch=1-step=4.ckpt" in caplog.text


def test_samples_from_before_training_are_those_of_the_first_run(workplace):
    def before(cli):
        return next(callback.before for callback in cli.trainer.callbacks if type(callback).__name__ == "LogSamples")

    fast = ("--model.init_args.lr", "0.1")
    whole = fit(*fast, "--trainer.default_root_dir", "whole", callbacks=[SAVER, SAMPLES])
    fit(*fast, stop=5, callbacks=[SAVER, SAMPLES])
    assert before(fit(*fast, "--resume", "true", callbacks=[SAVER, SAMPLES])) == before(whole)


def test_ranks_that_see_other_files_stop(tmp_path):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    GoesOn("a.ckpt").setup(trainer, None, "fit")
    trainer.strategy.broadcast = lambda path: "b.ckpt"
    with pytest.raises(UsageError, match=r"the first would go on from b\.ckpt, this one from a\.ckpt"):
        GoesOn("a.ckpt").setup(trainer, None, "fit")


def test_what_may_change_is_not_named():
    before = {"trainer": {"max_epochs": 1, "precision": "32-true"}, "resume": False, "model": {"lr": 1}}
    now = {"trainer": {"max_epochs": 2, "precision": "bf16-mixed"}, "resume": True, "model": {"lr": 1}}
    assert changes(yaml.safe_dump(before), yaml.safe_dump(now)) == ["trainer.precision: 32-true -> bf16-mixed"]
