"""The central figure of DPO (arXiv:2305.18290, Sec. 6.1): reward against KL, for DPO and what it is compared with.

On the package's grammar of film reviews, about a quarter of an hour on two cores::

    python experiments/sentiment/run.py --out runs/sentiment

On the IMDb reviews, from a folder with train.jsonl.xz, test.jsonl.xz and the fitted scorer::

    python experiments/sentiment/run.py --out runs/imdb --imdb FOLDER

Each stage is a command of this library, printed before it runs; a stage that is done is not done again, so a run that
was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import prepare
import torch

HERE = Path(__file__).parent
BETAS = (0.05, 0.1, 1, 5)  # those of the paper's figure
ALPHAS = (0.05, 0.1, 0.5, 1)
BEST_OF = (1, 2, 4, 8, 16, 32, 64)
GRAMMAR: dict[str, Any] = {
    "sft_lr": 3e-3, "sft_batch_size": 64, "sft_epochs": 1, "review_length": 128, "precision": "32-true",
    "lr": 1e-4, "batch_size": 64, "max_steps": 240, "every_n_steps": 30, "end_token": "true", "num_samples": 4,
    "max_new_tokens": 64,
}  # fmt: skip
IMDB: dict[str, Any] = {
    "width": 384, "depth": 6,
    "sft_lr": 1e-3, "sft_batch_size": 64, "sft_epochs": 2, "review_length": 192, "precision": "bf16-mixed",
    "lr": 3e-5, "batch_size": 32, "max_steps": 120, "every_n_steps": 20, "end_token": "false", "num_samples": 2,
    "max_new_tokens": 48,
}  # fmt: skip
if torch.cuda.is_available():  # 42 million parameters; two cores manage the 14 million of above in an hour
    IMDB |= {"width": 512, "depth": 12, "sft_epochs": 4, "batch_size": 64, "max_steps": 240, "num_samples": 4}
SENTIMENT = {"class_path": "Function", "init_args": {"path": "dpo_lightning.quickstart.grammar.sentiment"}}


class Stage(NamedTuple):
    """A step of the experiment.

    Attributes:
        name: What it is called.
        does: Does it, or goes on with it where it was stopped.
    """

    name: str
    does: Callable[[], None]


def stages(out: Path, imdb: Path | None) -> Iterator[Stage]:
    """All of them, in order."""
    scorer = SENTIMENT if imdb is None else fitted(imdb)
    settings = kept(out / "settings.json", GRAMMAR if imdb is None else IMDB)
    values = {**settings, "out": str(out), "scorer": json.dumps(scorer)}
    yield Stage("prepare", lambda: make_data(out / "data", imdb, settings))
    yield fit("sft", "sft", {**values, "name": "sft"})
    yield command("sample", "sample", f"{out}/sft/hf", f"{out}/data/prompts.jsonl", f"{out}/samples.jsonl",
                  num_samples=4, max_new_tokens=values["max_new_tokens"])  # fmt: skip
    yield command("label", "label", f"{out}/samples.jsonl", f"{out}/pairs.jsonl", labeller=scorer, pairs="all")
    runs = [("dpo", f"dpo_beta_{beta}", beta) for beta in BETAS]
    runs += [("unlikelihood", f"unlikelihood_alpha_{alpha}", alpha) for alpha in ALPHAS]
    for kind, name, strength in [*runs, ("preferred_ft", "preferred_ft", None)]:
        yield fit(kind, name, {**values, "name": name, "strength": strength})
    yield command(
        "best_of_n", "evaluate", "reward_kl", f"{out}/sft/hf", f"{out}/sft/hf", f"{out}/data/prompts_held_out.jsonl",
        f"{out}/best_of_n.json", scorer=scorer, num_samples=max(BEST_OF), best_of=list(BEST_OF),
        max_new_tokens=values["max_new_tokens"], method="SFT",
    )  # fmt: skip
    yield command("frontier", "frontier", str(out), f"{out}/frontier.png", scale="sqrt")


def kept(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Those that an experiment was begun with, which may have been on another machine."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=2) + "\n")
    return dict(json.loads(path.read_text()))


def make_data(folder: Path, imdb: Path | None, settings: Mapping[str, Any]) -> None:
    """What is learnt from and what is continued."""
    if imdb is None:
        prepare.grammar(folder, num_reviews=40_000, num_prompts=2_000, num_held_out=128)
    else:
        prepare.imdb(imdb, folder, settings["width"], settings["depth"], num_prompts=2_500, num_held_out=256)


def fitted(folder: Path) -> dict[str, Any]:
    """The scorer that lies beside the reviews."""
    return {
        "class_path": "fitted_sentiment.FittedSentiment",
        "init_args": {"path": str(folder / "imdb_lr_20k.json.gz")},
    }


def fit(kind: str, name: str, values: Mapping[str, Any]) -> Stage:
    """Training by a config whose blanks are filled in; what was filled in is kept."""
    out = Path(values["out"])
    config = out / "configs" / f"{name}.yaml"

    def does() -> None:
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(Template((HERE / f"{kind}.yaml").read_text()).substitute(values))
        run("fit", "--config", str(config), "--resume", "true")

    return Stage(name, does)


def command(name: str, *words: str, **options: Any) -> Stage:
    """A command with its options."""
    given = [part for key, value in options.items() for part in (f"--{key}", as_argument(value))]
    return Stage(name, lambda: run(*words, *given))


def as_argument(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def run(*arguments: str) -> None:
    """A command of this library, in a process of its own, with this folder on the path for the scorer."""
    print(f"\n$ dpo-lightning {shlex.join(arguments)}", flush=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-m", "dpo_lightning", *arguments], env=environment, check=True)


def main() -> None:
    """The experiment, as far as it is not done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/sentiment"), help="Folder of all that is made.")
    parser.add_argument("--imdb", type=Path, help="Folder with the IMDb reviews and their scorer.")
    arguments = parser.parse_args()
    for stage in stages(arguments.out, arguments.imdb):
        done = arguments.out / "done" / stage.name
        if done.exists():
            continue
        begin = time.monotonic()
        stage.does()
        done.parent.mkdir(parents=True, exist_ok=True)
        done.write_text(f"{time.monotonic() - begin:.0f} s\n")
        print(f"{stage.name}: {done.read_text()}", flush=True)


if __name__ == "__main__":
    main()
