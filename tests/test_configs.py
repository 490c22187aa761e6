"""Every config is run on tiny models and rows; every key that is not replaced is found again on what was built."""

import dataclasses
import gzip
import inspect
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

import dpo_lightning.cli
import dpo_lightning.losses
import dpo_lightning.references
from dpo_lightning.losses import Weighted

ROOT = Path(__file__).parent.parent
PAPER = sorted(path for path in (ROOT / "configs/paper").glob("*/*.yaml") if "trainer:" in path.read_text())
CONFIGS = [*sorted((ROOT / "configs").glob("*.yaml")), *PAPER]
LOSSES = sorted((ROOT / "configs/losses").glob("*.yaml"))  # each over the quickstart
REFERENCES = sorted((ROOT / "configs/references").glob("*.yaml"))  # the same
# Paths, data, lengths, devices and the number of steps: all that a test may replace.
REPLACED = {
    "model.policy.path",
    "data.train",
    "data.val",
    "data.max_length",
    "data.max_prompt_length",
    "data.num_workers",
    "model.reference.dir",
    "trainer.max_epochs",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.logger.save_dir",
    "ExportHF.dir",
    "ModelCheckpoint.dirpath",
    "ModelCheckpoint.every_n_train_steps",
    "LogSamples.prompts",
    "LogSamples.max_new_tokens",
    "TrackRewardKL.prompts",
    "TrackRewardKL.scorer",
    "TrackRewardKL.reference",
    "TrackRewardKL.max_new_tokens",
}


def write_rows(folder, config):
    """Rows of the shape that the config reads, more than one batch of them."""
    shape = config["data"]["init_args"].get("format", {}).get("class_path")
    count = config["data"]["init_args"]["batch_size"] + 8
    words = ["good", "bad", "slow", "fine", "dull", "warm"]
    ends = [f"{words[i % 6]} film {i}" for i in range(2 * count)]
    if shape == "Completions":
        rows = [{"prompt": "it is", "completion": " " + end} for end in ends[:count]]
    elif shape == "Transcripts":
        talk = "\n\nHuman: how is it?\n\nAssistant:"
        rows = [{"chosen": f"{talk} {ends[2 * i]}", "rejected": f"{talk} {ends[2 * i + 1]}"} for i in range(count)]
    elif "ultrafeedback" in str(config["data"]["init_args"]["train"]):
        rows = []
        for place, answers in enumerate(zip(ends[::2], ends[1::2], strict=True)):
            asked = {"role": "user", "content": f"how is film {place}?"}
            chosen, rejected = ([asked, {"role": "assistant", "content": answer}] for answer in answers)
            rows.append({"prompt": asked["content"], "chosen": chosen, "rejected": rejected})
    elif config["model"]["class_path"] == "SFTModule" and "num_responses" not in config["data"]["init_args"]:
        rows = [{"text": end} for end in ends[:count]]
    else:
        rows = [
            {"prompt": "it is", "chosen": " " + a, "rejected": " " + b}
            for a, b in zip(ends[::2], ends[1::2], strict=True)
        ]
    path = folder / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return str(path)


def adapted(config, folder, model, devices=1, num_nodes=1):
    """A config for a tiny model on the CPU; on several processes its strategy is kept."""
    data = write_rows(folder, config)
    config["model"]["init_args"]["policy"]["path"] = model
    config["data"]["init_args"].update(train=data, val=data, max_length=64)
    if "max_prompt_length" in config["data"]["init_args"]:
        config["data"]["init_args"]["max_prompt_length"] = 40
    if config["data"]["init_args"].get("num_workers"):
        config["data"]["init_args"]["num_workers"] = 0
    if config["model"]["init_args"].get("reference", {}).get("class_path") == "Cached":
        config["model"]["init_args"]["reference"]["init_args"] = {"dir": str(folder / "scores")}
    config["trainer"].update(max_epochs=1, accelerator="cpu", default_root_dir=str(folder))
    if "strategy" in config["trainer"]:
        config["trainer"].update(devices=devices, num_nodes=num_nodes)
        config["trainer"]["strategy"] = config["trainer"]["strategy"] if devices * num_nodes > 1 else "auto"
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(folder)
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"] == "ExportHF":
            callback["init_args"] = {"dir": str(folder / "hf")}
        if "dirpath" in callback.get("init_args", {}):
            callback["init_args"].update(dirpath=str(folder / "saved"), every_n_train_steps=1)
        if callback["class_path"] == "LogSamples":
            callback["init_args"].update(prompts=["it is"], max_new_tokens=4)
        if callback["class_path"] == "TrackRewardKL":
            score = {"class_path": "Function", "init_args": {"path": "dpo_lightning.quickstart.grammar.sentiment"}}
            callback["init_args"].update(prompts=["it is"], scorer=score, max_new_tokens=4)
            if "reference" in callback["init_args"]:
                callback["init_args"]["reference"] = model
    return config


