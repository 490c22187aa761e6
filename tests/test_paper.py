"""The paper's stages run in their order as the README gives them, on tiny models and rows, each on what others wrote.

Training itself is run by test_configs; here a tiny model lies where it would have been exported.
"""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from chat_server import ChatServer, longer
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

import dpo_lightning.cli
from dpo_lightning.scorers import RewardModel
from dpo_lightning.tools import TOOLS, run_tool

ROOT = Path(__file__).parent.parent
PAPER = ROOT / "configs/paper"
README = (PAPER / "README.md").read_text()
TRAINING = {str(path.relative_to(PAPER)) for path in PAPER.glob("*/*.yaml") if "trainer:" in path.read_text()}
LOSSES = {
    "imdb/dpo.yaml": {"class_path": "DPOLoss", "init_args": {"beta": 0.1}},
    "tldr/dpo.yaml": {"class_path": "DPOLoss", "init_args": {"beta": 0.5}},
    "hh/dpo.yaml": {"class_path": "DPOLoss", "init_args": {"beta": 0.1}},
    "imdb/unlikelihood.yaml": {"class_path": "UnlikelihoodLoss", "init_args": {"alpha": 0.5}},
    "imdb/preferred_ft.yaml": None,
    "tldr/preferred_ft.yaml": None,
}
TALK = "\n\nHuman: how is film {}?\n\nAssistant:"
ANSWERS = {"chosen": " good {}", "completion": " slow film {}", "highlights": "slow film {}"}
WRITTEN = ("out", "dir", "save_dir")  # keys of what a stage writes; other paths below runs it reads
FEW = {"max_new_tokens": 6, "num_samples": 4, "best_of": [1, 4]}


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def save_classifier(folder, tiny_llama, *labels):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id, id2label=dict(enumerate(labels)),
        label2id={label: place for place, label in enumerate(labels)},
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def place(tiny_llama, tmp_path, monkeypatch):
    """A folder to work in, with a classifier and a reward model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JUDGE_KEY", "none")
    save_classifier(tmp_path / "classifier", tiny_llama, "NEGATIVE", "POSITIVE")
    save_classifier(tmp_path / "reward", tiny_llama, "REWARD")
    return tmp_path


def rows_of(source):
    """Rows of the shape of a dataset on the hub."""
    numbers, name = range(1, 5), source["init_args"]["name"]
    if name == "Anthropic/hh-rlhf":
        good = TALK + ANSWERS["chosen"]
        return [{"chosen": good.format(i, i), "rejected": f"{TALK.format(i)} bad"} for i in numbers]
    if name == "abisee/cnn_dailymail":
        return [{"article": f"the film {i} was slow", "highlights": ANSWERS["highlights"].format(i)} for i in numbers]
    assert name == "trl-lib/tldr"
    return [{"prompt": f"film {i} TL;DR:", "completion": ANSWERS["completion"].format(i)} for i in numbers]


def adapted(config, folder, url):
    """The same with little data and a judge of this machine."""
    for name in ("prompts", "against"):
        if isinstance(config.get(name), dict):
            config[name] = write(folder / f"{name}.jsonl", rows_of(config[name]))
    few = {"num_samples": min(FEW["num_samples"], config.get("num_samples", 1))}
    config |= {name: value for name, value in {**FEW, **few}.items() if name in config}
    for name in ("scorer", "labeller"):
        if name in config:
            assert config[name]["class_path"] == "Classifier"
            config[name]["init_args"]["path"] = "classifier"
    if "judge" in config:
        config["judge"]["init_args"]["server"].update(url=url, key_variable="JUDGE_KEY")
    return config


def paths_read(config):
    """What a config reads of what other stages write."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield from () if name in WRITTEN else paths_read(value)
    elif isinstance(config, list):
        for value in config:
            yield from paths_read(value)
    elif isinstance(config, str) and config.startswith("runs/"):
        yield config


def stages(experiment):
    """The commands of an experiment as the README has them, in words."""
    commands = re.findall(r"\| `(.*)` \|$", README, flags=re.MULTILINE)
    return [shlex.split(command) for command in commands if f"paper/{experiment}" in command]


def pretend_to_train(config, place, tiny_llama):
    """Put a tiny model where training exports one."""
    model = place / "reward" if config["model"]["class_path"] == "RewardModule" else tiny_llama
    for callback in config["trainer"]["callbacks"]:
        folder = callback.get("init_args", {}).get("dir")
        if folder:
            Path(folder).parent.mkdir(parents=True, exist_ok=True)
            Path(folder).symlink_to(model)


def run_command(words, config):
    """A command that needs no Trainer, with another config."""
    Path("config.yaml").write_text(yaml.safe_dump(config))
    name, *rest = [*words[: words.index("--config")], "--config", "config.yaml"]
    run_tool(name, rest)


def check_samples(config):
    rows = lines(config["out"])
    assert {row["temperature"] for row in rows} == set(config.get("temperatures", [1]))
    assert all(len(row["responses"]) == config["num_samples"] for row in rows)


def check_win_rate(config):
    """All is compared that there is, with the given answers alone, whatever their files hold around them."""
    result, verdicts = json.loads(Path(config["out"]).read_text()), lines(config["out"][:-4] + "verdicts.jsonl")
    samples = {(row["row"], row["temperature"]): row for row in lines(config["samples"])}
    assert [row["compared"] for row in result["rows"]] == [4] * len(result["rows"])
    assert len(verdicts) == len(samples) * len(config.get("best_of", [1]))
    chooser = RewardModel("reward")
    for one in verdicts:
        sampled = samples[one["row"], one["temperature"]]
        assert one["prompt"] == sampled["prompt"]
        assert one["first"] == sampled["responses"][one["sample"] - 1]
        assert one["second"] == ANSWERS[config["column"]].format(one["row"])
        if config["column"] == "chosen":
            assert one["prompt"] == TALK.format(one["row"])
        if one["best_of"]:
            some = sampled["responses"][: one["best_of"]]
            rewards = chooser.score([one["prompt"]] * len(some), some)
            assert one["sample"] - 1 == rewards.index(max(rewards))


