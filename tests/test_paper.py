"""The paper's stages run in their order, each by its config, on a tiny model and rows; only paths are others."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from chat_server import ChatServer, longer
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from dpo_lightning.tools import TOOLS, run_tool

ROOT = Path(__file__).parent.parent
PAPER = ROOT / "configs/paper"
STAGES = sorted(path for path in PAPER.glob("*/*.yaml") if "trainer:" not in path.read_text())
README = (PAPER / "README.md").read_text()


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def classifier(tiny_llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id, id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    return str(tmp_path / "classifier")


def rows_of(source):
    """Rows of the shape of a dataset on the hub."""
    name = source if isinstance(source, str) else source["init_args"]["name"]
    if name == "Anthropic/hh-rlhf":
        talk = "\n\nHuman: how is film {}?\n\nAssistant:"
        return [{"chosen": f"{talk.format(i)} good", "rejected": f"{talk.format(i)} bad"} for i in range(4)]
    if name == "abisee/cnn_dailymail":
        return [{"article": f"the film {i} was slow", "highlights": "slow film"} for i in range(4)]
    if name == "trl-lib/tldr":
        return [{"prompt": f"the film {i} was slow TL;DR:", "completion": " slow film"} for i in range(4)]
    return [{"prompt": f"the {i}"} for i in range(4)]


def adapted(config, folder, model, classifier, url):
    """The same with a tiny model, little data and a judge of this machine."""
    for name in ("model", "policy", "reference"):
        if name in config:
            config[name] = model
    for name in ("prompts", "against"):
        if name in config:
            config[name] = write(folder / f"{name}.jsonl", rows_of(config[name]))
    for name, few in (
        ("max_new_tokens", 6),
        ("num_samples", min(4, config.get("num_samples", 4))),
        ("best_of", [1, 4]),
    ):
        if name in config:
            config[name] = few
    for name in ("scorer", "labeller"):
        if name in config:
            assert config[name]["class_path"] == "Classifier"
            config[name]["init_args"]["path"] = classifier
    if "judge" in config:
        config["judge"]["init_args"]["server"].update(url=url, key_variable="JUDGE_KEY")
    return config


def run(path, folder, model, classifier, url):
    config = yaml.safe_load(path.read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(adapted(config, folder, model, classifier, url)))
    words = path.read_text().splitlines()[0].partition("dpo-lightning ")[2].split()
    given = words.index("--config")
    assert words[given + 1] == str(path.relative_to(ROOT))
    if isinstance(TOOLS[words[0]], dict):
        run_tool(words[0], [words[1], "--config", "config.yaml"])
    else:
        run_tool(words[0], ["--config", "config.yaml"])
    return config


@pytest.mark.parametrize("experiment", ["imdb", "tldr", "hh"])
def test_the_stages_run_in_order(experiment, tiny_llama, classifier, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JUDGE_KEY", "none")
    stages = [path for path in STAGES if path.parent.name == experiment]
    stages.sort(key=lambda path: README.index(f"{experiment}/{path.name}"))
    assert len(stages) >= 2
    with ChatServer(longer) as chat:
        for path in stages:
            config = run(path, tmp_path, tiny_llama, classifier, chat.url)
            assert Path(config["out"]).stat().st_size
            if "num_samples" in config and config["out"].endswith("samples.jsonl"):
                first = json.loads(Path(config["out"]).read_text().splitlines()[0])
                assert len(first["responses"]) == config["num_samples"]
            if path.stem.startswith("win_rate"):
                result = json.loads(Path(config["out"]).read_text())["rows"]
                assert all(row["compared"] == 4 for row in result)


def test_every_config_is_in_the_readme_and_every_file_of_it_is_there():
    for path in PAPER.glob("*/*.yaml"):
        assert f"({path.relative_to(PAPER)})" in README
    for line in README.splitlines():
        for word in line.replace("`", " ").split():
            if word.startswith("configs/paper/") and word.endswith(".yaml"):
                assert (ROOT / word).exists(), word


@pytest.mark.parametrize(("path", "beta"), [("imdb/dpo.yaml", 0.1), ("tldr/dpo.yaml", 0.5), ("hh/dpo.yaml", 0.1)])
def test_training_has_the_papers_settings(path, beta):
    config = yaml.safe_load((PAPER / path).read_text())
    model, optimizer = config["model"]["init_args"], config["optimizer"]
    assert model["loss"] == {"class_path": "DPOLoss", "init_args": {"beta": beta}}
    assert model["warmup_steps"] == 150
    assert config["data"]["init_args"]["batch_size"] == 64
    assert optimizer == {"class_path": "torch.optim.RMSprop", "init_args": {"lr": 1e-6}}
