"""What the README says works as it stands."""

import inspect
import json
import re
import sys
from pathlib import Path

import yaml

import dpo_lightning.cli
import dpo_lightning.losses
from dpo_lightning.losses import DPOLoss

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_example_runs(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_sft_model").symlink_to(tiny_llama)
    _, example = blocks("python")
    assert len([line for line in example.splitlines() if line]) <= 15
    names = {}
    exec(example, names)
    assert names["module"].loss == DPOLoss(beta=0.1)
    assert names["trainer"].global_step == 1
    assert names["rewards"][0].rewards.shape == (2, 2)


def test_the_yaml_example_names_real_keys():
    example = blocks("yaml")[0]
    complete = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    data = yaml.safe_load(example)["data"]
    assert data["class_path"] == complete["data"]["class_path"]
    assert len(example.strip().splitlines()) == 5


def test_the_loss_of_ones_own_runs_from_the_command_line(tiny_llama, tmp_path, monkeypatch):
    rows = [{"prompt": "the film", "chosen": f" was good {i}", "rejected": f" was bad {i}"} for i in range(6)]
    (tmp_path / "my_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_loss.py").write_text(blocks("python")[0])
    (tmp_path / "overlay.yaml").write_text(blocks("yaml")[1])
    config = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    config["model"]["init_args"]["policy"]["path"] = tiny_llama
    config["data"]["init_args"].update(train="my_pairs.jsonl", val="my_pairs.jsonl", batch_size=2)
    config["trainer"].update(callbacks=[], logger=False, enable_checkpointing=False)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    # The installed command finds no folder of the user's on the path but by itself.
    monkeypatch.setattr("sys.path", [folder for folder in sys.path if folder])
    monkeypatch.setattr("sys.argv", ["dpo-lightning", "fit", "--config", "config.yaml", "--config", "overlay.yaml"])
    runs = []
    monkeypatch.setattr("dpo_lightning.cli.run", lambda run=dpo_lightning.cli.run: runs.append(run()))
    try:
        dpo_lightning.cli.main()
        loss = runs[0].model.loss
        assert (type(loss).__name__, loss.beta, loss.scale) == ("MyLoss", 0.1, 0.5)
        assert runs[0].trainer.global_step == 3
    finally:
        sys.modules.pop("my_loss", None)


def test_the_trainer_of_a_cluster_is_what_the_shipped_config_says():
    example = yaml.safe_load(blocks("yaml")[2])["trainer"]
    shipped = yaml.safe_load((ROOT / "configs/multinode.yaml").read_text())["trainer"]
    assert example == {key: shipped[key] for key in example}


def test_every_loss_and_every_overlay_is_in_the_table():
    table = (ROOT / "docs/losses.md").read_text()
    losses = [name for name in dpo_lightning.losses.__all__ if name.endswith("Loss")]
    concrete = [name for name in losses if not inspect.isabstract(getattr(dpo_lightning.losses, name))]
    assert [name for name in concrete if f"`{name}`" not in table] == []
    assert [path for path in ROOT.glob("configs/losses/*.yaml") if f"losses/{path.name})" not in table] == []


def test_every_printed_install_is_constrained():
    texts = [README, *(path.read_text() for path in ROOT.glob("*/README.md"))]
    installs = [line for text in texts for line in text.splitlines() if "pip install" in line]
    assert installs
    assert all("-c constraints.txt" in line for line in installs)


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *ROOT.glob("*/*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"