@pytest.mark.parametrize("experiment", ["imdb", "tldr", "hh"])
def test_the_stages_run_in_order(experiment, tiny_llama, place):
    kinds = []
    with ChatServer(longer) as chat:
        for words in stages(experiment):
            if words[0] == "python":
                for name in ("prompts", "prompts_held_out"):
                    write(Path(words[-1]) / f"{name}.jsonl", [{"prompt": f"the {i}"} for i in range(4)])
            if "--config" not in words:
                continue
            path = ROOT / words[words.index("--config") + 1]
            config = yaml.safe_load(path.read_text())
            assert [read for read in paths_read(config) if not Path(read).exists()] == []
            kinds.append(next(word for word in words if word in ("fit", "sample", "label", "reward_kl", "win_rate")))
            if kinds[-1] == "fit":
                pretend_to_train(config, place, tiny_llama)
                continue
            assert words[1] in TOOLS
            run_command(words[1:], adapted(config, place, chat.url))
            assert Path(config["out"]).stat().st_size
            {"sample": check_samples, "win_rate": check_win_rate}.get(kinds[-1], lambda config: None)(config)
    assert {"fit", "sample", "label" if experiment == "imdb" else "win_rate"} <= set(kinds)


def test_every_config_is_in_the_readme_with_its_command_and_every_file_of_it_is_there():
    for path in PAPER.glob("*/*.yaml"):
        command = path.read_text().splitlines()[0].partition(":  ")[2]
        assert f"[`{path.relative_to(PAPER)}`]({path.relative_to(PAPER)}) | `{command}` |" in README
    for line in README.splitlines():
        for word in line.replace("`", " ").split():
            if word.startswith("configs/paper/") and word.endswith(".yaml"):
                assert (ROOT / word).exists(), word


def started_by(script):
    """The commands of this library that a shell script starts, in words."""
    shell = "dpo-lightning() { printf '%s\\0' \"$@\" END; }\n" + script
    printed = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout
    return [words.strip("\0").split("\0") for words in printed.split("END\0")[:-1]]


@pytest.mark.parametrize(
    ("method", "name", "values"),
    [
        ("DPO", "beta", ["0.05", "0.1", "1", "5"]),
        ("Unlikelihood", "alpha", ["0.05", "0.1", "0.5", "1"]),
        ("Preferred-FT", "seed", ["0", "1", "2", "3"]),
    ],
)
def test_the_loops_over_betas_alphas_and_seeds(method, name, values, capsys, monkeypatch):
    """A loop's commands differ in one value, which stands where it should in what is parsed."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["dpo-lightning"])
    (loops,) = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    first, *others = [words for words in started_by(loops) if any(word.startswith(f"{name} ") for word in words)]
    assert others == [[word.replace(values[0], value) for word in first] for value in values[1:]]
    with pytest.raises(SystemExit):
        dpo_lightning.cli.run([*first, "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    loss = config["model"]["init_args"].get("loss", {}).get("init_args", {})
    assert {**loss, "seed": config["seed_everything"]}[name] == float(values[0])
    callback = config["trainer"]["callbacks"][-1]["init_args"]
    assert (callback["method"], callback["label"]) == (method, f"{name} {values[0]}")
    assert config["trainer"]["logger"]["init_args"]["name"].endswith(f"_{name}_{values[0]}")


def test_all_training_has_the_papers_batches_and_warm_up():
    for path in TRAINING:
        config = yaml.safe_load((PAPER / path).read_text())
        assert config["data"]["init_args"]["batch_size"] == 64
        assert config["model"]["init_args"]["warmup_steps"] == 150
    others = {"imdb/sft.yaml", "tldr/sft.yaml", "tldr/reward.yaml", "hh/sft.yaml", "hh/reward.yaml"}
    assert {*LOSSES, *others} == TRAINING


@pytest.mark.parametrize(("path", "loss"), LOSSES.items())
def test_training_on_preferences_has_the_papers_settings(path, loss):
    config = yaml.safe_load((PAPER / path).read_text())
    model = config["model"]["init_args"]
    assert model.get("loss") == loss
    assert config["data"]["init_args"].get("num_responses") == (1 if loss is None else None)
    assert config["optimizer"] == {"class_path": "torch.optim.RMSprop", "init_args": {"lr": 1e-6}}
    assert model["policy"]["path"] == f"runs/paper/{Path(path).parent}/sft"


@pytest.mark.parametrize("experiment", ["tldr", "hh"])
def test_a_reward_model_learns_what_dpo_does_from_the_same_model(experiment):
    dpo, reward = (yaml.safe_load((PAPER / experiment / f"{name}.yaml").read_text()) for name in ("dpo", "reward"))
    assert reward["data"] == dpo["data"]
    assert reward["model"]["init_args"]["policy"] == dpo["model"]["init_args"]["policy"]
    assert reward["model"]["class_path"] == "RewardModule"


def test_summaries_are_judged_with_and_without_asking_for_conciseness():
    concise, simple = (yaml.safe_load((PAPER / f"tldr/win_rate{way}.yaml").read_text()) for way in ("", "_simple"))
    assert [one["judge"]["init_args"].pop("question") for one in (concise, simple)] == ["concise", "simple"]
    assert concise.pop("out") != simple.pop("out")
    assert concise == simple
