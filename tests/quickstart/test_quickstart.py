"""The quickstart as a stranger runs it, and from an installed wheel elsewhere."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dpo_lightning.cli
from dpo_lightning.callbacks import LogSamples
from dpo_lightning.data.files import Files
from dpo_lightning.quickstart.grammar import is_held_out, sentiment

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/quickstart.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_the_quickstart_ends_in_a_better_model(seed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dpo-lightning"])
    cli = dpo_lightning.cli.run(["fit", "--config", str(CONFIG), "--seed_everything", seed])
    samples = next(callback for callback in cli.trainer.callbacks if isinstance(callback, LogSamples))
    (_, before), (_, after) = samples.before, samples.after
    assert cli.trainer.callback_metrics["val/rewards/accuracies"] >= 0.9
    assert 0.4 < before["positive"] < 0.6
    assert after["positive"] >= 0.9
    assert after["positive_distinct"] >= 0.9
    assert 0 < after["kl"] < 3


@pytest.mark.slow
def test_an_installed_wheel_runs_a_downloaded_config(tmp_path):
    pip = [sys.executable, "-m", "pip"]
    wheels, site, elsewhere = tmp_path / "wheels", tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(CONFIG, elsewhere)
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels, ROOT], check=True)
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", site, *wheels.glob("*.whl")], check=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    where = "import dpo_lightning; print(dpo_lightning.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith(str(site))
    command = ["-m", "dpo_lightning", "fit", "--config", "quickstart.yaml", "--trainer.max_steps", "3"]
    subprocess.run([sys.executable, *command], cwd=elsewhere, env=environment, check=True)
    assert (elsewhere / "runs/quickstart/version_0/hf/model.safetensors").is_file()


def test_pairs_are_ranked_by_the_ground_truth_and_split_by_prompt():
    for name, held_out in (("train", False), ("val", True)):
        rows = list(Files(f"package:quickstart/{name}.jsonl.gz"))
        assert all(is_held_out(row["prompt"]) is held_out for row in rows)
        assert all(
            sentiment(row["prompt"] + row["chosen"]) > sentiment(row["prompt"] + row["rejected"]) for row in rows
        )


def test_held_out_prompts_are_in_no_training_pair():
    prompts = [row["prompt"] for row in Files("package:quickstart/held_out.jsonl")]
    trained = {row["prompt"] for row in Files("package:quickstart/train.jsonl.gz")}
    assert len(set(prompts)) == len(prompts) == 200
    assert not trained & set(prompts)
