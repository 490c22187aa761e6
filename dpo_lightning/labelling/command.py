"""From samples to preferences."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm  # type: ignore[import-untyped]

from dpo_lightning.data.files import Files
from dpo_lightning.errors import UsageError
from dpo_lightning.generation.samples import read_samples
from dpo_lightning.journal import Journal
from dpo_lightning.judges import Judge
from dpo_lightning.labelling.choice import Choice
from dpo_lightning.labelling.groups import group
from dpo_lightning.labelling.labellers import Labeller, as_labeller
from dpo_lightning.labelling.shapes import SHAPES
from dpo_lightning.labelling.tally import Tally
from dpo_lightning.paths import resolve
from dpo_lightning.recipes import identity
from dpo_lightning.scorers import Scorer

AT_ONCE = 64  # prompts whose rows are written in one go


def label(
    samples: str,
    out: str,
    *,
    labeller: Labeller | Scorer | Judge,
    make: Literal["pairs", "rankings", "comparisons"] = "pairs",
    pairs: Literal["all", "best_worst", "random"] = "all",
    num_pairs: int | None = None,
    seed: int = 0,
    unfinished: Literal["keep", "drop"] = "keep",
    pool: bool = False,
    answers: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Turn samples into preferences: pairs, rankings or comparisons.

    Equal responses of a prompt are one, and those without a word are left out. A run that was killed goes on
    where it stopped when the command is given again.

    Args:
        samples: File of samples, as `dpo-lightning sample` writes it.
        out: File of preferences, JSON Lines.
        labeller: What says which response is better: a scorer (Function, Classifier, ...), a judge (LLMJudge, ...), or
            BradleyTerry, which draws labels at the odds that a scorer gives.
        make: Pairs leave ties out, comparisons keep them with a label of their own, rankings hold all responses of a
            prompt with their scores.
        pairs: Which pairs of a prompt are compared: all of them, that of the best and the worst score, or some at
            random.
        num_pairs: How many at random.
        seed: Seed of that.
        unfinished: Keep or drop responses that were cut before their end token.
        pool: Compare the responses of all temperatures of a prompt with each other, not each temperature's alone.
        answers: File that keeps scores, or a judge's answers; OUT.answers.jsonl unless given. What it holds is not
            asked for again, whichever file of preferences it was for.
        overwrite: Begin the file of preferences anew.

    Returns:
        The file of preferences.

    Raises:
        UsageError: If the samples are none, the labeller fails, the file is of other settings, or two files are one.
    """
    chosen, choice = as_labeller(labeller), Choice(pairs=pairs, num_pairs=num_pairs, seed=seed)
    _check(chosen, make, choice)
    answers = answers or f"{out}.answers.jsonl"
    _see_that_they_are_apart({"samples": samples, "out": out, "answers": answers})
    found = group(read_samples(samples), unfinished=unfinished, pool=pool)
    settings = {
        "samples": Files(samples).fingerprint(), "labeller": identity(chosen), "make": make, "pairs": pairs,
        "num_pairs": num_pairs, "seed": seed, "unfinished": unfinished, "pool": pool,
    }  # fmt: skip
    tally, shape = Tally(), SHAPES[make]
    with Journal(out, settings, overwrite) as journal:
        kept, new = iter(journal.rows), list[dict[str, Any]]()
        known = chosen.label(found.groups, choice, Path(answers))
        done = 0
        with tqdm(total=len(found.groups), desc="Labelling", unit="prompt", dynamic_ncols=True) as bar:
            for done, (one, labels) in enumerate(zip(found.groups, known, strict=True), start=1):
                tally.labelled([label.verdict for label in labels.compared])
                rows = shape(one, labels, tally)
                tally.rows += len(rows)
                new += _behind(kept, rows, journal.path)
                if done % AT_ONCE == 0 or done == len(found.groups):
                    journal.append(new)
                    new.clear()
                bar.update()
        _see_that_none_is_left(kept, journal.path)
    print(tally.report(found, make, unfinished))
    return Path(out)


def _check(labeller: Labeller, make: str, choice: Choice) -> None:
    if make == "rankings" and choice.pairs != "all":
        raise UsageError(f"A ranking holds all responses of a prompt; leave out `pairs`, here {choice.pairs}.")
    if labeller.scores:
        return
    if make == "rankings":
        raise UsageError(
            "A judge compares two responses and gives no scores to rank by: `make` pairs or comparisons with it, or "
            "rankings with a scorer."
        )
    if choice.pairs == "best_worst":
        raise UsageError(
            "A judge gives no scores, so nobody knows the best and the worst: set `pairs` to all or random."
        )


def _see_that_they_are_apart(files: dict[str, str]) -> None:
    places: dict[Path, str] = {}
    for name, path in files.items():
        before = places.setdefault(Path(resolve(path)).expanduser().resolve(), name)
        if before != name:
            raise UsageError(f"{path} is both `{before}` and `{name}`; name another file for `{name}`.")


def _see_that_none_is_left(kept: Iterator[Any], path: Path) -> None:
    for row in kept:
        raise _others(path, row)


def _behind(kept: Iterator[Any], rows: list[dict[str, Any]], path: Path) -> Iterator[dict[str, Any]]:
    """Rows that are not in the file yet; those that are have to be the same."""
    for row in rows:
        before = next(kept, None)
        if before is None:
            yield row
        elif before != json.loads(json.dumps(row)):
            raise _others(path, row)


def _others(path: Path, row: dict[str, Any]) -> UsageError:
    return UsageError(
        f"{path} holds labels that would be others now (prompt of row {row['row']}): the scorer changed, or a judge "
        "has answered what it did not before. Name another file, or give --overwrite."
    )