def found(cli, key):
    """The value of a key on the objects that the command line built."""
    part, _, name = key.partition(".")
    if part == "model":
        owner, _, rest = name.partition(".")
        module = cli.model
        if owner == "policy":
            return getattr(module.spec, rest)
        if owner in ("loss", "reference"):
            recipe = getattr(module, owner)
            return type(recipe).__name__ if rest == "class_path" else getattr(recipe, rest)
        return getattr(module, name)
    if part == "data":
        if name == "format":
            return type(cli.datamodule.format).__name__
        owners = (cli.datamodule, cli.datamodule.stock, cli.datamodule.tokenization)
        return next(getattr(owner, name) for owner in owners if hasattr(owner, name))
    if part == "optimizer":
        optimizer = cli.trainer.optimizers[0]
        return f"torch.optim.{type(optimizer).__name__}" if name == "class_path" else optimizer.defaults[name]
    if part == "trainer":
        owner, _, rest = name.partition(".")
        value = getattr(cli.trainer, owner)
        return value if not rest else type(value).__name__ if rest == "class_path" else getattr(value, rest)
    callback = next(c for c in cli.trainer.callbacks if type(c).__name__ == part)
    value = getattr(callback if hasattr(callback, name) else callback.drawing, name)
    return f"{value.__module__}.{value.__name__}" if callable(value) else value


