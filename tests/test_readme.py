"""What the README says works as it stands."""

import re
from pathlib import Path

import yaml

from dpo_lightning.losses import DPOLoss

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_example_runs(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_sft_model").symlink_to(tiny_llama)
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line]) <= 15
    names = {}
    exec(example, names)
    assert names["module"].loss == DPOLoss(beta=0.1)
    assert names["trainer"].global_step == 1
    assert names["rewards"][0].rewards.shape == (2, 2)


def test_the_yaml_example_names_real_keys():
    (example,) = blocks("yaml")
    complete = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    data = yaml.safe_load(example)["data"]
    assert data["class_path"] == complete["data"]["class_path"]
    assert len(example.strip().splitlines()) == 5


def test_every_printed_install_is_constrained():
    texts = [README, *(path.read_text() for path in ROOT.glob("*/README.md"))]
    installs = [line for text in texts for line in text.splitlines() if "pip install" in line]
    assert installs
    assert all("-c constraints.txt" in line for line in installs)


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *ROOT.glob("*/README.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"
