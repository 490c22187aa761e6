import json
import subprocess
import sys

import pytest
import torch
import yaml
from small_runs import PAIRS

import dpo_lightning.cli
from dpo_lightning import DPOModule
from dpo_lightning.callbacks import LogSamples
from dpo_lightning.cli import COMPONENTS, TOP_LEVEL
from dpo_lightning.explain import explain


def mistake(arguments, monkeypatch, capsys):
    """What a user sees of a mistake: exit status 2 and one message, no traceback."""
    monkeypatch.setattr("sys.argv", ["dpo-lightning", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        dpo_lightning.cli.main()
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("command", "way_on"),
    [
        (["sample"], " The same command goes on from what was made."),
        (
            ["evaluate", "win_rate", "--overwrite=true"],
            " The same command, without --overwrite, goes on from what was made.",
        ),
        (["evaluate", "agreement"], ""),
        (["fit"], ""),
    ],
)
def test_an_interrupt_ends_with_a_line(command, way_on, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(dpo_lightning.cli, "run", interrupted)
    monkeypatch.setattr(dpo_lightning.cli, "run_tool", interrupted)
    monkeypatch.setattr("sys.argv", ["dpo-lightning", *command])
    with pytest.raises(SystemExit) as exit_info:
        dpo_lightning.cli.main()
    assert exit_info.value.code == 130
    assert capsys.readouterr().err == f"\nInterrupted.{way_on}\n"


def test_fit_validate_and_predict(workplace):
    (workplace / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS[:3]))
    fit = dpo_lightning.cli.run(["fit", "--config", "config.yaml"])
    assert fit.trainer.global_step == 3  # a quarter of 12 held out, the rest in batches of 4, 4 and 1
    checkpoint = next(workplace.rglob("*.ckpt"))
    common = ["--config", "config.yaml", "--ckpt_path", str(checkpoint)]
    validate = dpo_lightning.cli.run(["validate", *common])
    assert validate.trainer.callback_metrics["val/loss"] == fit.trainer.callback_metrics["val/loss"]
    predict = dpo_lightning.cli.run(["predict", *common, "--data.init_args.test", "test.jsonl"])
    scored = predict.trainer.predict_loop.predictions[0]
    assert scored.rewards.shape == (3, 2)
    assert scored.row.tolist() == [1, 2, 3]


def test_a_run_of_the_command_line_is_resumed_and_loaded_in_code(workplace):
    arguments = ["fit", "--config", "config.yaml", "--model.init_args.schedule", "linear"]
    whole = dpo_lightning.cli.run([*arguments, "--trainer.max_epochs", "2"])
    trained = whole.model.policy.state_dict()
    first = dpo_lightning.cli.run([*arguments, "--trainer.max_steps", "3", "--trainer.max_epochs", "2"])
    checkpoint = first.trainer.checkpoint_callback.best_model_path
    resumed = dpo_lightning.cli.run(
        [*arguments, "--trainer.max_epochs", "2", "--ckpt_path", checkpoint, "--weights_only", "true"]
    )
    assert resumed.trainer.global_step == whole.trainer.global_step == 6
    loaded = DPOModule.load_from_checkpoint(resumed.trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert loaded.loss == resumed.model.loss
    for name, value in resumed.model.policy.state_dict().items():
        assert torch.equal(value, loaded.policy.state_dict()[name])
    assert set(trained) == set(loaded.policy.state_dict())


def test_yaml_holds_against_the_checkpoint(workplace):
    dpo_lightning.cli.run(["fit", "--config", "config.yaml"])
    checkpoint = str(next(workplace.rglob("*.ckpt")))
    beta = ["--model.init_args.loss.init_args.beta", "0.7"]
    again = dpo_lightning.cli.run(["validate", "--config", "config.yaml", "--ckpt_path", checkpoint, *beta])
    assert again.model.loss.beta == 0.7


def test_lightnings_optimizer_and_lr_scheduler_keys(workplace):
    cli = dpo_lightning.cli.run([
        "fit", "--config", "config.yaml", "--model.init_args.lr", "null",
        "--optimizer", "torch.optim.SGD", "--optimizer.lr", "0.01", "--optimizer.momentum", "0.5",
        "--lr_scheduler", "torch.optim.lr_scheduler.StepLR", "--lr_scheduler.step_size", "2",
    ])  # fmt: skip
    optimizer = cli.trainer.optimizers[0]
    assert type(optimizer).__name__ == "SGD"
    assert optimizer.defaults["momentum"] == 0.5
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)  # stepped down once in three steps


def test_the_seed_fixes_the_run_and_changes_it(workplace):
    def losses(seed):
        cli = dpo_lightning.cli.run(["fit", "--config", "config.yaml", "--seed_everything", seed])
        return cli.trainer.callback_metrics["val/loss"].item()

    assert losses("1") == losses("1") != losses("2")


def test_where_things_were_written_is_said(workplace, capsys):
    callbacks = (
        '[{"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/loss", "save_last": true}}, "ExportHF"]'
    )
    dpo_lightning.cli.run(["fit", "--config", "config.yaml", "--trainer.callbacks", callbacks])
    said = capsys.readouterr().out
    for name in ("Logs", "Best checkpoint", "Last checkpoint", "Hugging Face folder"):
        line = next(line for line in said.splitlines() if line.strip().startswith(name))
        place = line.split("   ")[0] if name == "Logs" else line
        path = place.replace(name, "").strip().split("   ")[0]
        assert (workplace / path).exists(), line


def edited(workplace, change):
    loaded = yaml.safe_load((workplace / "config.yaml").read_text())
    change(loaded)
    (workplace / "config.yaml").write_text(yaml.safe_dump(loaded))
    return ["fit", "--config", "config.yaml"]


@pytest.fixture
def no_weights(monkeypatch):
    """Fails if a weight is loaded: mistakes must be found before."""
    monkeypatch.setattr("dpo_lightning.models.spec.PolicySpec.build", lambda *_: pytest.fail("weights were loaded"))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda c: c["model"]["init_args"]["loss"].update(init_args={"betta": 0.1}),
            "model.loss: DPOLoss has no key 'betta' (did you mean 'beta'?). It has beta, label_smoothing.",
        ),
        (lambda c: c["model"]["init_args"].update(warmup=3), "no key 'warmup' (did you mean 'warmup_steps'?)"),
        (lambda c: c["model"]["init_args"]["policy"].update(pth=1), "no key 'pth' (did you mean 'path'?)"),
        (lambda c: c["data"]["init_args"].update(trian="x"), "no key 'trian' (did you mean 'train'?)"),
        (lambda c: c.update(dta=c.pop("data")), "there is no key 'dta' (did you mean 'data'?) at the top of a config"),
        (lambda c: c["trainer"].update(max_epoch=1), "no key 'trainer.max_epoch' (did you mean 'trainer.max_epochs'?)"),
        (
            lambda c: c["model"]["init_args"].update(loss={"class_path": "DPOLos"}),
            "model.loss: there is no class 'DPOLos' (did you mean 'DPOLoss'?)",
        ),
        (
            lambda c: c["model"]["init_args"]["loss"].update(init_args={"beta": -1.0}),
            "`beta` must be positive, got -1.0; for a loss without a reference use SimPOLoss.",
        ),
        (lambda c: c["data"]["init_args"].update(train="none.jsonl"), "There is no data file none.jsonl (looked for"),
        (
            lambda c: c["data"]["init_args"].update(
                format={"class_path": "Pairs", "init_args": {"prompt": "question"}}
            ),
            "pairs.jsonl: there is no column 'question'; the rows have 'prompt', 'chosen', 'rejected'",
        ),
        (lambda c: c["model"]["init_args"]["policy"].update(path="./no/model"), "there is no folder ./no/model"),
    ],
)  # fmt: skip
def test_mistakes_are_explained_before_a_weight_is_loaded(change, expected, workplace, monkeypatch, capsys):
    assert expected in mistake(edited(workplace, change), monkeypatch, capsys)