def flat(config):
    """Keys of a config as ``found`` knows them, with their values."""
    for name, value in config["model"]["init_args"].items():
        if name == "policy":
            yield from ((f"model.policy.{key}", item) for key, item in value.items())
        elif name in ("loss", "reference"):
            yield f"model.{name}.class_path", value["class_path"]
            yield from ((f"model.{name}.{key}", item) for key, item in value.get("init_args", {}).items())
        else:
            yield f"model.{name}", value
    for name, value in config["data"]["init_args"].items():
        yield f"data.{name}", value["class_path"] if name == "format" else value
    for name, value in config["trainer"].items():
        if name == "logger":
            yield "trainer.logger.class_path", value["class_path"]
            yield from ((f"trainer.logger.{key}", item) for key, item in value["init_args"].items())
        elif name != "callbacks":
            yield f"trainer.{name}", value
    for callback in config["trainer"]["callbacks"]:
        yield from ((f"{callback['class_path']}.{k}", v) for k, v in callback.get("init_args", {}).items())
    optimizer = config.get("optimizer", {})
    yield from (
        (f"optimizer.{k}", v) for k, v in {**optimizer, **optimizer.get("init_args", {})}.items() if k != "init_args"
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs").with_suffix("")))
def test_every_config_runs_and_every_key_arrives(path, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dpo-lightning"])
    config = yaml.safe_load(path.read_text())
    original = dict(flat(config))
    adapted(config, tmp_path, tiny_llama)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    cli = dpo_lightning.cli.run(["fit", "--config", "config.yaml"])
    assert cli.trainer.global_step >= 2
    assert type(cli.model).__name__ == config["model"]["class_path"]
    for key in set(original) - REPLACED:
        assert found(cli, key) == original[key], key
    if not any(callback["class_path"] == "ExportHF" for callback in config["trainer"]["callbacks"]):
        return
    exported = cli.model.spec.auto.from_pretrained(tmp_path / "hf")
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token_id is not None
    trained = cli.model.policy.model.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in exported.state_dict().items())


def stated(value):
    """A loss as YAML states it, with every constant."""
    if isinstance(value, (list, tuple)):
        return [stated(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    fields = {field.name: stated(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return fields if isinstance(value, Weighted) else {"class_path": type(value).__name__, "init_args": fields}


@pytest.fixture
def run_over_the_quickstart(tiny_llama, tmp_path, monkeypatch):
    """A function that runs an overlay over the quickstart, on the tiny model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dpo-lightning"])
    config = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    config["data"]["init_args"]["batch_size"] = 4  # 12 rows, so three steps
    config["trainer"]["callbacks"] = []
    adapted(config, tmp_path, tiny_llama)
    config["trainer"].update(enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return lambda path: dpo_lightning.cli.run(["fit", "--config", "config.yaml", "--config", str(path)])


@pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.stem)
def test_every_reference_runs_over_the_quickstart_and_every_constant_arrives(path, run_over_the_quickstart):
    cli = run_over_the_quickstart(path)
    assert cli.trainer.global_step == 3
    arguments = yaml.safe_load(path.read_text())["model"]["init_args"]
    assert {"init_args": {}, **arguments["reference"]} == stated(cli.model.reference)
    if "policy" in arguments:
        assert arguments["policy"]["lora"] == stated(cli.model.spec.lora)["init_args"]
    assert cli.trainer.callback_metrics["val/loss"].isfinite()


def test_every_reference_has_an_overlay():
    texts = [path.read_text() for path in REFERENCES]
    for name in {"FrozenCopy", "AdaptersOff", "Cached", "Synced"}:
        assert any(f"class_path: {name}" in text for text in texts)
        assert name in dpo_lightning.references.__all__


@pytest.mark.parametrize("path", LOSSES, ids=lambda path: path.stem)
def test_every_loss_runs_over_the_quickstart_and_every_constant_arrives(path, run_over_the_quickstart):
    cli = run_over_the_quickstart(path)
    assert cli.trainer.global_step == 3
    assert yaml.safe_load(path.read_text()) == {"model": {"init_args": {"loss": stated(cli.model.loss)}}}
    metrics = cli.trainer.callback_metrics
    assert metrics["train/loss"].isfinite()
    assert metrics["val/loss"].isfinite()
    assert all(f"val/loss/{name}" in metrics for name in cli.model.loss.part_names)


def test_every_loss_has_an_overlay():
    offered = {name for name in dpo_lightning.losses.__all__ if name.endswith("Loss")}
    concrete = {name for name in offered if not inspect.isabstract(getattr(dpo_lightning.losses, name))}
    texts = [path.read_text() for path in LOSSES]
    assert all(any(f"class_path: {name}" in text for text in texts) for name in concrete)


def test_the_quickstart_reads_what_the_package_brings():
    config = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    values = dict(flat(config))
    paths = [values["model.policy.path"], values["data.train"], values["data.val"], values["LogSamples.prompts"]]
    assert all(path.startswith("package:quickstart/") for path in paths)


def test_the_first_line_of_a_config_is_its_command():
    for path in CONFIGS:
        first = path.read_text().splitlines()[0]
        assert first.startswith("# ")
        assert str(path.relative_to(ROOT)) in first or "python -m" in first
    for path in LOSSES + REFERENCES:
        overlay = path.relative_to(ROOT)
        command = f"dpo-lightning fit --config configs/quickstart.yaml --config {overlay}"
        assert path.read_text().splitlines()[0].startswith("# ")
        assert path.read_text().splitlines()[0].endswith(f":  {command}")


def test_the_hh_config_has_the_papers_settings():
    values = dict(flat(yaml.safe_load((ROOT / "configs/hh.yaml").read_text())))
    assert values["model.loss.beta"] == 0.1
    assert values["data.batch_size"] == 64
    assert (values["optimizer.class_path"], values["optimizer.lr"]) == ("torch.optim.RMSprop", 1e-6)
    assert values["model.warmup_steps"] == 150