def test_an_unknown_flag_is_explained(workplace, monkeypatch, capsys):
    arguments = ["fit", "--config", "config.yaml", "--trainer.max_epchs", "3"]
    assert "'trainer.max_epochs'" in mistake(arguments, monkeypatch, capsys)


def test_a_missing_config_is_named(monkeypatch, capsys):
    assert "nowhere.yaml" in mistake(["fit", "--config", "nowhere.yaml"], monkeypatch, capsys)


def test_an_unknown_message_is_handed_through():
    assert explain("something else went wrong", TOP_LEVEL, COMPONENTS) == "something else went wrong"


def test_python_m_is_the_command():
    run = subprocess.run([sys.executable, "-m", "dpo_lightning", "--help"], capture_output=True, text=True, check=True)
    assert {"fit", "validate", "test", "predict"} <= set(
        run.stdout.replace(",", " ").replace("{", " ").replace("}", " ").split()
    )


def test_samples_leave_the_run_as_it_is(workplace):
    plain = dpo_lightning.cli.run(["fit", "--config", "config.yaml"])
    callback = '[{"class_path": "LogSamples", "init_args": {"prompts": ["the film"], "max_new_tokens": 4}}]'
    sampled = dpo_lightning.cli.run(["fit", "--config", "config.yaml", "--trainer.callbacks", callback])
    assert any(isinstance(callback, LogSamples) for callback in sampled.trainer.callbacks)
    assert sampled.trainer.callback_metrics["val/loss"] == plain.trainer.callback_metrics["val/loss"]
